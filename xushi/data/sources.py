"""Read the documents of a source: text files, JSONL, Parquet, installed Python packages.

Nothing is dropped silently: files that are left out are counted in the source's notes, and a file
that cannot be read is an error that names it. Not here: duplicates and hold-out (`corpus`,
`holdout`).
"""

import fnmatch
import glob
import importlib.metadata
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from xushi.base.errors import BadInput
from xushi.data.config import SourceConfig, canonical_package
from xushi.data.documents import Document, make_document

# Files with these suffixes should be text. One that is not UTF-8 is an error and not skipped.
TEXT_SUFFIXES = (
    ".c",
    ".cc",
    ".cpp",
    ".css",
    ".csv",
    ".go",
    ".h",
    ".hpp",
    ".htm",
    ".html",
    ".java",
    ".js",
    ".json",
    ".jsonl",
    ".md",
    ".org",
    ".py",
    ".rs",
    ".rst",
    ".sh",
    ".tex",
    ".toml",
    ".ts",
    ".tsv",
    ".txt",
    ".xml",
    ".yaml",
    ".yml",
)
_TABLE_SUFFIXES = {"jsonl": (".jsonl", ".ndjson"), "parquet": (".parquet",)}


class SourceFile(NamedTuple):
    """A file of a source. `meta` has its posix `path` inside the source and perhaps `package`."""

    path: Path
    meta: Mapping[str, Any]


@dataclass
class SourceFiles:
    """What a source has: its files in path order, and notes of what was left out and why."""

    files: list[SourceFile] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class SourceDocuments:
    """What was read from a source: its documents in path order, the number of files, and notes."""

    documents: list[Document]
    files: int
    notes: list[str]


def find_files(source: SourceConfig) -> SourceFiles:
    """The files of `source` in path order. Only the beginnings of files are read, to find text."""
    return _find_packages(source) if source.kind == "packages" else _find_by_glob(source)


def read_source(source: SourceConfig) -> SourceDocuments:
    """All documents of `source` in path order; a source without any text is a `XushiError`."""
    found = find_files(source)
    read = _READERS[source.kind]
    documents = [document for file in found.files for document in read(source, file)]
    if not documents:
        left_out = f" ({'; '.join(found.notes)})" if found.notes else ""
        raise BadInput(
            f"source {source.name} has no text{left_out}",
            "give it files with text, or leave it out",
        )
    return SourceDocuments(documents, len(found.files), found.notes)


def _find_by_glob(source: SourceConfig) -> SourceFiles:
    found = SourceFiles()
    root, paths, whole_directory = _match(source, found)
    excluded = 0
    skipped = 0
    for path in paths:
        inside = path.relative_to(root).as_posix()
        if any(fnmatch.fnmatchcase(inside, pattern) for pattern in source.exclude):
            excluded += 1
        elif whole_directory and not _belongs(source, path):
            skipped += 1
        else:
            found.files.append(SourceFile(path, {"path": inside}))
    _note(found, excluded, "files excluded by pattern")
    _note(found, skipped, f"files skipped that are not {source.kind}")
    return found


def _belongs(source: SourceConfig, path: Path) -> bool:
    """Whether a file found in a directory is of the source's kind."""
    if source.kind in _TABLE_SUFFIXES:
        return path.suffix.lower() in _TABLE_SUFFIXES[source.kind]
    return path.suffix.lower() in TEXT_SUFFIXES or _looks_like_text(path)


def _match(source: SourceConfig, found: SourceFiles) -> tuple[Path, list[Path], bool]:
    """(root that paths are relative to, files in path order, whether `glob` is a directory)."""
    assert source.glob is not None
    pattern = os.path.expanduser(source.glob)
    if os.path.isdir(pattern):
        return Path(pattern), _walk(Path(pattern), found), True
    if os.path.isfile(pattern):
        return Path(pattern).parent, [Path(pattern)], False
    # Keyed by real path, so that a link to a file that also matches is not a second document.
    paths = {
        os.path.realpath(match): Path(match)
        for match in sorted(glob.glob(pattern, recursive=True), reverse=True)
        if os.path.isfile(match)
    }
    if not paths:
        raise BadInput(
            f"source {source.name}: no file matches {source.glob!r} (in {os.getcwd()})",
            "correct the glob; ** matches directories at any depth, and a directory's name takes "
            "all text files under it",
        )
    parents = Path(pattern).parts[:-1]
    root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), parents))
    return root, sorted(paths.values(), key=lambda path: path.as_posix()), False


