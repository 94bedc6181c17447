"""Batches: a pure function of (seed, cursor, number of sequences), and the way back from a batch to
its bytes.

Not here: anything that remembers where training is; the cursor is the caller's.

Legend: B sequence, T token.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from xushi.base.errors import BadInput
from xushi.data import packing
from xushi.data.mixture import Mixture
from xushi.data.packing import Ints, PackedSource, Span, byte_span
from xushi.data.tokens import TokenManifest, load_byte_lengths, load_manifest, open_source

if TYPE_CHECKING:  # torch takes a second to load, and making a corpus does without it
    from xushi.model import Batch


def _batch(rows: Sequence[packing.PackedRow]) -> "Batch":
    import torch

    from xushi.model import Batch

    columns = zip(packing.PackedRow._fields, zip(*rows, strict=True), strict=True)
    return Batch(
        **{name.removesuffix("_T"): torch.from_numpy(np.stack(column)) for name, column in columns}
    )


def row_hashes(batch: "Batch") -> list[bytes]:
    """SHA-256 of each row of a batch's tensors [B, T]: over their names, shapes and values."""
    arrays = {name: tensor.cpu().numpy() for name, tensor in sorted(batch._asdict().items())}
    digests = []
    for row in range(batch.rows):
        digest = hashlib.sha256()
        for name, array in arrays.items():
            digest.update(
                f"{name} {array[row].shape} {array.dtype.str}\n".encode() + array[row].tobytes()
            )
        digests.append(digest.digest())
    return digests


def batch_hash(batch: "Batch") -> str:
    """Hex SHA-256 over the hashes of the rows in order, so that it does not matter who holds which
    row.
    """
    return joined_hash(row_hashes(batch))


def joined_hash(rows: Sequence[bytes]) -> str:
    """The hash of a batch whose rows have these hashes."""
    return hashlib.sha256(b"".join(rows)).hexdigest()


class TokenDataset:
    """The training sequences in the order that `seed` gives them, numbered by a cursor from 0
    without end.
    """

    def __init__(
        self, manifest: TokenManifest, sources: Sequence[PackedSource], directory: Path, seed: int
    ) -> None:
        self.manifest = manifest
        self._sources = sources
        self._byte_lengths = load_byte_lengths(directory, manifest)
        self._mixture = Mixture(
            [source.name for source in manifest.train],
            [source.sequences for source in sources],
            [source.weight for source in manifest.train],
            seed,
        )

    @classmethod
    def open(cls, directory: Path, seed: int, only: Sequence[str] | None = None) -> "TokenDataset":
        """Open what `tokenize_corpus` wrote; missing or damaged files are a `XushiError`.

        `only` names the sources to draw from, all if None; there must be one.
        """
        manifest = load_manifest(directory)
        if only is not None:
            manifest = manifest.model_copy(
                update={"train": [s for s in manifest.train if s.name in only]}
            )
            if not manifest.train:
                raise BadInput(
                    f"{directory} has no training tokens of {', '.join(only)}",
                    "give the recipe such a source, or train on the others",
                )
        sources = [open_source(directory / "train", manifest, source) for source in manifest.train]
        return cls(manifest, sources, directory, seed)

    @property
    def tokens_per_epoch(self) -> int:
        """Target tokens after which a source of weight 1 has been seen once: each source's, times
        its weight. At least 1.
        """
        weighted = sum(
            packed.targets * source.weight
            for packed, source in zip(self._sources, self.manifest.train, strict=True)
        )
        return max(1, round(weighted))

    def batch(self, cursor: int, sequences: int) -> "Batch":
        """The sequences `cursor` to `cursor` + `sequences` - 1. How they are grouped into batches
        changes nothing.
        """
        draws = [self._mixture.draw(cursor + row) for row in range(sequences)]
        return _batch([self._sources[source].sequence(index) for source, _, index in draws])

    def source(self, cursor: int) -> str:
        """The name of the source that the sequence at `cursor` comes from."""
        return self.manifest.train[self._mixture.draw(cursor)[0]].name

    def spans(self, cursor: int) -> list[Span]:
        """(uid, start, end) behind each segment of the sequence at `cursor`, in order; see
        `packing.Span`.
        """
        source, _, index = self._mixture.draw(cursor)
        return self._sources[source].spans(index)

    def byte_spans(self, cursor: int) -> list[tuple[bytes, int, int]]:
        """The same in bytes of the document's text: (uid, first byte, past the last)."""
        source, _, index = self._mixture.draw(cursor)
        packed = self._sources[source]
        return [
            (
                span.uid,
                *byte_span(packed.document(document), self._byte_lengths, span.start, span.end),
            )
            for document, span in packed.documents_and_spans(index)
        ]


def heldout_batches(directory: Path, batch_size: int) -> Iterator["Batch"]:
    """The held-out documents, packed in path order; the last batch may be smaller.

    Every token except bos is a target once, eos included: an encoder must say where a document
    ends. `corpus.heldout_bytes` are the bytes that these batches describe.
    """
    return (batch for batch, _ in HeldoutText.open(directory).batches(batch_size))


@dataclass(frozen=True)
class HeldoutText:
    """The held-out documents as batches that say to which document each target belongs.

    Per document, in path order: `uids`, and `bytes_D`, how many bytes its text has.
    """

    uids: list[bytes]
    bytes_D: Ints
    packed: PackedSource

    @classmethod
    def open(cls, directory: Path) -> "HeldoutText":
        """Open what `tokenize_corpus` wrote; missing or damaged files are a `XushiError`."""
        manifest = load_manifest(directory)
        packed = open_source(directory / "heldout", manifest, manifest.heldout)
        lengths = load_byte_lengths(directory, manifest)
        documents = range(len(packed.uids))
        sizes = [int(lengths[packed.document(index)].sum()) for index in documents]
        return cls(packed.uids, np.array(sizes, dtype=np.int64), packed)

    def batches(self, batch_size: int) -> Iterator[tuple["Batch", Ints]]:
        """Each batch with the index of each target's document: [B, T], -1 for padding."""
        for first in range(0, self.packed.sequences, batch_size):
            rows = range(first, min(first + batch_size, self.packed.sequences))
            yield (
                _batch([self.packed.sequence(row) for row in rows]),
                np.stack([self.packed.documents(row) for row in rows]),
            )
