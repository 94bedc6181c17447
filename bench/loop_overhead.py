"""How much time loading data and keeping records take, compared with the training steps.

    python bench/loop_overhead.py RUN [--steps N] [--set KEY=VALUE]...

RUN is the directory of a finished run. Its corpus and recipe are used; nothing in it changes. The
program pretrains new weights for N steps with everything that a run does. It prints the time spent
in making batches, in hashing them, and in writing the tracking store and its JSON lines. The last
line is JSON.
"""

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from xushi.base.allocator import keep_freed_memory
from xushi.base.machine import inspect
from xushi.base.tracking import Tracking
from xushi.run.place import RunPlace
from xushi.run.recipe import load_recipe
from xushi.run.stages.pretrain import Pretrain
from xushi.train import Data, Training, language, training

SPENT: dict[str, float] = defaultdict(float)


def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, with its time added to SPENT[name]."""

    def call(*arguments: Any, **settings: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*arguments, **settings)
        finally:
            SPENT[name] += time.perf_counter() - began

    return call


def main(
    run: Path,
    steps: int = 200,
    assignments: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE")] = None,
) -> None:
    """Time what a run does beside its training steps."""
    torch.set_num_threads(inspect().usable_cores)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as aside:
        tracking = Tracking(Path(aside) / "tracking.sqlite")
        recipe = load_recipe(
            run / "recipe.toml",
            [*(assignments or []), f"pretrain.steps={steps}", f"pretrain.checkpoint_every={steps}"],
        )
        stage = Pretrain(recipe)
        place = RunPlace(run, tracking)
        for owner, name, label in (
            (Data, "share", "loading"),
            (language, "joined_hash", "hashing"),
            (Tracking, "batch", "records"),
            (Tracking, "metrics", "records"),
            (training.StepProgress, "update", "progress"),
        ):
            setattr(owner, name, timed(label, getattr(owner, name)))
        language.training_step = timed("steps", language.training_step)
        model = stage.trained_model(place, None)
        Training("pretrain", model, stage.step(place), Path(aside) / "saved", tracking).run()
        tracking.close()
    report(steps)


def report(steps: int) -> None:
    others = {name: seconds for name, seconds in SPENT.items() if name != "steps"}
    for name, seconds in others.items():
        print(
            f"{name:<9}{1e3 * seconds / steps:8.2f} ms a step, "
            f"{seconds / SPENT['steps']:6.2%} of the step"
        )
    share = sum(others.values()) / SPENT["steps"]
    print(f"together {share:.2%} of a step of {1e3 * SPENT['steps'] / steps:.0f} ms")
    print(json.dumps({"overhead_share": share, "step_seconds": SPENT["steps"] / steps}))


if __name__ == "__main__":
    typer.run(main)
