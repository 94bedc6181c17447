"""Find the files of a source: in directories, by patterns, or in installed packages.

A directory is entered once, whatever links lead to it, and the directory of a run never. What is
not taken is counted with its reason. Not here: what is in the files (`sources`).
"""

import codecs
import contextlib
import errno
import fnmatch
import glob
import importlib.metadata
import itertools
import json
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from xushi.base.errors import BadInput
from xushi.data.config import SourceConfig, canonical_package
from xushi.data.left_out import NOT_TEXT, REASONS, TEXT_SUFFIXES, LeftOutList
from xushi.data.names import path_of, written

TABLE_SUFFIXES = {"jsonl": (".jsonl", ".ndjson"), "parquet": (".parquet",)}
OWNER = "run.json"  # what marks the directory of a run; see xushi.run.directory


class SourceFile(NamedTuple):
    """A file of a source. `meta` has its posix `path` inside the source and perhaps `package`.

    `named`: the source names this very file, which is read or refused and never left out.
    """

    path: Path
    meta: Mapping[str, Any]
    named: bool = False


@dataclass
class SourceFiles:
    """What a source has: its files in the order of their paths, and what is left out.

    `unmatched`: the patterns of `exclude` that match no path of the source. Those for packages are
    not told: they are written for other versions, too.
    """

    files: list[SourceFile] = field(default_factory=list)
    left_out: LeftOutList = field(default_factory=LeftOutList)
    unmatched: list[str] = field(default_factory=list)


class _Found(NamedTuple):
    """What one entry of `glob` leads to. Names inside the source begin at `root`."""

    meant: Literal["directory", "file", "pattern"]
    root: Path
    paths: list[Path]
    left_out: list[tuple[str, Path]]  # reason, path


def find_files(source: SourceConfig) -> SourceFiles:
    """The files of `source` in path order. Only the beginnings of files are read, to find text."""
    return _find_packages(source) if source.kind == "packages" else _find_paths(source)


def _find_paths(source: SourceConfig) -> SourceFiles:
    found = [_match(source, entry) for entry in source.globs]
    root = found[0].root
    if len(found) > 1:  # names begin at the directory that holds everything
        root = Path(os.path.commonpath([os.path.abspath(each.root) for each in found]))
    result = SourceFiles()
    matched: set[str] = set()
    for each in found if source.exclude else []:
        for _, path in each.left_out:
            matched |= _patterns_for(source, {_inside(root, path), _inside(each.root, path)})
    named = {os.path.realpath(os.path.expanduser(path_of(entry))) for entry in source.globs}
    for why, path in sorted({pair for each in found for pair in each.left_out}):
        if why != "hidden" or os.path.realpath(path) not in named:  # the source has it
            result.left_out.add(why, _inside(root, path))
    for path, entries in _distinct(found):
        name = _inside(root, path)
        meanings = {each.meant for each in entries}
        # The entry that says most about a file decides, whatever their order is.
        meant = next(each for each in ("file", "pattern", "directory") if each in meanings)
        inside = {_inside(each.root, path) for each in entries}
        if excluding := _patterns_for(source, {name} | inside):
            matched |= excluding
            result.left_out.add("excluded", name)
        elif (reason := _reason_against(source, path, meant)) is not None:
            result.left_out.add(reason, name)
        else:
            result.files.append(SourceFile(path, {"path": name}, meant == "file"))
    result.files.sort(key=lambda file: str(file.meta["path"]))
    result.unmatched = [pattern for pattern in source.exclude if pattern not in matched]
    return result


def _patterns_for(source: SourceConfig, names: Iterable[str]) -> set[str]:
    """The patterns of `exclude` that match one of the paths `names`, or a directory on it."""
    above: set[str] = set()
    for name in names:
        parts = name.split("/")
        above |= {"/".join(parts[:length]) for length in range(1, len(parts) + 1)}
    return {
        pattern
        for pattern in source.exclude
        if any(fnmatch.fnmatchcase(path, pattern.rstrip("/")) for path in above)
    }


def _inside(root: Path, path: Path) -> str:
    """The name inside the source. It does not depend on where the source is."""
    own = path if path.is_relative_to(root) else Path(os.path.abspath(path))
    return written(os.path.relpath(own, root))


def _distinct(found: Iterable[_Found]) -> list[tuple[Path, list[_Found]]]:
    """Each file once, by the path without links where it has been reached by that, too, and the
    entries that lead to it.
    """
    reached = [(path, each) for each in found for path in each.paths]
    reached.sort(key=lambda pair: (pair[0].is_symlink(), pair[0].as_posix()))
    by_file: dict[str, tuple[Path, list[_Found]]] = {}
    for path, each in reached:
        by_file.setdefault(os.path.realpath(path), (path, []))[1].append(each)
    return sorted(by_file.values(), key=lambda pair: pair[0])


