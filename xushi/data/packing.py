"""Pack the documents of a source into sequences of T tokens, by arithmetic alone.

A document is [bos] + tokens + [eos]. Its inputs are all of these but the last, its targets all but
the first. The inputs of all documents are concatenated and cut every T tokens. A document that is
cut continues in the next sequence as a segment of its own. So every token but bos is a target
exactly once, and only the last sequence is padded. Not here: the order of the sequences
(`mixture`), tensors (`batches`).

Legend: T tokens of a sequence.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


class Span(NamedTuple):
    """The part of a document that is one segment of a sequence.

    Its input tokens are [bos, tokens..., eos][start:end], its targets [start + 1:end + 1] of the
    same list.
    """

    uid: bytes
    start: int
    end: int


class PackedRow(NamedTuple):
    """One row of a batch; every array is [T].

    Padding has segment -1, loss_mask False, position 0, and the pad token as input and target.
    """

    tokens_T: Ints
    targets_T: Ints
    positions_T: Ints
    segments_T: Ints
    loss_mask_T: npt.NDArray[np.bool_]


class PackedSource:
    """The sequences of one source.

    `tokens`: all documents concatenated, each with its bos and eos. `starts` [documents + 1]: the
    offset of each document in `tokens`, and the end. `uids`: one for each document. `length`: T.
    `pad`: the id of the pad token.
    """

    def __init__(
        self,
        tokens: npt.NDArray[np.unsignedinteger],
        starts: Ints,
        uids: list[bytes],
        length: int,
        pad: int,
    ) -> None:
        self.tokens = tokens
        self.starts = starts
        self.uids = uids
        self.length = length
        self.pad = pad
        # Offsets in the stream of inputs: each document has one input fewer than it has tokens.
        self._inputs = starts - np.arange(len(starts))
        self.targets = int(self._inputs[-1])
        self.sequences = -(-self.targets // length)

    def sequence(self, index: int) -> PackedRow:
        """Sequence `index`. Every document, and every continuation of one, is a new segment whose
        positions restart at 0.
        """
        low = index * self.length
        stream = np.arange(low, min(low + self.length, self.targets))
        document = np.searchsorted(self._inputs, stream, side="right") - 1
        offset = stream + document
        fill = self.length - len(stream)

        def padded(values: Ints, value: int) -> Ints:
            return np.pad(values.astype(np.int64), (0, fill), constant_values=value)

        return PackedRow(
            tokens_T=padded(self.tokens[offset], self.pad),
            targets_T=padded(self.tokens[offset + 1], self.pad),
            positions_T=padded(stream - np.maximum(self._inputs[document], low), 0),
            segments_T=padded(document - document[0], -1),
            loss_mask_T=np.arange(self.length) < len(stream),
        )

    def documents(self, index: int) -> Ints:
        """The index of the document of each target of sequence `index`, [T]; -1 for padding."""
        low = index * self.length
        stream = np.arange(low, min(low + self.length, self.targets))
        document = np.searchsorted(self._inputs, stream, side="right") - 1
        return np.pad(document, (0, self.length - len(stream)), constant_values=-1)

    def spans(self, index: int) -> list[Span]:
        """The part of a document that each segment of sequence `index` holds, in order."""
        return [span for _, span in self.documents_and_spans(index)]

    def documents_and_spans(self, index: int) -> list[tuple[int, Span]]:
        """Like `spans`, each with the index of its document in this source."""
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
    """(first byte, byte after the last) of the text of [bos, tokens..., eos][start:end].

    `byte_lengths` [vocabulary] is the number of bytes of each token, 0 for bos and eos.
    """
    first = int(byte_lengths[document[:start]].sum())
    return first, first + int(byte_lengths[document[start:end]].sum())
