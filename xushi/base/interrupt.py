"""Ctrl-C during training: the loop finishes its step and saves. A second Ctrl-C stops at once."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class StopRequest:
    """`requested` becomes True when the process gets SIGINT or SIGTERM."""

    def __init__(self) -> None:
        self.requested = False


@contextlib.contextmanager
def finish_step_first() -> Iterator[StopRequest]:
    """Inside this context the first SIGINT or SIGTERM only sets `requested`.

    The training loop checks it after each step. The second signal raises KeyboardInterrupt.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # Python allows signal handlers in the main thread only
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