def _reason_against(source: SourceConfig, path: Path, meant: str) -> str | None:
    """Why a file is left out, as far as its name and its beginning tell; None if it is not."""
    suffix = path.suffix.lower()
    if source.kind in TABLE_SUFFIXES:
        other = meant == "directory" and suffix not in TABLE_SUFFIXES[source.kind]
        return "other_kind" if other else None
    reason = NOT_TEXT.get(suffix)
    if meant != "file":
        return reason or _look_into(path, 0 if suffix in TEXT_SUFFIXES else 1 << 16)
    if reason is not None:
        raise refused(path, reason)
    return None


def refused(path: Path, reason: str) -> BadInput:
    """The error for a file that a source names and that is left out of directories."""
    remedy = REASONS[reason].remedy or "leave it out"
    for kind, suffixes in TABLE_SUFFIXES.items():
        if path.suffix.lower() in suffixes:
            remedy = f'name it in a recipe, in a source with kind = "{kind}" (docs/data.md)'
    return BadInput(f"{written(path)} is not read as text: it is a {REASONS[reason].one}", remedy)


def _look_into(path: Path, most: int) -> str | None:
    """What the first bytes tell against a file; with 0 only whether it may be read."""
    try:
        return reason_against_bytes(bytes_of(path, most), whole=False)
    except PermissionError:
        return "unreadable"


def reason_against_bytes(data: bytes, whole: bool = True) -> str | None:
    """Why bytes are not read as text; with `whole` False they are the beginning of a file."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "not_utf8"
    if b"\0" in data:
        return "binary"
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        if whole or error.end < len(data) or error.reason != "unexpected end of data":
            return "not_utf8"
    return None


def bytes_of(path: Path, most: int = -1) -> bytes:
    """The beginning of a file, or all of it. `PermissionError` is the caller's."""
    try:
        with open(path, "rb") as file:
            return file.read(most)
    except PermissionError:
        raise
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: Path | str, error: OSError) -> BadInput:
    """The error for a source's file that the system does not let us read."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return BadInput(
            f"{written(path)} was listed and is not there any more",
            "run the same command again; if it stays so, exclude it or install its package again",
        )
    remedy = "check the disk that it is on, or move it away"
    if isinstance(error, PermissionError):
        remedy = "check its permissions, or exclude it"
    return BadInput(f"{written(path)} cannot be read: {error.strerror}", remedy)


def _match(source: SourceConfig, entry: str) -> _Found:
    """What an entry of `glob` means: a directory, a file or a pattern."""
    pattern = os.path.expanduser(path_of(entry))
    path = Path(pattern)
    there = os.path.isdir(path) or os.path.isfile(path)
    root = path if there else _root_of(pattern)
    if source.kind == "text" and (run := run_above(root)):
        raise BadInput(
            f"{written(path)} is in the run directory {written(run)}, which is never text",
            "give the text that the run was made from",
        )
    if os.path.isfile(path):
        return _Found("file", path.parent, [path], [])
    found = _walk(path) if there else _by_pattern(pattern, root)
    if not found.paths and not found.left_out:
        raise BadInput(
            f"source {source.name}: no file matches {entry!r} (in {written(os.getcwd())})",
            "correct the path; ** matches directories at any depth, and a directory's name takes "
            "all text files under it",
        )
    return found


def _root_of(pattern: str) -> Path:
    """The directory that a pattern begins at."""
    parents = Path(pattern).parts[:-1]
    return Path(*itertools.takewhile(lambda part: not glob.has_magic(part), parents))


def _by_pattern(pattern: str, root: Path) -> _Found:
    """The files that match; the standard library's `**` would follow a loop of links for ever."""
    parts = Path(pattern).parts[len(root.parts) :]
    if "**" in parts:
        if not os.path.isdir(root):
            return _Found("pattern", root, [], [])
        found = _walk(root)
        matching = [path for path in found.paths if _fits(path.relative_to(root).parts, parts)]
        runs = [each for each in found.left_out if each[0] == "runs"]
        return _Found("pattern", root, matching, found.left_out if matching else runs)
    found = _Found("pattern", root, [], [])
    own_output = _own_output()
    for path in sorted(Path(match) for match in glob.glob(pattern) if os.path.isfile(match)):
        if _run_between(root, path) or (run_above(path) and not run_above(root)):
            found.left_out.append(("runs", path))
        elif _identity(path) in own_output:
            found.left_out.append(("special", path))
        else:
            found.paths.append(path)
    return found


