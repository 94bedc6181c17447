"""Read the documents of a source: text files, JSONL, Parquet, installed Python packages.

Nothing is dropped silently: a file that is left out is counted with its reason, and one that the
source names and that cannot be read is an error. Not here: where the files are (`files`),
duplicates and hold-out (`corpus`, `holdout`).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass

from xushi.base.errors import BadInput
from xushi.data.config import SourceConfig
from xushi.data.documents import Document, make_document
from xushi.data.files import (
    SourceFile,
    bytes_of,
    find_files,
    reason_against_bytes,
    refused,
    unreadable,
)
from xushi.data.left_out import LeftOut, sentence
from xushi.data.names import written


@dataclass
class SourceDocuments:
    """What was read from a source: its documents in path order, the number of files, and what is
    left out.
    """

    documents: list[Document]
    files: int
    left_out: list[LeftOut]


def read_source(source: SourceConfig) -> SourceDocuments:
    """All documents of `source` in path order; a source without any text is a `XushiError`."""
    found = find_files(source)
    read = _READERS[source.kind]
    documents: list[Document] = []
    files = 0
    for file in found.files:
        try:
            documents += read(source, file)
            files += 1
        except _NotText as error:
            found.left_out.add(error.reason, str(file.meta["path"]))
    left_out = found.left_out.listed()
    if not documents:
        raise BadInput(
            f"source {source.name} has no text"
            + "".join(f"; {sentence(each)}" for each in left_out),
            "give it files with text, or leave it out",
        )
    return SourceDocuments(documents, files, left_out)


class _NotText(Exception):
    """A file of a directory that turns out to be no text; `reason` is of `REASONS`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def _read_text(source: SourceConfig, file: SourceFile) -> Iterator[Document]:
    try:
        data = bytes_of(file.path)
    except PermissionError as error:
        if file.named or source.kind == "packages":
            raise unreadable(file.path, error) from None
        raise _NotText("unreadable") from None
    reason = reason_against_bytes(data)
    if reason is not None and not file.named:
        raise _NotText(reason)
    if reason == "binary":
        raise refused(file.path, reason)
    yield make_document(source.name, _text_of(data, written(file.path)), file.meta)


def _read_jsonl(source: SourceConfig, file: SourceFile) -> Iterator[Document]:
    try:
        data = bytes_of(file.path)
    except PermissionError as error:
        raise unreadable(file.path, error) from None
    path = written(file.path)
    for number, line in enumerate(_text_of(data, path).split("\n"), start=1):
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

    path = written(file.path)
    try:
        with open(file.path, "rb") as opened, pq.ParquetFile(opened) as table:
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


def _text_of(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadInput(
            f"{where} is not UTF-8 (byte {error.start}, line {line})",
            "convert it (iconv -t utf-8), or exclude it",
        ) from None


_READERS = {
    "text": _read_text,
    "packages": _read_text,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
}
