"""Files that are either whole or not there: atomic writes, directories renamed into place, hashes."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xushi.base.errors import BadInput, Failed


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, a quota or a read-only place into a `XushiError` that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Failed(*_full(path)) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise Failed(
                f"{path} cannot be written: {error.strerror}",
                "choose a place you may write to",
            ) from None
        raise
    except Exception as error:
        if "No space left on device" in str(
            error
        ):  # safetensors wraps the system's error in one of its own
            raise Failed(*_full(path)) from None
        raise


def _full(path: Path) -> tuple[str, str]:
    return (
        f"no space left on the disk that holds {path}",
        "free some space and run the same command again: it goes on from the last checkpoint",
    )


def fsync_path(path: Path) -> None:
    """Flush a file's or a directory's own entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write `path` so that a reader, or a kill, sees the old content or the new and nothing
    between.
    """
    data = content.encode() if isinstance(content, str) else content
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
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


@contextlib.contextmanager
def directory_in_place(path: Path) -> Iterator[Path]:
    """Give a directory to fill; on success it replaces `path` by rename, on any failure it is
    removed.

    A kill between removing the old directory and renaming the new one leaves neither half-written:
    the caller's marker (a manifest inside the directory) is what says that a directory counts.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.partial")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            yield aside
            for file in aside.rglob("*"):
                if file.is_file():
                    fsync_path(file)
            fsync_path(aside)
            if path.exists():
                old = path.with_name(f".{path.name}.old")
                shutil.rmtree(old, ignore_errors=True)
                path.rename(old)
                aside.rename(path)
                shutil.rmtree(old)
            else:
                aside.rename(path)
            fsync_path(path.parent)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a JSON-able value in its canonical form (sorted keys, no spaces)."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()
