"""Copy a run's metrics to TensorBoard, Weights & Biases (offline) or trackio.

The metrics are read from the tracking store; the training loop sends nothing. So a current run and
an old one are exported alike, and no training step waits for another program. Each stage counts its
own steps.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from xushi.base.errors import BadInput
from xushi.base.files import disk_errors
from xushi.base.progress import say
from xushi.base.tracking import Tracking
from xushi.run.directory import check_format

SECONDS_BETWEEN = 5.0  # with `follow`: how often new metrics are looked for
# Where metrics can be exported to, and the module that is imported for it.
PLACES = {
    "tensorboard": "torch.utils.tensorboard",
    "wandb": "wandb",
    "trackio": "trackio",
}

Write = Callable[[str, int, dict[str, float]], None]  # stage, step, values by name


def export_metrics(
    directory: Path, place: str, out: Path | None = None, follow: bool = False
) -> int:
    """Write all metrics of the run in `directory` to `place`, one of `PLACES`.

    Files go to `out`, by default a directory named after `place` in the run directory. With
    `follow` it keeps writing new metrics until Ctrl-C. Returns how many numbers were written. A
    missing run, an unknown place and a package that is not installed are a `XushiError`.
    """
    if place not in PLACES:
        raise BadInput(
            f"metrics cannot be exported to {place!r}", f"give one of {', '.join(PLACES)}"
        )
    if not (directory / "tracking.sqlite").is_file():
        raise BadInput(f"{directory} is not a run directory", "give one, such as runs/demo")
    check_format(directory)
    out = out or directory / place
    package = _package(place, out)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    tracking = Tracking(directory / "tracking.sqlite")
    try:
        with _OPEN[place](package, directory.name, out) as write:
            written = _copy(tracking, write, follow)
    finally:
        tracking.close()
    say(f"{written:,} numbers of {directory} are in {out}")
    return written


def _package(place: str, out: Path) -> Any:
    if place == "trackio":
        os.environ["TRACKIO_DIR"] = str(out.resolve())  # trackio reads it when it is imported
    try:
        return import_module(PLACES[place])
    except ImportError as error:
        raise BadInput(
            f"{place} is not installed ({error})", f"pip install 'xushi[{place}]'"
        ) from None


def _copy(tracking: Tracking, write: Write, follow: bool) -> int:
    """Write what the store holds, with `follow` until Ctrl-C; returns how many numbers."""
    written = 0
    last = 0
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            for number, stage, step, values in tracking.steps_after(last):
                write(stage, step, values)
                written += len(values)
                last = number
            if not follow:
                break
            time.sleep(SECONDS_BETWEEN)
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
            if stage not in stages:
                # Each stage has a step axis of its own. After a kill its steps may repeat, which
                # wandb's built-in step does not allow.
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
