"""A tiny model, pure batches and a tracking store for the tests of training."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from xushi.base.tracking import Tracking
from xushi.model import Batch, Deepseek
from xushi.train import Data, Evaluation, LanguageModelStep, Layout, ObjectiveConfig, Training

from ..tiny import TINY


def train(
    stage: str,
    model: Deepseek,
    config: ObjectiveConfig,
    data: Data,
    directory: Path,
    tracking: Tracking,
    evaluation: Evaluation | None = None,
    layout: Layout | None = None,
) -> dict[str, float]:
    """Train on text to the end."""
    step = LanguageModelStep(config, data)
    return Training(stage, model, step, directory, tracking, layout, evaluation).run()


@pytest.fixture
def tiny_model() -> Callable[[], Deepseek]:
    """A fresh model, the same each time."""
    return lambda: Deepseek(TINY).initialise(5)


def batch(step: int) -> Batch:
    """Two rows of two documents and padding: a function of the step alone."""
    g = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, TINY.vocab_size, (2, 21), generator=g)
    segments = torch.tensor([[0] * 9 + [1] * 8 + [-1] * 3, [0] * 4 + [1] * 16])
    positions = torch.tensor([[*range(9), *range(8), 0, 0, 0], [*range(4), *range(16)]])
    mask = segments >= 0
    mask[:, [8, 3]] = False  # some targets are not learned
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        segments=segments,
        positions=positions,
        loss_mask=mask,
    )


@pytest.fixture
def batches() -> Callable[[int], Batch]:
    return batch


@pytest.fixture
def tracking(tmp_path) -> Tracking:
    return Tracking(tmp_path / "tracking.sqlite")