def _walk(root: Path, found: SourceFiles) -> list[Path]:
    """Regular files under `root` that are not hidden, in posix path order.

    Links to directories are not followed.
    """
    hidden = 0
    special = 0
    paths = []
    for folder, folders, names in os.walk(root, onerror=_raise_unreadable):
        hidden += sum(name.startswith(".") for name in folders + names)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(folder, name) for name in names if not name.startswith(".")):
            if path.is_file():
                paths.append(path)
            else:
                special += 1
    _note(found, hidden, "hidden files and directories skipped")
    _note(found, special, "broken links and special files skipped")
    return sorted(paths, key=lambda path: path.as_posix())


def unreadable(path: Path | str, error: OSError) -> BadInput:
    """The error for a source's file that the system does not let us read."""
    return BadInput(
        f"{path} cannot be read: {error.strerror}", "check its permissions, or exclude it"
    )


def _raise_unreadable(error: OSError) -> None:
    raise unreadable(error.filename, error) from None


def _note(found: SourceFiles, count: int, what: str) -> None:
    if count:
        found.notes.append(f"{count} {what}")


def _bytes_of(path: Path, most: int = -1) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(most)
    except OSError as error:
        raise unreadable(path, error) from None


def _looks_like_text(path: Path) -> bool:
    """Whether the first 64 KiB are UTF-8 without NUL. The last character may be incomplete."""
    start = _bytes_of(path, 1 << 16)
    try:
        start.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.end < len(start) or error.reason != "unexpected end of data":
            return False
    return b"\0" not in start


def _text_of(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadInput(
            f"{where} is not UTF-8 (byte {error.start}, line {line})",
            "convert it (iconv -t utf-8), or exclude it",
        ) from None


def _read_text(source: SourceConfig, file: SourceFile) -> Iterator[Document]:
    yield make_document(source.name, _text_of(_bytes_of(file.path), str(file.path)), file.meta)


def _read_jsonl(source: SourceConfig, file: SourceFile) -> Iterator[Document]:
    path = file.path
    for number, line in enumerate(_text_of(_bytes_of(path), str(path)).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{where} is not JSON: {error}", "correct or remove that line") from None
        text = row.get(source.field) if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise BadInput(
                f"{where} has no text under {source.field!r}",
                f"correct that line, or set field in source {source.name} to the right key",
            )
        yield make_document(source.name, _encodable(text, where), {**file.meta, "line": number})


def _encodable(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadInput(
            f"{where} has a lone surrogate (half a character)", "correct or remove that line"
        ) from None
    return text


def _read_parquet(source: SourceConfig, file: SourceFile) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = file.path
    try:
        with pq.ParquetFile(path) as table:
            columns = table.schema_arrow
            if source.field not in columns.names:
                raise BadInput(
                    f"{path} has no column {source.field!r} (it has {', '.join(columns.names)})",
                    f"set field in source {source.name} to the right column",
                )
            number = 0
            for batch in table.iter_batches(batch_size=1024, columns=[source.field]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    if not isinstance(text, str):
                        raise BadInput(
                            f"{path}, row {number} of column {source.field!r} is not text",
                            "remove the row, or set field to a column of strings",
                        )
                    yield make_document(source.name, text, {**file.meta, "row": number})
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise BadInput(
            f"{path} cannot be read as Parquet: {' '.join(str(error).split())}",
            "check the file, or exclude it",
        ) from None


_READERS = {
    "text": _read_text,
    "packages": _read_text,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
}


def _find_packages(source: SourceConfig) -> SourceFiles:
    """The `.py` files in the RECORD of each distribution, sorted by posix path over all."""
    files: list[tuple[str, str, Path]] = []
    excluded = 0
    for name in source.packages:
        for inside, path in _package_files(name, source.name):
            if any(fnmatch.fnmatchcase(inside, pattern) for pattern in source.exclude):
                excluded += 1
            else:
                files.append((inside, canonical_package(name), path))
    found = SourceFiles(
        [
            SourceFile(path, {"path": inside, "package": package})
            for inside, package, path in sorted(files)
        ]
    )
    _note(found, excluded, "files excluded by pattern")
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
        (str(file), Path(root, file))
        for file in distribution.files or []
        if file.name.endswith(".py") and ".." not in file.parts and not file.is_absolute()
    ]
    if not files:
        raise BadInput(
            f"source {source}: the package {name!r} has no Python source in its RECORD",
            f"install it from a wheel (pip install --force-reinstall {name}), or leave it out",
        )
    return files
