"""What loading data and keeping records cost beside a training step.

    python bench/loop_overhead.py RUN [--steps N] [--set KEY=VALUE]...

RUN is a finished run's directory: its corpus and recipe are used, nothing in it is changed.
Pretrains for N steps from new weights with everything that a run does, and prints the share of the
time spent in making batches, hashing them, and writing the tracking store and its JSON lines. The
last line is JSON.
"""

import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from xushi.base.allocator import keep_freed_memory
from xushi.base.machine import inspect
from xushi.base.tracking import Tracking
from xushi.run.recipe import load_recipe
from xushi.run.building import training_inputs
from xushi.run.context import RunContext
from xushi.train import Data, loop, train

SPENT: dict[str, float] = defaultdict(float)


def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **settings: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*arguments, **settings)
        finally:
            SPENT[name] += time.perf_counter() - began

    return call


def main() -> None:
    words = sys.argv[1:]
    steps = int(words.pop(words.index("--steps") + 1)) if "--steps" in words else 200
    changes = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    torch.set_num_threads(inspect().usable_cores)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as aside:
        tracking = Tracking(Path(aside) / "tracking.sqlite")
        run = Path(words[0])
        recipe = load_recipe(
            run / "recipe.toml",
            [*changes, f"pretrain.steps={steps}", f"pretrain.checkpoint_every={steps}"],
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
    others = {name: seconds for name, seconds in SPENT.items() if name != "steps"}
    for name, seconds in others.items():
        print(
            f"{name:<9}{1e3 * seconds / steps:8.2f} ms a step, {seconds / SPENT['steps']:6.2%} of "
            "it"
        )
    share = sum(others.values()) / SPENT["steps"]
    print(f"together {share:.2%} of a step of {1e3 * SPENT['steps'] / steps:.0f} ms")
    print(json.dumps({"overhead_share": share, "step_seconds": SPENT["steps"] / steps}))


if __name__ == "__main__":
    main()
