"""Build the corpus of a run: read the sources, drop duplicates, hold a part out, and write it.

    train-*.parquet, heldout-*.parquet   documents (see `documents`)
    decisions.parquet                    uid, step, version, score, kept, reason: one row for each
                                         document and step
    heldout.bin                          the bytes of the held-out documents, concatenated
    summary.json                         `CorpusSummary`; written last

While it is built, the corpus is held in memory, at about three times its size. Not here: tokens
(`tokens`), and the decision whether a corpus must be built again (`run`).
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
from xushi.data.documents import MAKE_AGAIN, Document, read_documents, write_documents
from xushi.data.holdout import Holdout, group_of, hold_out, place_of
from xushi.data.left_out import LeftOut, LeftOutList
from xushi.data.sources import SourceDocuments, read_source

# A step's version is raised when it decides differently on the same documents.
_VERSIONS = {"not_empty": 1, "exact_duplicates": 1, "holdout": 1}
# The steps that drop documents, and the reason that is told.
_LEFT_OUT_BY = {"not_empty": "empty", "exact_duplicates": "duplicates"}


class Decision(NamedTuple):
    """What one step decided about one document. `score` is None if the step computes none.

    Under the rule "tails" the hold-out decides about the two parts of a document, which have uids
    of their own; the steps before it decide about the whole document.
    """

    uid: bytes
    step: str
    version: int
    score: float | None
    kept: bool
    reason: str


@dataclass(frozen=True)
class ExtraSource:
    """Documents that the run makes itself, such as transcripts of an environment.

    All of them are trained on; none is dropped or held out.
    """

    documents: Sequence[Document]
    weight: float = 1.0


class SourceSummary(StrictConfig):
    """Counts for one source. `documents` and `bytes` count the documents that were not dropped;
    `left_out` counts what is no document and what was dropped, but for run directories: the one
    that the corpus is made for may be among them, and the corpus does not depend on it.
    """

    name: str
    kind: str
    weight: float
    files: int
    documents: int
    bytes: int
    heldout_documents: int
    heldout_bytes: int
    left_out: list[LeftOut]


class CorpusSummary(StrictConfig):
    """Counts and hash of a corpus. The totals, and the held-out share, exclude the extra sources.

    `sha256` is computed over path and content of every kept document, sources in the order of the
    recipe and paths in order. Before each path and each content comes its length as 8 little-endian
    bytes; for a line or row the path ends in `:number`. `rule` and `heldout_groups`
    ("source/group"; empty under the rule "tails") are explained in `holdout`.
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
    """Read, divide and write the corpus.

    `directory` is replaced by one rename: after a failure the old one is still there. A source that
    cannot be used is a `XushiError` (see `sources` and `holdout`).
    """
    configured = {source.name for source in config.sources}
    for name in extra:
        if name in configured:
            raise BadInput(
                f"source {name} has the same name as an environment's transcripts",
                "rename the source",
            )
    found = {source.name: read_source(source) for source in config.sources}
    documents, decisions = _without_duplicates(found)
    divided = hold_out(documents, config.heldout, config.salt)
    decisions += _holdout_decisions(divided)
    summary = CorpusSummary(
        sources=_source_summaries(config, extra, found, decisions, divided),
        files=sum(files.files for files in found.values()),
        documents=len(documents),
        bytes=_size(documents),
        heldout_documents=len(divided.heldout),
        heldout_bytes=_size(divided.heldout),
        heldout_groups=["/".join(group) for group in divided.groups],
        rule=divided.rule,
        sha256=_hash(documents),
    )
    extras = [document for name in sorted(extra) for document in extra[name].documents]
    with directory_in_place(directory) as aside:
        _write(aside, divided.train + extras, divided.heldout, decisions)
        write_json(aside / "summary.json", summary.model_dump())
    return summary


def load_summary(directory: Path) -> CorpusSummary:
    """The summary of a corpus that `build_corpus` wrote."""
    path = directory / "summary.json"
    return parse(CorpusSummary, read_json(path, MAKE_AGAIN), str(path), MAKE_AGAIN)


def training_texts(directory: Path) -> Iterator[str]:
    """The training texts in the order of the corpus; extra sources come last."""
    return (document.text for document in read_documents(directory, "train"))


def first_training_texts(directory: Path, size: int) -> Iterator[str]:
    """The first training texts, cut where they have `size` characters together."""
    left = size
    for text in training_texts(directory):
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return


def heldout_bytes(directory: Path) -> bytes:
    """The held-out documents as UTF-8, concatenated without separators."""
    try:
        return (directory / "heldout.bin").read_bytes()
    except OSError as error:
        raise BadInput(
            f"{directory / 'heldout.bin'} cannot be read: {error.strerror}", MAKE_AGAIN
        ) from None


def _write(
    directory: Path,
    train: Sequence[Document],
    heldout: Sequence[Document],
    decisions: Sequence[Decision],
) -> None:
    """Write everything but the summary."""
    assert len({document.uid for document in train}) == len(train)
    write_documents(directory, "train", train)
    write_documents(directory, "heldout", heldout)
    _write_decisions(directory / "decisions.parquet", decisions)
    text = b"".join(document.text.encode() for document in heldout)
    (directory / "heldout.bin").write_bytes(text)


def _decide(document: Document, step: str, kept: bool, reason: str) -> Decision:
    return Decision(document.uid, step, _VERSIONS[step], None, kept, reason)


def _without_duplicates(
    found: Mapping[str, SourceDocuments],
) -> tuple[list[Document], list[Decision]]:
    """The documents that are not empty, only the first of those with equal texts, and decisions."""
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


def _source_summaries(
    config: DataConfig,
    extra: Mapping[str, ExtraSource],
    found: Mapping[str, SourceDocuments],
    decisions: Sequence[Decision],
    divided: Holdout,
) -> list[SourceSummary]:
    """One summary for each source of the recipe, then one for each extra source."""
    dropped = {decision.uid: decision.step for decision in decisions if not decision.kept}
    summaries = []
    for source in config.sources:
        files = found[source.name]
        left_out = LeftOutList(each for each in files.left_out if each.reason != "runs")
        for document in files.documents:
            if (step := dropped.get(document.uid)) in _LEFT_OUT_BY:
                left_out.add(_LEFT_OUT_BY[step], place_of(document))
        held = [document for document in divided.heldout if document.source == source.name]
        trained = [document for document in divided.train if document.source == source.name]
        kept = [d for d in files.documents if dropped.get(d.uid) not in _LEFT_OUT_BY]
        summaries.append(
            SourceSummary(
                name=source.name,
                kind=source.kind,
                weight=source.weight,
                files=files.files,
                documents=len(kept),
                bytes=_size(trained) + _size(held),
                heldout_documents=len(held),
                heldout_bytes=_size(held),
                left_out=left_out.listed(),
            )
        )
    return summaries + [_extra_summary(name, extra[name]) for name in sorted(extra)]


def _extra_summary(name: str, source: ExtraSource) -> SourceSummary:
    return SourceSummary(
        name=name,
        kind="extra",
        weight=source.weight,
        files=0,
        documents=len(source.documents),
        bytes=_size(source.documents),
        heldout_documents=0,
        heldout_bytes=0,
        left_out=[],
    )


def _hash(documents: Sequence[Document]) -> str:
    """`CorpusSummary.sha256` of the kept documents."""
    digest = hashlib.sha256()
    for document in documents:
        for data in (place_of(document).encode(), document.text.encode()):
            digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _size(documents: Sequence[Document]) -> int:
    """Bytes of text."""
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
