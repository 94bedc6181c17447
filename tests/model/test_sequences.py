"""The compression windows of packed rows and of decoding calls, against counting."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from xushi.model import LatentCache, ModelConfig
from xushi.model.sequences import completed_windows, sliding_window, windows_of

V4 = ModelConfig(
    model_type="deepseek_v4",
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    q_lora_rank=2,
    head_dim=4,
    qk_rope_head_dim=2,
    o_groups=1,
    o_lora_rank=2,
    compress_ratios=[0],
    num_hash_layers=0,
    index_head_dim=2,
    num_nextn_predict_layers=0,
    n_routed_experts=8,
)


@given(
    rows=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=3),
    rate=st.integers(1, 5),
    padding=st.integers(0, 4),
)
def test_windows_of_packed_rows(rows: list[list[int]], rate: int, padding: int) -> None:
    length = max(map(sum, rows)) + padding
    positions, segments = (
        torch.zeros(len(rows), length, dtype=torch.int64),
        torch.full((len(rows), length), -1),
    )
    for row, documents in enumerate(rows):
        start = 0
        for number, size in enumerate(documents):
            positions[row, start : start + size] = torch.arange(size)
            segments[row, start : start + size] = number
            start += size
    windows = windows_of(positions, segments, rate, lambda positions: (positions, positions))
    members, has_previous, visible, first = (
        windows.members_BWM,
        windows.has_previous_BW,
        windows.visible_BTW,
        windows.angles[0],
    )
    assert visible.shape == (len(rows), length, length // rate)
    for row, documents in enumerate(rows):
        expected, start = [], 0  # (first token's place, number in its document, document)
        for number, size in enumerate(documents):
            expected += [(start + w * rate, w, number) for w in range(size // rate)]
            start += size
        for e, (place, w, number) in enumerate(expected):
            assert members[row, e, rate:].tolist() == list(range(place, place + rate))
            assert bool(has_previous[row, e]) == (w > 0) and int(first[row, e]) == w * rate
            if w:
                assert members[row, e, :rate].tolist() == list(range(place - rate, place))
            for t in range(length):
                sees = int(segments[row, t]) == number and t >= place + rate - 1
                assert bool(visible[row, t, e]) == sees
        # Padding tokens do not matter: their segment is their own.
        surplus = visible[row, :, len(expected) :]
        assert not surplus[segments[row] >= 0].any()


@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=6), rate=st.integers(1, 5))
def test_windows_that_a_call_completes(sizes: list[int], rate: int) -> None:
    """Every window is completed once, by the call with its last token, whatever the chunks are."""
    cache, held = LatentCache(V4, 100), 0
    first, second = cache.allocate(), cache.allocate()
    cache.extend([(second, [1] * 3)])
    done: list[int] = []
    slots: list[int] = []
    for size in sizes:
        flat = cache.extend([(second, [1] * 2), (first, [1] * size)])
        slots += flat.slots_N[flat.rows_N == 1].tolist()
        new = completed_windows(flat, rate, lambda positions: (positions, positions))
        members, has_previous, closing, places = (
            new.members_WM,
            new.has_previous_W,
            new.slots_W,
            new.angles[0],
        )
        own = [i for i, slot in enumerate(closing.tolist()) if slot in slots]
        for i in own:
            w = int(places[i]) // rate
            done.append(w)
            assert members[i, rate:].tolist() == slots[w * rate : (w + 1) * rate]
            assert bool(has_previous[i]) == (w > 0)
            if w:
                assert members[i, :rate].tolist() == slots[(w - 1) * rate : w * rate]
        held += size
    assert done == list(range(held // rate))


def test_the_sliding_window() -> None:
    """A query attends to itself and the window - 1 tokens before it, within its document."""
    positions, segments = (
        torch.tensor([[0, 1, 2, 0, 1, 2, 3]]),
        torch.tensor([[0, 0, 0, 1, 1, 1, 1]]),
    )
    for window in (1, 2, 3, 99):
        got = sliding_window(positions, segments, window)
        for t in range(7):
            for s in range(7):
                want = s <= t and t - s < window and segments[0, t] == segments[0, s]
                assert bool(got[0, t, s]) == bool(want)
