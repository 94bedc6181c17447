"""V4's attention with shared keys, sinks and windows: against loops, and the fast form against the
reference.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from xushi.ops import (
    MaskedKeys,
    entry_shares,
    shared_attention,
    windowed_attention,
    windowed_attention_reference,
)


def test_against_loops() -> None:
    g = torch.Generator().manual_seed(1)
    q, keys = (
        torch.randn(1, 3, 2, 4, generator=g, dtype=torch.float64),
        torch.randn(1, 5, 4, generator=g, dtype=torch.float64),
    )
    allowed = torch.tensor([[[True] * 5, [False, True, False, True, False], [False] * 5]])
    sinks = torch.tensor([0.7, -2.0], dtype=torch.float64)
    got = shared_attention(q, keys, allowed, sinks, 0.5)
    for t in range(3):
        for h in range(2):
            seen = [s for s in range(5) if allowed[0, t, s]]
            weights = {s: float((q[0, t, h] @ keys[0, s] * 0.5).exp()) for s in seen}
            total = sum(weights.values()) + float(sinks[h].exp())
            want = sum(
                (weights[s] / total * keys[0, s] for s in seen), torch.zeros(4, dtype=torch.float64)
            )
            torch.testing.assert_close(got[0, t, h], want, rtol=1e-12, atol=1e-14)
    assert not got[0, 2].any()  # all of it went to the sink


def inputs_of(
    seed: int, length: int, heads: int, window: int, entries: int
) -> tuple[list[Tensor], Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    leaves = [
        torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()
        for shape in ((2, length, heads, 3), (2, length, 3), (2, entries, 3), (heads,))
    ]
    place = torch.arange(length)
    near = (place <= place[:, None]) & (place > place[:, None] - window)
    window_BTT = near & (torch.rand(2, length, length, generator=g) < 0.8)
    return leaves, window_BTT, torch.rand(2, length, entries, generator=g) < 0.5


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    length=st.sampled_from([1, 7, 130, 260]),
    heads=st.integers(1, 2),
    window=st.sampled_from([1, 5, 127, 128, 129, 1000]),
    entries=st.sampled_from([0, 3]),
)
def test_blocks_are_the_whole(
    seed: int, length: int, heads: int, window: int, entries: int
) -> None:
    """Values and gradients. A block could lose a key at the borders of its windows."""
    fast, window_BTT, chosen = inputs_of(seed, length, heads, window, entries)
    plain = [x.detach().clone().requires_grad_() for x in fast]

    def run(form, q, kv, pooled, sinks, *more):
        tokens = MaskedKeys(kv, window_BTT)
        return form(q, tokens, MaskedKeys(pooled, chosen), sinks, 0.4, *more)

    got, want = run(windowed_attention, *fast, window), run(windowed_attention_reference, *plain)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)
    d_out = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for out in (got, want):
        out.backward(d_out)
    for a, b in zip(fast, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)


def test_gradients() -> None:
    leaves, window_BTT, chosen = inputs_of(4, 4, 2, 2, 3)
    assert torch.autograd.gradcheck(
        lambda q, kv, pooled, sinks: windowed_attention(
            q, MaskedKeys(kv, window_BTT), MaskedKeys(pooled, chosen), sinks, 0.4, 2
        ),
        leaves,
    )


@pytest.mark.parametrize("length", [5, 140])
def test_shares_of_entries(length: int) -> None:
    """Shares come from the whole softmax, tokens and sink included: heads that attend elsewhere
    count less.
    """
    (q, kv, pooled, sinks), window_BTT, chosen = inputs_of(6, length, 2, 3, 4)
    tokens = MaskedKeys(kv, window_BTT)
    got = entry_shares(q, tokens, MaskedKeys(pooled, chosen), sinks, 0.4, 3)
    keys, allowed = torch.cat((kv, pooled), 1), torch.cat((window_BTT, chosen), -1)
    scores = torch.einsum("bthk,bsk->bhts", q, keys) * 0.4
    scores = scores.masked_fill(~allowed[:, None], float("-inf"))
    whole = torch.cat((scores, sinks.view(1, 2, 1, 1).expand(2, 2, length, 1)), -1).softmax(-1)
    on_entries = whole[..., length:-1].sum(1)
    some = chosen.any(-1)
    torch.testing.assert_close(
        got[some], (on_entries / on_entries.sum(-1, keepdim=True))[some], rtol=1e-12, atol=1e-14
    )
    assert not got[~some].any()


def test_ten_times_on_two_threads(two_threads) -> None:
    """Values and gradients, bit by bit."""
    (q, kv, pooled, sinks), window_BTT, chosen = inputs_of(7, 300, 4, 50, 70)
    d_out = torch.randn(q.shape, generator=torch.Generator().manual_seed(2))
    seen = []
    for _ in range(10):
        leaves = [x.detach().float().requires_grad_() for x in (q, kv, pooled, sinks)]
        tokens = MaskedKeys(leaves[1], window_BTT)
        entries = MaskedKeys(leaves[2], chosen)
        out = windowed_attention(leaves[0], tokens, entries, leaves[3], 0.4, 50)
        out.backward(d_out)
        seen.append([out.detach(), *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(a, b) for later in seen[1:] for a, b in zip(seen[0], later, strict=True))
