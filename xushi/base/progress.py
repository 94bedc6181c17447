"""Progress on standard error: a bar in a terminal, elsewhere one line every 15 seconds."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 15.0


class StepProgress:
    """Progress of a stage from step `start` to `total`. Use it as a context manager.

    With `shown` False it prints nothing: only rank 0 of several processes reports.
    """

    def __init__(self, stage: str, total: int, start: int = 0, shown: bool = True) -> None:
        self.stage = stage
        self.total = total
        self.first = start
        self.shown = shown
        self._began = time.monotonic()
        self._last_line = self._began
        self._bar: Progress | None = None
        if shown and sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description:<10}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(stage, total=total, completed=start, note="")

    def __enter__(self) -> "StepProgress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, note: str) -> None:
        """Report that `step` steps are done. `note` is short, for example the loss."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, note=note)
            return
        now = time.monotonic()
        if not self.shown:
            return
        if now - self._last_line < SECONDS_BETWEEN_LINES and step < self.total:
            return
        self._last_line = now
        done = step - self.first
        left = (now - self._began) / max(done, 1) * (self.total - step)
        print(
            f"{self.stage:<10} {step}/{self.total}  {note}  {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )


def say(text: str) -> None:
    """Print a line for the user on standard error."""
    print(text, file=sys.stderr, flush=True)
