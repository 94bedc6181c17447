"""How much time loading data and keeping records take, compared with the training steps.

    python bench/loop_overhead.py RUN [--steps N] [--set KEY=VALUE]...

RUN is the directory of a finished run. Its corpus and recipe are used; nothing in it changes. The
program pretrains new weights for N steps. It prints the time spent in making batches, in hashing
them, and in writing the tracking store and its JSON lines. The last line is JSON.
"""

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from xushi.base.allocator import keep_freed_memory
from xushi.base.machine import inspect
from xushi.base.tracking import Tracking
from xushi.data import batch_hash
from xushi.model import Batch
from xushi.run.place import RunPlace
from xushi.run.recipe import load_recipe
from xushi.run.stages.pretrain import Pretrain
from xushi.train import LanguageModelStep, StepResult, Training, TrainingState

SPENT: dict[str, float] = defaultdict(float)


@contextmanager
def timed(name: str) -> Iterator[None]:
    """Add the time spent inside to SPENT[name]."""
    began = time.perf_counter()
    try:
        yield
    finally:
        SPENT[name] += time.perf_counter() - began


class TimedTracking(Tracking):
    """A tracking store that measures the time of its writes."""

    def batch(self, *arguments: Any) -> None:
        with timed("records"):
            super().batch(*arguments)

    def metrics(self, *arguments: Any) -> None:
        with timed("records"):
            super().metrics(*arguments)


class TimedStep(LanguageModelStep):
    """A step that measures its whole time, and that of hashing by hashing its batch once more."""

    def take(self, state: TrainingState, number: int, phase: Callable[[str], None]) -> StepResult:
        with timed("steps"):
            result = super().take(state, number, phase)
        with timed("hashing"):
            batch_hash(result.batch)
        return result


def main(
    run: Path,
    steps: int = 200,
    assignments: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE")] = None,
) -> None:
    """Time what a run does besides its training steps."""
    torch.set_num_threads(inspect().usable_cores)
    keep_freed_memory()
    recipe = load_recipe(
        run / "recipe.toml",
        [*(assignments or []), f"pretrain.steps={steps}", f"pretrain.checkpoint_every={steps}"],
    )
    with tempfile.TemporaryDirectory() as aside:
        tracking = TimedTracking(Path(aside) / "tracking.sqlite")
        place = RunPlace(run, tracking)
        stage = Pretrain(recipe)
        data = stage.data(place)

        def batches(cursor: int, count: int) -> Batch:
            with timed("loading"):
                return data.batches(cursor, count)

        step = TimedStep(stage.config, replace(data, batches=batches))
        model = stage.trained_model(place, None)
        Training(stage.name, model, step, Path(aside) / "saved", tracking).run()
        tracking.close()
    report(steps)


def report(steps: int) -> None:
    """Print the shares of the arithmetic of a step."""
    others = {name: SPENT[name] for name in ("loading", "hashing", "records")}
    arithmetic = SPENT["steps"] - SPENT["loading"] - SPENT["hashing"]
    for name, seconds in others.items():
        print(
            f"{name:<9}{1e3 * seconds / steps:8.2f} ms a step, {seconds / arithmetic:6.2%} of "
            "its arithmetic"
        )
    share = sum(others.values()) / arithmetic
    print(f"together {share:.2%} of {1e3 * arithmetic / steps:.0f} ms")
    print(json.dumps({"overhead_share": share, "step_seconds": arithmetic / steps}))


if __name__ == "__main__":
    typer.run(main)
