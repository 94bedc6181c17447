"""Packing against its definition written with lists; spans and byte spans against the text."""

from itertools import chain

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from xushi.data.packing import PackedSource, Span, byte_span

BOS, EOS, PAD = 0, 1, 2
DOCUMENTS = st.lists(st.lists(st.integers(3, 99), max_size=12), min_size=1, max_size=10)


def pack(documents: list[list[int]], length: int) -> PackedSource:
    full = [[BOS, *document, EOS] for document in documents]
    starts = np.cumsum([0, *map(len, full)])
    uids = [bytes([i]) * 16 for i in range(len(full))]
    return PackedSource(np.array(list(chain(*full)), dtype=np.uint16), starts, uids, length, PAD)


@settings(max_examples=120, deadline=None)
@given(documents=DOCUMENTS, length=st.integers(2, 9))
def test_sequences_are_the_stream_cut_every_t(documents: list[list[int]], length: int) -> None:
    stream = [
        (d, token, target)
        for d, document in enumerate(documents)
        for token, target in zip([BOS, *document], [*document, EOS], strict=True)
    ]
    packed = pack(documents, length)
    assert packed.targets == len(stream) and packed.sequences == -(-len(stream) // length)
    for index in range(packed.sequences):
        piece = stream[index * length : (index + 1) * length]
        fill = length - len(piece)
        sequence = packed.sequence(index)
        assert sequence.tokens_T.tolist() == [token for _, token, _ in piece] + [PAD] * fill
        assert sequence.targets_T.tolist() == [target for _, _, target in piece] + [PAD] * fill
        assert sequence.loss_mask_T.tolist() == [True] * len(piece) + [False] * fill
        assert sequence.segments_T.tolist() == [d - piece[0][0] for d, _, _ in piece] + [-1] * fill
        of = [d for d, _, _ in piece]
        assert (
            sequence.positions_T.tolist()
            == [of[:i].count(d) for i, d in enumerate(of)] + [0] * fill
        )


@settings(max_examples=120, deadline=None)
@given(documents=DOCUMENTS, length=st.integers(2, 9))
def test_spans_name_every_segment_and_every_target_once(
    documents: list[list[int]], length: int
) -> None:
    packed = pack(documents, length)
    targets = []
    for index in range(packed.sequences):
        sequence, spans = packed.sequence(index), packed.spans(index)
        assert len(spans) == sequence.segments_T.max() + 1
        for segment, span in enumerate(spans):
            document = [BOS, *documents[span.uid[0]], EOS]
            mine = sequence.segments_T == segment
            assert sequence.tokens_T[mine].tolist() == document[span.start : span.end]
            assert sequence.targets_T[mine].tolist() == document[span.start + 1 : span.end + 1]
            targets += [(span.uid[0], place) for place in range(span.start + 1, span.end + 1)]
    assert sorted(targets) == [
        (d, place) for d, document in enumerate(documents) for place in range(1, len(document) + 2)
    ]


def test_document_that_fills_a_sequence_leaves_no_empty_span() -> None:
    packed = pack([[3, 4, 5], [6, 7, 8]], 4)
    assert packed.spans(0) == [Span(bytes([0]) * 16, 0, 4)]
    assert packed.spans(1) == [Span(bytes([1]) * 16, 0, 4)]


def test_byte_span() -> None:
    document = np.array([BOS, 3, 4, 3, EOS], dtype=np.uint16)
    lengths = np.array([0, 0, 0, 2, 5])
    assert byte_span(document, lengths, 0, 1) == (0, 0)
    assert byte_span(document, lengths, 1, 3) == (0, 7)
    assert byte_span(document, lengths, 2, 5) == (2, 9)
