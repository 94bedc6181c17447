"""A document, its identity, and how documents lie on disk (Parquet shards). Not here: where
documents come from.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xushi.base.errors import BadInput

_SHARD_BYTES = 64 << 20
_ROW_GROUP_BYTES = 4 << 20
_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_WORD_CHARACTER = re.compile(r"\w")


@dataclass(frozen=True, slots=True)
class Document:
    """A text that is never changed afterwards; what later steps decide about it stands beside it.

    `uid`: 16 bytes, from source, content hash and place. `lang`: see `language`. `meta`
    (JSON-able): `path` inside the source; `line` (jsonl) or `row` (parquet), both from 1;
    `package`; `bytes` = [start, end] when the document is a part of its file.
    """

    uid: bytes
    text: str
    source: str
    lang: str
    meta: Mapping[str, Any]


def make_document(source: str, text: str, meta: Mapping[str, Any]) -> Document:
    """A document whose place is the whole of `meta`; equal texts at different places get different
    uids.
    """
    content = hashlib.blake2b(text.encode(), digest_size=32).hexdigest()
    identity = json.dumps([source, content, meta], sort_keys=True)
    uid = hashlib.blake2b(identity.encode(), digest_size=16).digest()
    return Document(uid, text, source, language(str(meta.get("path", "")), text), meta)


def language(path: str, text: str) -> str:
    """A simple guess: "python" for `.py` files, "zh" if most letters and digits are Chinese
    characters, else "und".
    """
    if path.endswith(".py"):
        return "python"
    if text.isascii():
        return "und"
    return "zh" if 2 * len(_HAN.findall(text)) > len(_WORD_CHARACTER.findall(text)) else "und"


def write_documents(directory: Path, name: str, documents: Iterable[Document]) -> None:
    """Write `name-00000.parquet` and so on, about 64 MiB of text each, in the order given; at least
    one shard.
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
    writer, shard, shard_bytes = None, 0, 0
    for group, size in _groups(documents):
        if writer is None or shard_bytes + size > _SHARD_BYTES:
            if writer is not None:
                writer.close()
            writer = pq.ParquetWriter(
                directory / f"{name}-{shard:05}.parquet", schema, compression="zstd"
            )
            shard, shard_bytes = shard + 1, 0
        shard_bytes += size
        rows = [
            {
                "uid": d.uid,
                "text": d.text,
                "source": d.source,
                "lang": d.lang,
                "meta": json.dumps(d.meta, ensure_ascii=False, sort_keys=True),
            }
            for d in group
        ]
        writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    if writer is None:
        writer = pq.ParquetWriter(directory / f"{name}-00000.parquet", schema, compression="zstd")
    writer.close()


def _groups(documents: Iterable[Document]) -> Iterator[tuple[list[Document], int]]:
    """Documents in row groups of about `_ROW_GROUP_BYTES` of text, each with its size."""
    group: list[Document] = []
    size = 0
    for document in documents:
        group.append(document)
        size += len(document.text.encode())
        if size >= _ROW_GROUP_BYTES:
            yield group, size
            group, size = [], 0
    if group:
        yield group, size


def read_documents(directory: Path, name: str) -> Iterator[Document]:
    """The documents of a directory that `write_documents` filled under `name`, in their order."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    shards = sorted(directory.glob(f"{name}-*.parquet"))
    if not shards:
        raise BadInput(f"{directory} holds no {name} documents", "run the data stage")
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
                f"{shard} is damaged: {' '.join(str(error).split())}", "run the data stage again"
            ) from None


def find_documents(directory: Path, name: str, uids: Iterable[bytes]) -> dict[bytes, Document]:
    """Those of a directory's documents that are asked for and there, by uid."""
    wanted = set(uids)
    return {
        document.uid: document
        for document in read_documents(directory, name)
        if document.uid in wanted
    }
