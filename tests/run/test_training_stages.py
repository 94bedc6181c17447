"""What training stages read from the tracking store: means at the end, times, the control's length."""

import math
from pathlib import Path

import pytest
import torch

from xushi.base.errors import Failed
from xushi.base.tracking import Tracking
from xushi.model import Deepseek
from xushi.run.place import RunPlace
from xushi.run.recipe import load_recipe
from xushi.run.stages.control import Control
from xushi.run.stages.training import end_mean, fill, training_seconds
from xushi.train import Layout, latest_checkpoint
from xushi.train.checkpoint import Checkpoint, save_checkpoint

from ..tiny import TINY
from .conftest import MINIATURE


@pytest.fixture
def place(tmp_path: Path):
    tracking = Tracking(tmp_path / "tracking.sqlite")
    yield RunPlace(tmp_path, tracking)
    tracking.close()


def write(tracking: Tracking, stage: str, name: str, values: list[float]) -> None:
    for step, value in enumerate(values, 1):
        tracking.metrics(stage, step, {name: value})


@pytest.mark.parametrize(
    ("values", "mean"),
    [
        ([*range(100, 80, -1)], 81.5),  # the last two of twenty
        ([5.0, 3.0, 1.0], 1.0),  # one at least
        ([9.0] * 19 + [math.nan], 9.0),
        ([math.nan], None),
        ([], None),
    ],
)
def test_the_mean_at_the_end_is_that_of_the_last_tenth(place, values, mean) -> None:
    write(place.tracking, "pretrain", "loss", values)
    assert end_mean(place.tracking, "pretrain", "loss") == mean


def test_the_control_takes_as_long_as_rl_took(place) -> None:
    """160 steps of fine-tuning took 80 seconds and RL 18.6: 37 steps, and not the 160 of
    fine-tuning.
    """
    write(place.tracking, "sft", "seconds", [0.5] * 160)
    write(place.tracking, "rl", "seconds", [0.775] * 24)
    control = Control(load_recipe(MINIATURE, []))
    assert training_seconds(place.tracking, "rl") == pytest.approx(18.6)
    assert control.steps(place) == 37
    write(place.tracking, "rl", "seconds", [9.0] * 24)
    assert control.steps(place) == 37  # decided once: a resumed run does the same work
    place.tracking.begin("control", "another key")
    assert control.steps(place) == 432  # another attempt decides anew


def test_without_times_the_control_is_as_long_as_fine_tuning(place) -> None:
    assert Control(load_recipe(MINIATURE, [])).steps(place) == 160


def test_the_control_goes_on_with_demonstrations_that_were_not_seen() -> None:
    control = Control(load_recipe(MINIATURE, []))
    assert control.first == 160 * 64
    assert control.start == "sft" and not control.main


def test_rl_runs_on_the_first_process_alone_where_layers_are_spread() -> None:
    stages = {stage.name: stage for stage in load_recipe(MINIATURE, []).run_stages()}
    assert stages["rl"].together(Layout(data=2)) and not stages["rl"].together(Layout(pipeline=2))
    for name in ("pretrain", "sft", "control"):
        assert stages[name].together(Layout(pipeline=2))
    for name in ("data", "tokenizer", "evaluate", "export"):
        assert not stages[name].together(Layout(data=2))


def test_an_estimate_grows_with_what_it_counts() -> None:
    """Pretraining's is exact in tokens; that of RL counts every answer."""
    stages = {stage.name: stage for stage in load_recipe(MINIATURE, []).run_stages()}
    assert stages["pretrain"].seconds(1e-3) == pytest.approx(200 * 1024 * 1e-3)
    doubled = load_recipe(MINIATURE, ["rl.samples=16", "sft.steps=320"]).run_stages()
    more = {stage.name: stage for stage in doubled}
    for name in ("rl", "sft"):
        assert more[name].seconds(1e-3) == pytest.approx(2 * stages[name].seconds(1e-3)) != 0


def test_a_checkpoint_fills_the_model_it_belongs_to(tmp_path: Path) -> None:
    """Tensor by tensor; one of another model is refused by the name of a tensor."""
    model = Deepseek(TINY).initialise(1)
    tensors = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    save_checkpoint(tmp_path, Checkpoint(1, {"model": tensors}, {}))
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    fill(model, checkpoint)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in tensors.items())
    other = Deepseek(TINY.model_copy(update={"num_hidden_layers": 3}))
    with pytest.raises(Failed, match=r"another model's: model\.layers\.2\.eh_proj"):
        fill(other, checkpoint)
