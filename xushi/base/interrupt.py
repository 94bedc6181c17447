"""Ctrl-C inside a training loop: the step is finished and saved first. A second Ctrl-C does not
wait.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class StopRequest:
    """Whether somebody asked to stop."""

    def __init__(self) -> None:
        self.requested = False


@contextlib.contextmanager
def finish_step_first() -> Iterator[StopRequest]:
    """While inside, the first SIGINT or SIGTERM only sets `requested`; the loop looks at it after
    each step.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may handle signals
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
