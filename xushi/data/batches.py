"""Batches as a pure function of (seed, cursor, number of sequences), and the bytes they came from.

Not here: the position of training. The caller keeps the cursor.

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
    """SHA-256 of each row of a batch: of the names, shapes, types and values of its tensors."""
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
    """Hex SHA-256 of the row hashes in order.

    So ranks can hash their own rows, and the hash does not depend on how rows are distributed.
    """
    return joined_hash(row_hashes(batch))


def joined_hash(rows: Sequence[bytes]) -> str:
    """The hash of a batch whose rows have these hashes."""
    return hashlib.sha256(b"".join(rows)).hexdigest()


class TokenDataset:
    """The training sequences in the order that `seed` decides.

    A cursor numbers them from 0; epochs follow each other without end.
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
        """Open a directory that `tokenize_corpus` wrote.

        Missing or damaged files are a `XushiError`.

        `only` names the sources to draw from; None means all. At least one of them must exist.
        """
        manifest = load_manifest(directory)
        if only is not None:
            manifest = manifest.model_copy(
                update={"train": [s for s in manifest.train if s.name in only]}
            )
            if not manifest.train:
                raise BadInput(
                    f"{directory} has no training tokens of {', '.join(only)}",
                    "add such a source to the recipe, or train on other sources",
                )
        sources = [open_source(directory / "train", manifest, source) for source in manifest.train]
        return cls(manifest, sources, directory, seed)

    @property
    def tokens_per_epoch(self) -> int:
        """Target tokens until a source of weight 1 has been seen once, at least 1.

        It is the sum of each source's target tokens times its weight.
        """
        weighted = sum(
            packed.targets * source.weight
            for packed, source in zip(self._sources, self.manifest.train, strict=True)
        )
        return max(1, round(weighted))

    def batch(self, cursor: int, sequences: int) -> "Batch":
        """The sequences `cursor` to `cursor + sequences - 1`.

        A sequence does not depend on how sequences are grouped into batches.
        """
        draws = [self._mixture.draw(cursor + row) for row in range(sequences)]
        return _batch([self._sources[source].sequence(index) for source, _, index in draws])

    def source(self, cursor: int) -> str:
        """The name of the source that the sequence at `cursor` comes from."""
        return self.manifest.train[self._mixture.draw(cursor)[0]].name

    def spans(self, cursor: int) -> list[Span]:
        """(uid, start, end) of each segment of the sequence at `cursor`, in order.

        See `packing.Span`.
        """
        source, _, index = self._mixture.draw(cursor)
        return self._sources[source].spans(index)

    def byte_spans(self, cursor: int) -> list[tuple[bytes, int, int]]:
        """Like `spans`, in bytes of the document's text: (uid, first byte, byte after the last)."""
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
    """The held-out documents as batches, with the document that each target belongs to.

    `uids` and `bytes_D` (bytes of text) have one entry for each document, in path order.
    """

    uids: list[bytes]
    bytes_D: Ints
    packed: PackedSource

    @classmethod
    def open(cls, directory: Path) -> "HeldoutText":
        """Like `TokenDataset.open`."""
        manifest = load_manifest(directory)
        packed = open_source(directory / "heldout", manifest, manifest.heldout)
        lengths = load_byte_lengths(directory, manifest)
        documents = range(len(packed.uids))
        sizes = [int(lengths[packed.document(index)].sum()) for index in documents]
        return cls(packed.uids, np.array(sizes, dtype=np.int64), packed)

    def batches(self, batch_size: int) -> Iterator[tuple["Batch", Ints]]:
        """Each batch with the index of every target's document, [B, T]; -1 for padding."""
        for first in range(0, self.packed.sequences, batch_size):
            rows = range(first, min(first + batch_size, self.packed.sequences))
            yield (
                _batch([self.packed.sequence(row) for row in rows]),
                np.stack([self.packed.documents(row) for row in rows]),
            )
