"""From the tokens of documents to sequences of T, by arithmetic alone.

A document is [bos] + tokens + [eos]. Its inputs are all but the last, its targets all but the
first. The inputs of a source's documents follow one another in a stream that is cut every T; what a
cut divides goes on in the next sequence as a segment of its own. So every token but bos is a target
exactly once, and nothing is padded but the end. Not here: in which order sequences are seen
(`mixture`), tensors (`batches`).

Legend: T tokens of a sequence.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


class Span(NamedTuple):
    """A piece of a document in a sequence: its input tokens are [bos, tokens..., eos][start:end],
    its targets those at [start + 1:end + 1].
    """

    uid: bytes
    start: int
    end: int


class Sequence(NamedTuple):
    """One row of a batch, each [T]. Padding: segment -1, loss_mask False, position 0, the pad token
    in both.
    """

    tokens_T: Ints
    targets_T: Ints
    positions_T: Ints
    segments_T: Ints
    loss_mask_T: npt.NDArray[np.bool_]


class PackedSource:
    """The sequences of one source.

    `tokens`: the flat file of all documents, each with its bos and eos. `starts` [documents + 1]:
    where each begins in it, and the end. `uids`: of each document.
    """

    def __init__(
        self,
        tokens: npt.NDArray[np.unsignedinteger],
        starts: Ints,
        uids: list[bytes],
        length: int,
        pad: int,
    ) -> None:
        self.tokens, self.starts, self.uids, self.length, self.pad = (
            tokens,
            starts,
            uids,
            length,
            pad,
        )
        # Each document before it had one more token than inputs.
        self._inputs = starts - np.arange(len(starts))
        self.targets = int(self._inputs[-1])
        self.sequences = -(-self.targets // length)

    def sequence(self, index: int) -> Sequence:
        """Sequence `index` of `sequences`; positions and segments restart with every piece of a
        document.
        """
        low = index * self.length
        stream = np.arange(low, min(low + self.length, self.targets))
        document = np.searchsorted(self._inputs, stream, side="right") - 1
        place = stream + document
        fill = self.length - len(stream)

        def padded(values: Ints, value: int) -> Ints:
            return np.pad(values.astype(np.int64), (0, fill), constant_values=value)

        return Sequence(
            tokens_T=padded(self.tokens[place], self.pad),
            targets_T=padded(self.tokens[place + 1], self.pad),
            positions_T=padded(stream - np.maximum(self._inputs[document], low), 0),
            segments_T=padded(document - document[0], -1),
            loss_mask_T=np.arange(self.length) < len(stream),
        )

    def spans(self, index: int) -> list[Span]:
        """The piece of a document behind each segment of sequence `index`, in order."""
        return [span for _, span in self.documents_and_spans(index)]

    def documents_and_spans(self, index: int) -> list[tuple[int, Span]]:
        """`spans`, each with the number of its document in this source."""
        low = index * self.length
        high = min(low + self.length, self.targets)
        first = int(np.searchsorted(self._inputs, low, side="right")) - 1
        last = int(np.searchsorted(self._inputs, high, side="left"))
        begins = self._inputs[first : last + 1].tolist()
        return [
            (
                first + k,
                Span(
                    self.uids[first + k],
                    max(low - begins[k], 0),
                    min(high, begins[k + 1]) - begins[k],
                ),
            )
            for k in range(last - first)
        ]

    def document(self, index: int) -> npt.NDArray[np.unsignedinteger]:
        """[bos, tokens..., eos] of document `index`."""
        return self.tokens[self.starts[index] : self.starts[index + 1]]


def byte_span(
    document: npt.NDArray[np.unsignedinteger], byte_lengths: Ints, start: int, end: int
) -> tuple[int, int]:
    """The bytes of a document's text that [bos, tokens..., eos][start:end] stand for, as (first,
    past the last).

    `byte_lengths` [vocabulary]: 0 for bos and eos.
    """
    first = int(byte_lengths[document[:start]].sum())
    return first, first + int(byte_lengths[document[start:end]].sum())
