"""Files that are either whole or missing: atomic writes, directories renamed into place, hashes."""

import contextlib
import errno
import glob
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xushi.base.errors import BadInput, Failed

SECONDS_OF_A_WRITE = 60.0  # a partial file that is older belongs to no writer of another machine


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, a quota or a read-only directory into a `Failed` that names `path`, and a
    path that cannot exist (it is too long, or leads through a file) into a `BadInput`.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Failed(*_full(path)) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise Failed(
                f"{path} cannot be written: {error.strerror}",
                "choose a directory you may write to",
            ) from None
        if error.errno in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG):
            at = error.filename or path
            raise BadInput(
                f"{path} cannot be written: {error.strerror} ({at})", "choose another path"
            ) from None
        raise
    except Exception as error:
        # safetensors wraps the system's error in one of its own.
        if "No space left on device" in str(error):
            raise Failed(*_full(path)) from None
        raise


def _full(path: Path) -> tuple[str, str]:
    return (
        f"no space left on the disk that holds {path}",
        "free some space and run the same command again: it goes on from the last checkpoint",
    )


def fsync_path(path: Path) -> None:
    """Flush a file, or a directory's list of entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Make a directory and the missing ones above it. Their entries are flushed: after a power loss
    none of them is missing above a file that was flushed.
    """
    missing = [path, *path.parents]
    made = list(itertools.takewhile(lambda directory: not directory.exists(), missing))
    path.mkdir(parents=True, exist_ok=True)
    for directory in reversed(made):
        fsync_path(directory.parent)


def flush_tree(directory: Path) -> None:
    """Flush every file and every directory inside `directory`, and its own entry list."""
    for path in directory.rglob("*"):
        if path.is_dir() or path.is_file():
            fsync_path(path)
    fsync_path(directory)


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write `path` whole: after a kill, and for a reader at any time, it has its old content or the
    new. What a killed writer of the same path left beside it is removed.
    """
    data = content.encode() if isinstance(content, str) else content
    with disk_errors(path):
        make_directory(path.parent)
        remove_partials(path)
        aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            with open(aside, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        fsync_path(path.parent)


def remove_partials(path: Path, age: float = SECONDS_OF_A_WRITE) -> None:
    """Remove the files that killed writers of `path` left beside it: `.NAME.PID.partial`, `age`
    seconds old or more, whose process is gone.
    """
    for partial in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        number = partial.name.removeprefix(f".{path.name}.").removesuffix(".partial")
        with contextlib.suppress(OSError):  # removed by another writer
            old = time.time() - partial.stat().st_mtime >= age
            if number.isdecimal() and old and not _is_running(int(number)):
                partial.unlink()


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it runs, and belongs to another user
        return True
    return True


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of sorted, indented JSON."""
    write_atomic(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in a file. A missing, unreadable or damaged file is a `BadInput` with
    `remedy`; where a file may be missing, ask before.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist", remedy) from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path} cannot be read: {error}", remedy) from None
    if not isinstance(value, dict):
        raise BadInput(f"{path} cannot be read: it is not a JSON object", remedy)
    return value


def aside_of(path: Path) -> Path:
    """Where `directory_in_place` fills what becomes `path`."""
    return path.with_name(f".{path.name}.partial")


@contextlib.contextmanager
def directory_in_place(path: Path) -> Iterator[Path]:
    """Give a directory to fill; on success it replaces `path` by rename, on any failure it is
    removed.

    Everything in it is flushed before the rename, nested directories too. A kill between moving the
    old directory away and renaming the new one leaves no `path`: callers make a missing directory
    again, and the old one comes back first. Only one process at a time may fill a path. What a
    killed one left is removed by the next.
    """
    with disk_errors(path):
        make_directory(path.parent)
        aside, old = aside_of(path), path.with_name(f".{path.name}.old")
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            yield aside
            flush_tree(aside)
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)
                path.rename(old)
            aside.rename(path)
            shutil.rmtree(old, ignore_errors=True)
            fsync_path(path.parent)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in chunks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a JSON-able value in its canonical form (sorted keys, no spaces)."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()
