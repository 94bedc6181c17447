"""Read a run directory for the report: numbers, metrics, recipe and samples. Each may be missing.

Not for: writing anything into a run.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xushi.base.errors import BadInput, Failed
from xushi.base.files import read_json
from xushi.base.tracking import Tracking
from xushi.report.scales import Point
from xushi.run.directory import check_format


@dataclass(frozen=True)
class Run:
    """What one run recorded. `results` is flat; `samples` has lists under "before", "after" and
    "base".
    """

    directory: Path
    results: dict[str, Any]
    samples: dict[str, list[dict[str, Any]]]
    recipe: str
    tracking: Tracking | None

    def number(self, key: str) -> float | None:
        """A finite number from the results, else None."""
        value = self.results.get(key)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            return None
        return float(value)

    def text(self, key: str) -> str:
        """A non-empty string or a number from the results as text, else ""."""
        value = self.results.get(key)
        return "" if value is None or isinstance(value, bool) else str(value).strip()

    def written(self, key: str, write: Callable[[float], str]) -> str:
        """A finite number from the results as `write` puts it, else ""."""
        value = self.number(key)
        return "" if value is None else write(value)

    def series(self, stage: str, name: str) -> list[Point]:
        """(step, value) of a metric; empty if it was not written, or not by a stage of this run."""
        if self.tracking is None or not self.has_stage(stage):
            return []
        return [(float(step), value) for step, value in self.tracking.series(stage, name)]

    def names(self, stage: str) -> list[str]:
        """The metrics that a stage has written."""
        if self.tracking is None or not self.has_stage(stage):
            return []
        return self.tracking.names(stage)

    def has_stage(self, stage: str) -> bool:
        """Whether the results have the stage. A store also keeps what earlier recipes ran; without
        results, as in a run that goes on, all of it counts.
        """
        told = any(key.startswith("seconds.") for key in self.results)
        return not told or f"seconds.{stage}" in self.results

    def began(self) -> float | None:
        """Unix time of the first recorded event."""
        events = [] if self.tracking is None else self.tracking.events()
        return float(events[0]["time"]) if events else None

    def started_stages(self) -> list[str]:
        """The stages in the order in which they were started last."""
        events = [] if self.tracking is None else self.tracking.events(name="started")
        order: dict[str, None] = {}
        for event in events:
            order.pop(event["stage"], None)
            order[event["stage"]] = None
        return list(order)


@contextmanager
def open_run(directory: Path) -> Iterator[Run]:
    """Read a run directory. Raises `XushiError` if it holds no run or a file in it is damaged."""
    results = directory / "results.json"
    store = directory / "tracking.sqlite"
    if not results.is_file() and not store.is_file():
        raise BadInput(
            f"{directory} holds no run: neither results.json nor tracking.sqlite is there",
            "give the directory of a run, for example runs/demo, or start one with xushi run",
        )
    check_format(directory)
    tracking = Tracking(store) if store.is_file() else None
    try:
        recipe = directory / "recipe.toml"
        yield Run(
            directory,
            _read_object(results),
            _read_samples(directory / "samples.json"),
            recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else "",
            tracking,
        )
    finally:
        if tracking is not None:
            tracking.close()


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    return read_json(path, "run the same command again: it writes the file again")


def _read_samples(path: Path) -> dict[str, list[dict[str, Any]]]:
    samples = _read_object(path)
    for name, entries in samples.items():
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise Failed(
                f"{path}: {name} is not a list of objects",
                "run the same command again: it writes the file again",
            )
    return samples
