"""The indexer's scores, choice and divergence against loops, and the fast form against the
reference in float64.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from xushi.ops import (
    attention_shares,
    best_keys,
    index_divergence,
    index_scores,
    index_scores_reference,
)


def random_inputs(
    seed: int, batch: int, queries: int, keys: int, heads: int, width: int
) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()
        for shape in ((batch, queries, heads, width), (batch, keys, width), (batch, queries, heads))
    ]


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    queries=st.sampled_from([1, 5, 130]),
    keys=st.integers(0, 9),
    heads=st.integers(1, 3),
    width=st.integers(1, 5),
)
def test_scores_and_gradients(seed: int, queries: int, keys: int, heads: int, width: int) -> None:
    fast, plain = (random_inputs(seed, 2, queries, keys, heads, width) for _ in range(2))
    got, want = index_scores(*fast), index_scores_reference(*plain)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    d_scores = torch.randn(
        want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    for scores in (got, want):
        scores.backward(d_scores)
    for a, b in zip(fast, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12)


def test_scores_are_equation_1() -> None:
    q, k, w = (x.detach() for x in random_inputs(3, 1, 4, 5, 2, 3))
    got = index_scores_reference(q, k, w)
    for t in range(4):
        for s in range(5):
            want = sum(
                float(w[0, t, j]) * max(0.0, float(q[0, t, j] @ k[0, s]) / 3**0.5) for j in range(2)
            )
            assert float(got[0, t, s]) == pytest.approx(want, rel=1e-12, abs=1e-15)


@given(data=st.data(), keys=st.integers(1, 12), count=st.integers(1, 14))
def test_the_choice_is_by_score_and_then_by_place(
    data: st.DataObject, keys: int, count: int
) -> None:
    """Against a stable sort. Few different scores, so that ties are common."""
    scores = data.draw(
        st.lists(st.sampled_from([-1.0, 0.0, 0.0, 0.5, 2.0]), min_size=keys, max_size=keys)
    )
    allowed = data.draw(st.lists(st.booleans(), min_size=keys, max_size=keys))
    chosen = best_keys(torch.tensor([scores]), torch.tensor([allowed]), count)[0].tolist()
    order = sorted((s for s in range(keys) if allowed[s]), key=lambda s: (-scores[s], s))
    assert [s for s in range(keys) if chosen[s]] == sorted(order[:count])


def test_the_choice_does_not_depend_on_later_keys() -> None:
    """Keys after the query change nothing, so a whole sequence and a growing cache choose alike."""
    scores = torch.zeros(1, 7)
    few = best_keys(scores[:, :5], torch.ones(1, 5, dtype=torch.bool), 3)
    more = best_keys(scores, torch.tensor([[True] * 5 + [False] * 2]), 3)
    assert few[0].tolist() == more[0, :5].tolist() == [True, True, True, False, False]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), queries=st.sampled_from([3, 131]), heads=st.integers(1, 3))
def test_shares_are_the_attentions_mean_over_heads(seed: int, queries: int, heads: int) -> None:
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(1, heads, queries, 4, generator=g, dtype=torch.float64) for _ in range(2))
    mask = (torch.rand(1, queries, queries, generator=g) < 0.5) | torch.eye(
        queries, dtype=torch.bool
    )
    got = attention_shares(q, k, mask, 0.3)
    want = (q @ k.mT * 0.3).masked_fill(~mask[:, None], float("-inf")).softmax(-1).sum(1)
    torch.testing.assert_close(got, want / want.sum(-1, keepdim=True), rtol=1e-12, atol=1e-14)


def test_divergence_and_its_gradient() -> None:
    """KL(p || softmax(scores)) over the allowed keys. A query without allowed keys gives zero and
    not NaN.
    """
    g = torch.Generator().manual_seed(5)
    scores = torch.randn(1, 4, 6, generator=g, dtype=torch.float64).requires_grad_()
    mask = torch.tensor([[[True] * 6, [True] * 3 + [False] * 3, [False] * 6, [False, True] * 3]])
    shares = torch.rand(1, 4, 6, generator=g, dtype=torch.float64) * mask
    shares = shares / shares.sum(-1, keepdim=True).clamp(min=1e-30)
    got = index_divergence(scores, shares, mask)
    for t in (0, 1, 3):
        p, s = shares[0, t][mask[0, t]], scores[0, t][mask[0, t]].detach()
        want = sum(float(p[i] * (p[i].log() - s.log_softmax(0)[i])) for i in range(len(p)))
        assert float(got[0, t].detach()) == pytest.approx(want, rel=1e-12)
    assert got[0, 2] == 0
    got.sum().backward()
    # The gradient is q - p.
    expected = scores.detach().masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num() - shares
    torch.testing.assert_close(scores.grad, expected, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(lambda x: index_divergence(x, shares, mask), scores)


def test_ten_times_on_two_threads(two_threads) -> None:
    """Scores, gradients and choice are bit-identical."""
    inputs = random_inputs(9, 2, 300, 300, 4, 16)
    allowed = torch.ones(300, 300, dtype=torch.bool).tril()
    seen = []
    for _ in range(10):
        leaves = [x.detach().float().requires_grad_() for x in inputs]
        scores = index_scores(*leaves)
        scores.sum().backward()
        seen.append(
            [scores.detach(), best_keys(scores, allowed, 40), *(leaf.grad for leaf in leaves)]
        )
    assert all(torch.equal(a, b) for later in seen[1:] for a, b in zip(seen[0], later, strict=True))
