"""File locks between processes. A lock goes with the process that holds it, however that ends."""

import contextlib
import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from xushi.base.progress import say

SECONDS_OF_SILENCE = 1.0  # a longer wait for another process is told


@contextlib.contextmanager
def exclusive(path: Path, waiting: str | None = None) -> Iterator[bool]:
    """Hold the lock file `path`, made if missing; whether it is held.

    Another holder is waited for where `waiting` says what to tell the user after a second. False
    where there is another holder and no `waiting`, or where the file was removed meanwhile.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield _lock(descriptor, waiting) and _is_at(descriptor, path)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def shared(path: Path) -> Iterator[bool]:
    """Hold the lock file `path` beside other holders that share it; False where it is missing."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield _is_at(descriptor, path)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, waiting: str | None) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if waiting is None:
            return False
        told = threading.Timer(SECONDS_OF_SILENCE, say, [waiting])
        told.start()
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        finally:
            told.cancel()
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one that `path` names."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