def _fits(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether a path matches a pattern part by part; `**` stands for any number of parts."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return _fits(parts, pattern[1:]) or (bool(parts) and _fits(parts[1:], pattern))
    return (
        bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])
    )


def _walk(root: Path) -> _Found:
    """Regular files under `root` that are not hidden, and what is left out there.

    Links to directories are followed after all real directories were entered, so that a file has
    its real path where there is one. No directory is entered twice, and none that holds `root`.
    """
    found = _Found("directory", root, [], [])
    above = {_identity(parent) for parent in Path(os.path.realpath(root)).parents}
    entered: set[tuple[int, int]] = set()
    waiting = [root]
    links: list[Path] = []
    while waiting or links:
        folder = waiting.pop() if waiting else links.pop(0)
        identity = _identity(folder)
        if identity in entered:
            continue
        entered.add(identity)
        if identity in above:
            found.left_out.append(("special", folder))
        elif is_run(folder) or (folder.is_symlink() and run_above(folder)):
            found.left_out.append(("runs", folder))
        else:
            _enter(folder, found, waiting, links)
    return found


def _enter(folder: Path, found: _Found, waiting: list[Path], links: list[Path]) -> None:
    """Put each entry of a directory where it belongs."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except PermissionError:
        found.left_out.append(("unreadable", folder))
        return
    except OSError as error:
        raise unreadable(folder, error) from None
    own_output = _own_output()
    for entry in entries:
        path = Path(entry.path)
        if entry.name.startswith("."):
            found.left_out.append(("hidden", path))
        elif os.path.isdir(path):
            (links if entry.is_symlink() else waiting).append(path)
        elif not os.path.isfile(path):
            found.left_out.append(("special", path))
        elif entry.is_symlink() and run_above(path):
            found.left_out.append(("runs", path))
        elif own_output and _identity(path) in own_output:
            found.left_out.append(("special", path))
        else:
            found.paths.append(path)


def _identity(path: str | Path) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise unreadable(path, error) from None
    return status.st_dev, status.st_ino


def _own_output() -> set[tuple[int, int]]:
    """The files that this program's messages go to: they grow while they are read."""
    found = set()
    for stream in (1, 2):
        with contextlib.suppress(OSError):  # the stream is closed
            status = os.fstat(stream)
            if stat.S_ISREG(status.st_mode):
                found.add((status.st_dev, status.st_ino))
    return found


def is_run(directory: str | Path) -> bool:
    """Whether a directory is that of a run."""
    try:
        with open(os.path.join(directory, OWNER), "rb") as file:
            table = json.loads(file.read(1 << 16))
        if isinstance(table, dict) and {"format", "recipe_hash"} <= set(table):
            return True
    except (OSError, ValueError, RecursionError):
        pass
    marks = ("recipe.toml", "tracking.sqlite")
    return all(os.path.isfile(os.path.join(directory, name)) for name in marks)


def run_above(path: Path) -> Path | None:
    """The run directory that a path, without its links, is or is inside of."""
    real = Path(os.path.realpath(path))
    return next((each for each in [real, *real.parents] if is_run(each)), None)


def _run_between(root: Path, path: Path) -> bool:
    """Whether a directory below `root` on the way to `path` is a run."""
    between = itertools.takewhile(lambda parent: parent != root, path.parents)
    return any(is_run(parent) for parent in between)


def _find_packages(source: SourceConfig) -> SourceFiles:
    """The `.py` files in the RECORD of each distribution, sorted by posix path over all."""
    found = SourceFiles()
    for name in source.packages:
        for inside, path in sorted(_package_files(name, source.name)):
            if _patterns_for(source, [inside]):
                found.left_out.add("excluded", inside)
            else:
                meta = {"path": inside, "package": canonical_package(name)}
                found.files.append(SourceFile(path, meta))
    found.files.sort(key=lambda file: (file.meta["path"], file.meta["package"]))
    return found


def _package_files(name: str, source: str) -> list[tuple[str, Path]]:
    try:
        distribution = importlib.metadata.distribution(name)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        raise BadInput(
            f"source {source}: the package {name!r} is not installed", f"pip install {name}"
        ) from None
    root = str(distribution.locate_file(""))
    files = [
        (written(str(file)), Path(root, file))
        for file in distribution.files or []
        if file.name.endswith(".py") and ".." not in file.parts and not file.is_absolute()
    ]
    if not files:
        raise BadInput(
            f"source {source}: the package {name!r} has no Python source in its RECORD",
            f"install it from a wheel (pip install --force-reinstall {name}), or leave it out",
        )
    return files
