"""Artifacts by content: what a stage makes is kept under the hash of its inputs, for all runs.

    XUSHI_CACHE/artifacts/KIND-HASH/manifest.json  size and SHA-256 of every file
    XUSHI_CACHE/artifacts/KIND-HASH/files/         what was made, read-only
    XUSHI_CACHE/artifacts/KIND-HASH/in-use         a lock that runs share while they take the files;
                                                   its time is that of the last use
    XUSHI_CACHE/artifacts/KIND-HASH.lock           the lock under which the artifact is made
    XUSHI_CACHE/artifacts/.KIND-HASH.partial/      an artifact that is being made
    XUSHI_CACHE/kernels/                           compiled kernels (ops.native)

A run gets hard links, or copies on another file system: it can be moved, and it outlives the cache.
Not here: anything trained or evaluated, which is never taken from another run.
"""

import contextlib
import errno
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from xushi.base import locks
from xushi.base.errors import Failed, XushiError
from xushi.base.files import (
    aside_of,
    directory_in_place,
    flush_tree,
    fsync_path,
    make_directory,
    read_json,
    sha256_file,
    write_json,
)
from xushi.base.progress import say

_KEY = re.compile(r"([a-z]+)-[0-9a-f]{16,64}")
_MISSING = "it is missing"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
# What a file system answers that has no hard links, or allows none to this file.
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS)


class Entry(NamedTuple):
    """An artifact or a compiled library. `used`: the time of its last use, seconds since 1970."""

    kind: str
    key: str
    bytes: int
    used: float
    path: Path


