"""A run's metrics on other programs' pages: TensorBoard, Weights & Biases (offline) and trackio.

Read from the tracking store, not sent by the training loop: a run that goes on, one that has ended
and one of last month are shown alike, and no step waits for anybody. Stages stand side by side,
each counting its own steps.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from xushi.base.errors import BadInput
from xushi.base.progress import say
from xushi.base.tracking import Tracking

SECONDS_BETWEEN = 5.0  # looks at a run that goes on
PLACES = {
    "tensorboard": "torch.utils.tensorboard",
    "wandb": "wandb",
    "trackio": "trackio",
}  # and what is imported

Write = Callable[[str, int, dict[str, float]], None]  # stage, step, values by name


def export_metrics(
    directory: Path, place: str, out: Path | None = None, follow: bool = False
) -> int:
    """Write all metrics of a run to `place`, one of `PLACES`, and return how many numbers that
    were.

    Files go to `out`, by default a directory of that name in the run's. With `follow` this goes on
    until Ctrl-C, with what is written meanwhile. No run, another place, or a package that is not
    installed is a `XushiError`.
    """
    if place not in PLACES:
        raise BadInput(
            f"metrics cannot be exported to {place!r}", f"give one of {', '.join(PLACES)}"
        )
    if not (directory / "tracking.sqlite").is_file():
        raise BadInput(f"{directory} is no run directory", "give one, such as runs/demo")
    if place == "trackio":
        os.environ["TRACKIO_DIR"] = str(
            (out or directory / place).resolve()
        )  # read when the package is imported
    try:
        package = import_module(PLACES[place])
    except ImportError as error:
        raise BadInput(
            f"{place} is not installed ({error})", f"pip install 'xushi[{place}]'"
        ) from None
    out = out or directory / place
    out.mkdir(parents=True, exist_ok=True)
    written, last = 0, 0
    tracking = Tracking(directory / "tracking.sqlite")
    try:
        with _OPEN[place](package, directory.name, out) as write:
            while True:
                for number, stage, step, values in tracking.steps_after(last):
                    write(stage, step, values)
                    written, last = written + len(values), number
                if not follow:
                    break
                time.sleep(SECONDS_BETWEEN)
    except KeyboardInterrupt:
        pass
    finally:
        tracking.close()
    say(f"{written:,} numbers of {directory} are in {out}")
    return written


@contextmanager
def _tensorboard(package: Any, name: str, out: Path) -> Iterator[Write]:
    writers: dict[str, Any] = {}

    def write(stage: str, step: int, values: dict[str, float]) -> None:
        if stage not in writers:
            writers[stage] = package.SummaryWriter(str(out / f"{name}-{stage}"))
        for key, value in values.items():
            writers[stage].add_scalar(key, value, step)
        writers[stage].flush()

    try:
        yield write
    finally:
        for writer in writers.values():
            writer.close()


@contextmanager
def _wandb(package: Any, name: str, out: Path) -> Iterator[Write]:
    stages: set[str] = set()
    with package.init(project="xushi", name=name, dir=out, mode="offline") as run:

        def write(stage: str, step: int, values: dict[str, float]) -> None:
            if (
                stage not in stages
            ):  # a step of its own for each stage, which may go back after a kill
                run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
                stages.add(stage)
            run.log(
                {f"{stage}/step": step} | {f"{stage}/{key}": value for key, value in values.items()}
            )

        yield write


@contextmanager
def _trackio(package: Any, name: str, out: Path) -> Iterator[Write]:
    current = ""

    def write(stage: str, step: int, values: dict[str, float]) -> None:
        nonlocal current
        if stage != current:
            if current:
                package.finish()
            package.init(project="xushi", name=f"{name}-{stage}", resume="allow")
            current = stage
        package.log(values, step=step)

    try:
        yield write
    finally:
        if current:
            package.finish()


_OPEN = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
