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
from xushi.run.building import training_inputs
from xushi.run.context import RunContext

from xushi.base.allocator import keep_freed_memory
from xushi.base.machine import inspect
from xushi.base.tracking import Tracking
from xushi.run.recipe import load_recipe
from xushi.train import Data, loop, train

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
        context = RunContext(run, recipe, tracking)
        inputs = training_inputs(context, "pretrain")
        for owner, name, label in (
            (Data, "share", "loading"),
            (loop, "joined_hash", "hashing"),
            (Tracking, "batch", "records"),
            (Tracking, "metrics", "records"),
            (loop.StepProgress, "update", "progress"),
        ):
            setattr(owner, name, timed(label, getattr(owner, name)))
        loop.training_step = timed("steps", loop.training_step)
        train(
            "pretrain",
            context.trained_model(None),
            inputs.config,
            inputs.data,
            Path(aside) / "saved",
            tracking,
        )
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
