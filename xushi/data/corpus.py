"""The corpus of a run: sources read, duplicates dropped, a part held out, all of it written down
with its verdicts.

    train-*.parquet, heldout-*.parquet   documents (see `documents`)
    decisions.parquet                    uid, step, version, score, kept, reason: one row per document and step
    heldout.bin                          the held-out documents' bytes one after another, for compressors
    summary.json                         `CorpusSummary`; written last

Held in memory while it is built: about three times its size. Not here: tokens (`tokens`), and when
to build anew.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from xushi.base.config import StrictConfig, parse
from xushi.base.errors import BadInput
from xushi.base.files import directory_in_place, read_json, write_json
from xushi.data.config import DataConfig
from xushi.data.documents import Document, read_documents, write_documents
from xushi.data.holdout import Holdout, group_of, hold_out, place_of
from xushi.data.sources import SourceFiles, read_source

# Raised when a step decides otherwise than before on the same documents.
_VERSIONS = {"not_empty": 1, "exact_duplicates": 1, "holdout": 1}


class Decision(NamedTuple):
    """A step's verdict on a document. `score` is None where the step has none. Under the rule
    "tails" the steps before the hold-out speak of the whole document, the hold-out of its parts,
    which have uids of their own.
    """

    uid: bytes
    step: str
    version: int
    score: float | None
    kept: bool
    reason: str


@dataclass(frozen=True)
class ExtraSource:
    """Documents made by the run itself (transcripts of an environment): trained on as they are,
    never held out.
    """

    documents: Sequence[Document]
    weight: float = 1.0


class SourceSummary(StrictConfig):
    """What one source gave. `bytes` and `documents` count what was kept, held out or not."""

    name: str
    kind: str
    root: str
    weight: float
    files: int
    documents: int
    bytes: int
    heldout_documents: int
    heldout_bytes: int
    empty: int
    duplicates: int
    notes: list[str]


class CorpusSummary(StrictConfig):
    """A corpus in numbers. Totals leave out the extra sources, as do the fractions of the hold-out.

    `sha256` is over (path, content) of every kept document, in the order of the sources and of the
    paths in each, every path and content after its length as 8 little-endian bytes; a line or row
    adds `:number` to its path. `rule` and `heldout_groups` ("source/group"; empty under the rule
    "tails"): see `holdout`.
    """

    sources: list[SourceSummary]
    files: int
    documents: int
    bytes: int
    heldout_documents: int
    heldout_bytes: int
    heldout_groups: list[str]
    rule: Literal["groups", "tails"]
    sha256: str


def build_corpus(
    config: DataConfig, extra: Mapping[str, ExtraSource], directory: Path
) -> CorpusSummary:
    """Read, divide and write the corpus. `directory` appears whole (replacing an older one) or not
    at all.

    Everything a source can be wrong in is a `XushiError` (see `sources`, `holdout`).
    """
    configured = {source.name for source in config.sources}
    for name in extra:
        if name in configured:
            raise BadInput(
                f"source {name} has the name of an environment's transcripts", "rename the source"
            )
    found = {source.name: read_source(source) for source in config.sources}
    documents, decisions = _without_duplicates(found)
    divided = hold_out(documents, config.heldout, config.salt)
    decisions += _holdout_decisions(divided)
    summary = _summary(config, extra, found, decisions, documents, divided)
    train = divided.train + [
        document for name in sorted(extra) for document in extra[name].documents
    ]
    assert len({document.uid for document in train}) == len(train)
    with directory_in_place(directory) as aside:
        write_documents(aside, "train", train)
        write_documents(aside, "heldout", divided.heldout)
        _write_decisions(aside / "decisions.parquet", decisions)
        (aside / "heldout.bin").write_bytes(
            b"".join(document.text.encode() for document in divided.heldout)
        )
        write_json(aside / "summary.json", summary.model_dump())
    return summary


def load_summary(directory: Path) -> CorpusSummary:
    """The summary of a corpus that `build_corpus` wrote."""
    path = directory / "summary.json"
    return parse(CorpusSummary, read_json(path, "run the data stage again"), str(path))


def training_texts(directory: Path) -> Iterator[str]:
    """The texts to train on, extra sources last, in their fixed order."""
    return (document.text for document in read_documents(directory, "train"))


def heldout_bytes(directory: Path) -> bytes:
    """The held-out documents as one stream of UTF-8, without separators."""
    try:
        return (directory / "heldout.bin").read_bytes()
    except OSError as error:
        raise BadInput(
            f"{directory / 'heldout.bin'} cannot be read: {error.strerror}", "run the data stage"
        ) from None


def _decide(document: Document, step: str, kept: bool, reason: str) -> Decision:
    return Decision(document.uid, step, _VERSIONS[step], None, kept, reason)


def _without_duplicates(found: Mapping[str, SourceFiles]) -> tuple[list[Document], list[Decision]]:
    """Documents with text, the first of each text over all sources."""
    first: dict[bytes, bytes] = {}
    kept, decisions = [], []
    for document in (document for files in found.values() for document in files.documents):
        if not document.text:
            decisions.append(_decide(document, "not_empty", False, "no text"))
            continue
        content = hashlib.blake2b(document.text.encode(), digest_size=32).digest()
        uid = first.setdefault(content, document.uid)
        if uid == document.uid:
            kept.append(document)
            decisions.append(_decide(document, "exact_duplicates", True, "first of its text"))
        else:
            decisions.append(
                _decide(document, "exact_duplicates", False, f"same text as {uid.hex()}")
            )
    return kept, decisions


def _holdout_decisions(divided: Holdout) -> list[Decision]:
    train = "group is trained on" if divided.rule == "groups" else "head of its text"
    decisions = [_decide(document, "holdout", True, train) for document in divided.train]
    for document in divided.heldout:
        held = (
            f"group {'/'.join(group_of(document))} is held out"
            if divided.rule == "groups"
            else "tail of its text"
        )
        decisions.append(_decide(document, "holdout", False, held))
    return decisions


def _summary(
    config: DataConfig,
    extra: Mapping[str, ExtraSource],
    found: Mapping[str, SourceFiles],
    decisions: Sequence[Decision],
    documents: Sequence[Document],
    divided: Holdout,
) -> CorpusSummary:
    dropped = {decision.uid: decision.step for decision in decisions if not decision.kept}
    digest = hashlib.sha256()
    for document in documents:
        for data in (place_of(document).encode(), document.text.encode()):
            digest.update(len(data).to_bytes(8, "little") + data)
    sources = []
    for source in config.sources:
        steps = [dropped.get(document.uid) for document in found[source.name].documents]
        kept = [document for document in documents if document.source == source.name]
        held = [document for document in divided.heldout if document.source == source.name]
        sources.append(
            SourceSummary(
                name=source.name,
                kind=source.kind,
                root=found[source.name].root,
                weight=source.weight,
                files=found[source.name].files,
                documents=len(kept),
                bytes=_size(kept),
                heldout_documents=len(held),
                heldout_bytes=_size(held),
                empty=steps.count("not_empty"),
                duplicates=steps.count("exact_duplicates"),
                notes=found[source.name].notes,
            )
        )
    extras = [
        SourceSummary(
            name=name,
            kind="extra",
            root="",
            weight=extra[name].weight,
            files=0,
            documents=len(extra[name].documents),
            bytes=_size(extra[name].documents),
            heldout_documents=0,
            heldout_bytes=0,
            empty=0,
            duplicates=0,
            notes=[],
        )
        for name in sorted(extra)
    ]
    return CorpusSummary(
        sources=sources + extras,
        files=sum(source.files for source in sources),
        documents=len(documents),
        bytes=_size(documents),
        heldout_documents=len(divided.heldout),
        heldout_bytes=_size(divided.heldout),
        heldout_groups=["/".join(group) for group in divided.groups],
        rule=divided.rule,
        sha256=digest.hexdigest(),
    )


def _size(documents: Sequence[Document]) -> int:
    return sum(len(document.text.encode()) for document in documents)


def _write_decisions(path: Path, decisions: Sequence[Decision]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [
            ("uid", pa.binary(16)),
            ("step", pa.string()),
            ("version", pa.int32()),
            ("score", pa.float64()),
            ("kept", pa.bool_()),
            ("reason", pa.string()),
        ]
    )
    columns = zip(*decisions, strict=True)
    pq.write_table(
        pa.table(
            [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)],
            schema=schema,
        ),
        path,
        compression="zstd",
    )
