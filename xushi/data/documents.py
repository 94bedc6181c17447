"""A document, its uid, and its storage in Parquet shards. Not here: reading sources (`sources`)."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xushi.base.errors import BadInput

# What to do where files of a corpus are missing or damaged.
MAKE_AGAIN = "remove stages/data.json of the run and run its recipe again: the corpus is made again"

_SHARD_BYTES = 64 << 20
_ROW_GROUP_BYTES = 4 << 20
_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_WORD_CHARACTER = re.compile(r"\w")


@dataclass(frozen=True, slots=True)
class Document:
    """A text with its origin. Later steps never change it; their decisions are stored beside it.

    `uid`: 16 bytes, a hash of source, content and `meta`. `lang`: see `language`. `meta` can be
    written as JSON: `path` inside the source; `line` (jsonl) or `row` (parquet), both counted from
    1; `package`; `bytes` = [start, end] if the document is a part of its file.
    """

    uid: bytes
    text: str
    source: str
    lang: str
    meta: Mapping[str, Any]


def make_document(source: str, text: str, meta: Mapping[str, Any]) -> Document:
    """Make a document. Equal texts with different `meta` get different uids."""
    content = hashlib.blake2b(text.encode(), digest_size=32).hexdigest()
    identity = json.dumps([source, content, meta], sort_keys=True)
    uid = hashlib.blake2b(identity.encode(), digest_size=16).digest()
    return Document(uid, text, source, language(str(meta.get("path", "")), text), meta)


def language(path: str, text: str) -> str:
    """A simple guess: "python" for a path that ends in `.py`, "zh" if most letters and digits are
    Chinese characters, else "und" (undetermined).
    """
    if path.endswith(".py"):
        return "python"
    if text.isascii():
        return "und"
    return "zh" if 2 * len(_HAN.findall(text)) > len(_WORD_CHARACTER.findall(text)) else "und"


def write_documents(directory: Path, name: str, documents: Iterable[Document]) -> None:
    """Write `name-00000.parquet` and so on in the given order, about 64 MiB of text in each.

    At least one shard is written, even without documents.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [
            ("uid", pa.binary(16)),
            ("text", pa.large_string()),
            ("source", pa.string()),
            ("lang", pa.string()),
            ("meta", pa.string()),
        ]
    )
    writer = None
    shard = 0
    shard_bytes = 0
    for group, size in _groups(documents):
        if writer is None or shard_bytes + size > _SHARD_BYTES:
            if writer is not None:
                writer.close()
            writer = pq.ParquetWriter(
                directory / f"{name}-{shard:05}.parquet", schema, compression="zstd"
            )
            shard += 1
            shard_bytes = 0
        shard_bytes += size
        writer.write_table(pa.Table.from_pylist([_row(d) for d in group], schema=schema))
    if writer is None:
        writer = pq.ParquetWriter(directory / f"{name}-00000.parquet", schema, compression="zstd")
    writer.close()


def _row(document: Document) -> dict[str, Any]:
    return {
        "uid": document.uid,
        "text": document.text,
        "source": document.source,
        "lang": document.lang,
        "meta": json.dumps(document.meta, ensure_ascii=False, sort_keys=True),
    }


def _groups(documents: Iterable[Document]) -> Iterator[tuple[list[Document], int]]:
    """(documents, bytes of text) of each row group of about `_ROW_GROUP_BYTES`."""
    group: list[Document] = []
    size = 0
    for document in documents:
        group.append(document)
        size += len(document.text.encode())
        if size >= _ROW_GROUP_BYTES:
            yield group, size
            group = []
            size = 0
    if group:
        yield group, size


def read_documents(directory: Path, name: str) -> Iterator[Document]:
    """Read the documents that `write_documents` wrote under `name`, in the same order."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    shards = sorted(directory.glob(f"{name}-*.parquet"))
    if not shards:
        raise BadInput(f"{directory} has no {name} documents", MAKE_AGAIN)
    for shard in shards:
        try:
            with pq.ParquetFile(shard) as file:
                for index in range(file.num_row_groups):
                    for row in file.read_row_group(index).to_pylist():
                        yield Document(
                            row["uid"],
                            row["text"],
                            row["source"],
                            row["lang"],
                            json.loads(row["meta"]),
                        )
        except (OSError, pa.ArrowException) as error:
            raise BadInput(
                f"{shard} is damaged: {' '.join(str(error).split())}", MAKE_AGAIN
            ) from None


def find_documents(directory: Path, name: str, uids: Iterable[bytes]) -> dict[bytes, Document]:
    """The documents with these uids, by uid. Uids that the directory does not have are left out."""
    wanted = set(uids)
    return {
        document.uid: document
        for document in read_documents(directory, name)
        if document.uid in wanted
    }