class CacheUnusable(Failed):
    """The cache is full, or cannot be read or written."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem, "set XUSHI_CACHE to a directory with room that can be written")


def cache_directory() -> Path:
    """Where artifacts and compiled kernels are kept: XUSHI_CACHE, or xushi in the user's cache
    directory. RuntimeError where there is no home directory.
    """
    if chosen := os.environ.get("XUSHI_CACHE"):
        return Path(chosen)
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches) / "xushi"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "xushi"


class Artifacts:
    """The cache in `root` (None: `cache_directory()`), shared by all processes of a user."""

    def __init__(self, root: Path | None = None) -> None:
        self._root = root

    def obtain(self, key: str, make: Callable[[Path], None], target: Path) -> bool:
        """Put the artifact of `key` into the directory `target`, replacing what is in it; whether
        `make` had to run.

        `key` is KIND-HASH, with the hash of everything that `make` reads. `make` fills an empty
        directory. It runs once, even if several processes need the artifact at the same time: the
        others wait. If `make` fails or is killed, what it has written is not used. A damaged
        artifact is reported and made again. If the cache cannot be used, a message says so and
        `target` is made without it.
        """
        try:
            return self._obtain(key, make, target)
        except CacheUnusable as error:
            say(f"the cache is not used ({error.problem}): {_kind(key)} is made for this run alone")
        with directory_in_place(target) as aside:
            make(aside)
        return True

    def _obtain(self, key: str, make: Callable[[Path], None], target: Path) -> bool:
        with self._held(key, make) as (files, made):
            _take(files, target)
            return made

    @contextlib.contextmanager
    def reading(self, key: str, make: Callable[[Path], None]) -> Iterator[Path]:
        """The directory of an artifact itself, to be read while the context lasts; else as
        `obtain`. Where the cache cannot be used, the directory is a temporary one.
        """
        with contextlib.ExitStack() as stack:
            try:
                files, _ = stack.enter_context(self._held(key, make))
            except CacheUnusable as error:
                say(f"the cache is not used ({error.problem}): {_kind(key)} is made for now alone")
                files = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="xushi-")))
                make(files)
            yield files

    @contextlib.contextmanager
    def _held(self, key: str, make: Callable[[Path], None]) -> Iterator[tuple[Path, bool]]:
        """Hold an artifact against removal: its files, and whether `make` had to run."""
        assert _KEY.fullmatch(key), f"{key!r} is not KIND-HASH"
        with _cache_errors():
            place = self._place()
            make_directory(place)
        waiting = f"another process makes the same {_kind(key)}: waiting for it"
        while True:
            with _using(place / key) as fault:
                if not fault:
                    yield place / key / "files", False
                    return
            with _lock_of(place, key, waiting) as locked, contextlib.ExitStack() as stack:
                if not locked:  # another process removed the artifact and its lock
                    continue
                fault = stack.enter_context(_using(place / key))
                if fault:
                    if fault != _MISSING:
                        say(f"{place / key} is damaged ({fault}): it is made again")
                    _make(place, key, make)
                    if unread := stack.enter_context(_using(place / key)):
                        raise CacheUnusable(f"{place / key} cannot be read back: {unread}")
                yield place / key / "files", bool(fault)
                return

    def entries(self) -> list[Entry]:
        """What the cache holds, the last used first."""
        with _cache_errors():
            return sorted(self._entries(), key=lambda entry: entry.used, reverse=True)

    def _entries(self) -> Iterator[Entry]:
        for path in [*self._place().glob("*"), *self._place().parent.glob("kernels/*.so")]:
            library = path.suffix == ".so"
            if library or (path.is_dir() and _KEY.fullmatch(path.name)):
                with contextlib.suppress(OSError):  # another process removes it
                    mark = path if library or not (path / "in-use").exists() else path / "in-use"
                    files = [path] if library else [p for p in path.rglob("*") if p.is_file()]
                    size = sum(file.stat().st_size for file in files)
                    used = mark.stat().st_mtime
                    yield Entry(_kind(path.name), path.stem, size, used, path)

    def empty(self, older_than_days: float = 0.0) -> list[Entry]:
        """Remove what was not used for so many days, but for what is being made or in use; what was
        removed. A process that runs compiled kernels keeps them in memory.
        """
        before = time.time() - older_than_days * 24 * 3600
        removed = []
        for entry in [entry for entry in self.entries() if entry.used <= before]:
            with _cache_errors():
                if entry.kind == "kernels":
                    entry.path.with_suffix(".sha256").unlink(missing_ok=True)
                    entry.path.unlink(missing_ok=True)
                elif not _remove(self._place(), entry.key):
                    continue
            removed.append(entry)
        with _cache_errors():
            _sweep(self._place())
        return removed

    def _place(self) -> Path:
        return (self._root or cache_directory()) / "artifacts"


def cache_table(entries: Sequence[Entry]) -> str:
    """Lines of kind, bytes, day of the last use and key, and the total."""
    lines = []
    for entry in entries:
        day = time.strftime("%Y-%m-%d", time.localtime(entry.used))
        lines.append(f"{entry.kind:<12}{entry.bytes:>16,}  {day}  {entry.key}")
    return "\n".join([*lines, f"{'total':<12}{sum(entry.bytes for entry in entries):>16,}"])


def link_tree(source: Path, target: Path) -> None:
    """Make `target` a directory with the files of `source`: hard links, or copies where the file
    system has none. `target` is replaced by one rename.
    """
    with directory_in_place(target) as aside:
        for directory, _, names in os.walk(source, onerror=_raise):
            inside = aside / Path(directory).relative_to(source)
            inside.mkdir(exist_ok=True)
            for name in names:
                try:
                    os.link(Path(directory) / name, inside / name)
                except OSError as error:
                    if error.errno not in _NO_LINK:
                        raise
                    shutil.copyfile(Path(directory) / name, inside / name)


def _raise(error: OSError) -> None:
    raise error


def _take(source: Path, target: Path) -> None:
    try:
        link_tree(source, target)
    except FileNotFoundError as error:  # the cache was removed by hand
        raise CacheUnusable(str(error)) from None


def _kind(key: str) -> str:
    return key.partition("-")[0]


@contextlib.contextmanager
def _cache_errors() -> Iterator[None]:
    """Turn what the system says of the cache directory into `CacheUnusable`."""
    try:
        yield
    except XushiError as error:
        raise CacheUnusable(error.problem) from None
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        raise CacheUnusable(str(error)) from None


@contextlib.contextmanager
def _lock_of(place: Path, key: str, waiting: str | None = None) -> Iterator[bool]:
    """Hold the lock under which `key` is made; whether it is held."""
    with contextlib.ExitStack() as stack:
        with _cache_errors():
            held = stack.enter_context(locks.exclusive(place / f"{key}.lock", waiting))
        yield held


@contextlib.contextmanager
def _using(path: Path) -> Iterator[str]:
    """Hold the artifact in `path` against removal; what is wrong with it, or nothing."""
    with contextlib.ExitStack() as stack:
        with _cache_errors():
            held = stack.enter_context(locks.shared(path / "in-use"))
        fault = _fault(path) if held or path.exists() else _MISSING
        if not fault:
            with contextlib.suppress(OSError):  # a read-only cache keeps no time of use
                os.utime(path / "in-use")
        yield fault


def _fault(path: Path) -> str:
    """What is wrong with the artifact in `path`, or nothing."""
    try:
        manifest = read_json(path / "manifest.json", "")["files"]
        found = _files(path / "files")
        if found.keys() != manifest.keys() or not (path / "in-use").exists():
            return "it does not hold the files of its manifest"
        for name, file in found.items():
            if file.stat().st_size != manifest[name]["size"]:
                return f"{name} has another size"
            if sha256_file(file) != manifest[name]["sha256"]:
                return f"{name} has other bytes"
    except (OSError, XushiError, KeyError, TypeError, AttributeError) as error:
        problem = error.problem if isinstance(error, XushiError) else repr(error)
        return f"it cannot be read: {problem}"
    return ""


def _files(directory: Path) -> dict[str, Path]:
    """The files in `directory` by their posix paths inside it."""
    return {
        path.relative_to(directory).as_posix(): path
        for path in sorted(directory.rglob("*"))
        if not path.is_dir()
    }


def _make(place: Path, key: str, make: Callable[[Path], None]) -> None:
    """Make the artifact aside and rename it into place. The caller holds the key's lock."""
    aside = aside_of(place / key)
    with _cache_errors():
        _sweep(place)
        shutil.rmtree(aside, ignore_errors=True)
        (aside / "files").mkdir(parents=True)
    try:
        try:
            make(aside / "files")
        except Exception as error:
            if full := _no_room(error):
                raise CacheUnusable(f"{place}: {full}") from None
            raise
        with _cache_errors():
            _seal(aside)
            _discard(place / key)
            aside.rename(place / key)
            fsync_path(place)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _no_room(error: BaseException | None) -> str:
    """The system's words where `error` comes from a full or read-only file system, or nothing."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            return error.strerror or str(error)
        if "No space left on device" in str(error):
            return "No space left on device"
        error = error.__context__
    return ""


def _seal(aside: Path) -> None:
    """Make the files read-only, write the manifest and flush everything."""
    files = _files(aside / "files")
    assert all(path.is_file() and not path.is_symlink() for path in files.values())
    for path in files.values():
        path.chmod(0o444)
    sizes = {
        name: {"size": path.stat().st_size, "sha256": sha256_file(path)}
        for name, path in files.items()
    }
    (aside / "in-use").touch()
    write_json(aside / "manifest.json", {"files": sizes})
    flush_tree(aside)


def _remove(place: Path, key: str) -> bool:
    """Remove an artifact that no process makes or uses; whether it was removed."""
    with _lock_of(place, key) as locked:
        if not locked or not (place / key).exists():  # another process removed it
            return False
        with locks.exclusive(place / key / "in-use") as unused:
            if unused:
                _discard(place / key)
        return unused


def _discard(path: Path) -> None:
    """Remove an artifact, if there is one, by a rename first: no half of it keeps its name."""
    gone = path.with_name(f".{path.name}.old")
    shutil.rmtree(gone, ignore_errors=True)
    if path.exists():
        path.rename(gone)
        shutil.rmtree(gone)


def _sweep(place: Path) -> None:
    """Remove what killed processes left of keys that no living process makes."""
    for path in [*place.glob(".*.partial"), *place.glob(".*.old"), *place.glob("*.lock")]:
        key = path.stem.removeprefix(".")
        if _KEY.fullmatch(key) and not (path.suffix == ".lock" and (place / key).exists()):
            with _lock_of(place, key) as locked:
                if locked:
                    shutil.rmtree(aside_of(place / key), ignore_errors=True)
                    shutil.rmtree(place / f".{key}.old", ignore_errors=True)
                    if not (place / key).exists():
                        (place / f"{key}.lock").unlink()
