"""The router against a loop over tokens, groups and experts, with negative biases too."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from xushi.ops import sigmoid_router, softmax_router, sqrt_softplus_router


def choose(biased: list[float], groups: int, top_groups: int, top_k: int) -> list[int]:
    """Experts of the best groups by the sum of their two best biased scores, then the best of those
    experts.
    """
    size = len(biased) // groups
    members = [list(range(g * size, (g + 1) * size)) for g in range(groups)]
    value = [sum(sorted((biased[e] for e in group), reverse=True)[:2]) for group in members]
    best = sorted(range(groups), key=lambda g: -value[g])[:top_groups]
    allowed = [e for g in best for e in members[g]]
    return sorted(allowed, key=lambda e: -biased[e])[:top_k]


def brute_force(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    top_k: int,
    groups: int,
    top_groups: int,
    normalise: bool,
    scale: float,
) -> tuple[list[list[int]], Tensor]:
    """(choice, gate values [N, k]) in x's dtype: eqs. 12-16, token by token."""
    choices, rows = [], []
    for token in x:
        scores = [torch.sigmoid(token @ row) for row in weight]
        chosen = choose(
            [float(s.detach()) + float(b) for s, b in zip(scores, bias, strict=True)],
            groups,
            top_groups,
            top_k,
        )
        total = sum(scores[e] for e in chosen) if normalise else 1.0
        choices.append(chosen)
        rows.append(torch.stack([scale * scores[e] / total for e in chosen]))
    return choices, torch.stack(rows)


@st.composite
def settings_(draw: st.DrawFn) -> dict:
    groups, size = draw(st.sampled_from([1, 2, 3, 4])), draw(st.integers(2, 4))
    top_groups = draw(st.integers(1, groups))
    return {
        "experts": groups * size,
        "groups": groups,
        "top_groups": top_groups,
        "top_k": draw(st.integers(1, top_groups * size)),
        "normalise": draw(st.booleans()),
        "scale": draw(st.sampled_from([1.0, 2.5])),
        "shift": draw(st.sampled_from([0.0, -2.0, 1.0])),
        "tokens": draw(st.integers(1, 20)),
        "width": draw(st.integers(1, 30)),
    }


@given(options=settings_(), seed=st.integers(0, 2**31))
def test_choice_values_and_gradients(options: dict, seed: int, within, leaves) -> None:
    g = torch.Generator().manual_seed(seed)
    experts, tokens, width = (options.pop(name) for name in ("experts", "tokens", "width"))
    x, weight = (
        torch.randn(tokens, width, generator=g),
        torch.randn(experts, width, generator=g) / width**0.5,
    )
    # Biases well below -1 make every biased score negative: a group masked with 0 instead of -inf
    # would then win.
    bias = torch.randn(experts, generator=g) * 0.3 + options.pop("shift")
    d_weights = torch.randn(tokens, options["top_k"], generator=g)
    exact = leaves(torch.float64, x, weight)
    choices, want = brute_force(*exact, bias.double(), **options)
    want.backward(d_weights.double())

    fast = leaves(torch.float32, x, weight)
    free = sigmoid_router(*fast, bias, **options)
    assert [set(row) for row in free.indices_Nk.tolist()] == [set(row) for row in choices]
    got = sigmoid_router(*fast, bias, **options, pinned_Nk=torch.tensor(choices))
    got.weights_Nk.backward(d_weights)
    # A sigmoid's slope s (1 - s) is at most 1/4. Counted are D roundings of a logit's terms, k of
    # the sum, and a dozen others.
    reach = 1 + float((x.double().abs() @ weight.double().abs().T).max())
    roundings = (2 * width + options["top_k"] + experts + tokens + 16) * reach
    within(
        "scores",
        got.scores_NE.detach(),
        (x.double() @ weight.double().T).sigmoid(),
        torch.ones(tokens, experts).double(),
        roundings,
    )
    within("gate values", got.weights_Nk.detach(), want.detach(), want.detach(), roundings)
    d_logit = (
        options["scale"]
        * d_weights.double().abs().sum(1, keepdim=True)
        / (
            1
            if not options["normalise"]
            else want.detach().new_tensor(
                [
                    [(x.double()[n] @ weight.double()[row].T).sigmoid().sum()]
                    for n, row in enumerate(choices)
                ]
            )
        )
    )
    within(
        "gradient of x",
        fast[0].grad,
        exact[0].grad,
        d_logit * weight.double().abs().sum(0),
        roundings,
    )
    within(
        "gradient of the weight",
        fast[1].grad,
        exact[1].grad,
        (d_logit * x.double().abs()).sum(0).expand(experts, -1),
        roundings,
    )


@given(
    seed=st.integers(0, 2**31),
    groups=st.integers(1, 4),
    size=st.integers(1, 4),
    tokens=st.integers(1, 20),
    data=st.data(),
)
def test_softmax_choice_and_values(
    seed: int, groups: int, size: int, tokens: int, data: st.DataObject, within
) -> None:
    """V2: a group counts by its best expert; gate values are the softmax over all experts, not
    normalised again.
    """
    top_groups = data.draw(st.integers(1, groups))
    top_k = data.draw(st.integers(1, top_groups * size))
    g = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(tokens, 7, generator=g), torch.randn(groups * size, 7, generator=g)
    scores = torch.stack([(weight.double() @ token).softmax(0) for token in x.double()])
    chosen = []
    for row in scores.tolist():
        members = [range(i * size, (i + 1) * size) for i in range(groups)]
        best = sorted(members, key=lambda group: -max(row[e] for e in group))[:top_groups]
        chosen.append(sorted((e for group in best for e in group), key=lambda e: -row[e])[:top_k])
    got = softmax_router(x, weight, top_k=top_k, groups=groups, top_groups=top_groups, scale=16.0)
    assert [set(row) for row in got.indices_Nk.tolist()] == [set(row) for row in chosen]
    # A logit's error is 7 roundings of its terms; a score's is twice that, plus the sum's.
    roundings = 14 * float((x.double().abs() @ weight.double().abs().T).max()) + groups * size + 8
    want = 16 * scores.gather(1, got.indices_Nk)
    within("gate values", got.weights_Nk, want, want, roundings)


def test_masking_excluded_groups_with_zero_would_show() -> None:
    """A case where masking with 0 instead of -inf fails: all biased scores of the best group are
    negative.
    """
    x, weight = torch.ones(1, 1), torch.tensor([[0.1], [0.2], [0.3], [0.4]])
    # The groups' scores are about -8.9 and -9.7, so the first is best.
    bias = torch.tensor([-5.0, -5.0, -1.0, -9.9])
    choice = sigmoid_router(
        x, weight, bias, top_k=2, groups=2, top_groups=1, normalise=True, scale=1.0
    )
    assert set(choice.indices_Nk[0].tolist()) == {0, 1}
    biased = (x @ weight.T).sigmoid() + bias
    with_zero = (
        biased.where(torch.tensor([True, True, False, False]), 0.0).topk(2).indices[0].tolist()
    )
    assert set(with_zero) != {0, 1}, "this case would not tell the two apart"


@given(seed=st.integers(0, 2**31))
def test_the_bias_steers_the_choice_and_never_the_values(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(9, 5, generator=g), torch.randn(8, 5, generator=g)
    options = {"top_k": 3, "groups": 2, "top_groups": 2, "normalise": True, "scale": 1.0}
    plain = sigmoid_router(x, weight, torch.zeros(8), **options)
    shifted = sigmoid_router(x, weight, torch.full((8,), -3.0), **options)
    assert torch.equal(plain.indices_Nk, shifted.indices_Nk) and torch.equal(
        plain.weights_Nk, shifted.weights_Nk
    )
    favoured = sigmoid_router(x, weight, torch.tensor([9.0] + [0.0] * 7), **options)
    assert (favoured.indices_Nk == 0).any(1).all()
    torch.testing.assert_close(favoured.weights_Nk.sum(1), torch.ones(9))


def test_every_token_to_the_same_experts_and_one_token() -> None:
    bias = torch.tensor([0.0, 50.0, 0.0, 50.0])
    for tokens in (1, 33):
        x = torch.randn(tokens, 6, generator=torch.Generator().manual_seed(tokens))
        choice = sigmoid_router(
            x, torch.eye(4, 6), bias, top_k=2, groups=1, top_groups=1, normalise=False, scale=2.0
        )
        assert (choice.indices_Nk.sort().values == torch.tensor([1, 3])).all()
        torch.testing.assert_close(choice.weights_Nk, 2 * x.sigmoid().gather(1, choice.indices_Nk))


@given(seed=st.integers(0, 2**31))
def test_scores_are_float32_whatever_comes_in(seed: int) -> None:
    """With bfloat16 activations and a float32 weight, the product is not computed in bfloat16."""
    g = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(12, 64, generator=g).bfloat16(), torch.randn(8, 64, generator=g) / 8
    choice = sigmoid_router(
        x, weight, torch.zeros(8), top_k=2, groups=1, top_groups=1, normalise=True, scale=1.0
    )
    exact = (x.double() @ weight.double().T).sigmoid()
    assert choice.scores_NE.dtype == choice.weights_Nk.dtype == torch.float32
    assert (choice.scores_NE - exact).abs().max() <= 1e-5
    coarse = (x @ weight.bfloat16().T).float().sigmoid()
    assert (coarse - exact).abs().max() > 1e-4, "this case would not tell the two apart"


def test_ten_runs_on_two_threads_give_the_same_bits(two_threads, leaves) -> None:
    g = torch.Generator().manual_seed(11)
    inputs = torch.randn(5000, 64, generator=g), torch.randn(16, 64, generator=g) / 8
    first: list[Tensor] = []
    for _ in range(10):
        x, weight = leaves(torch.float32, *inputs)
        choice = sigmoid_router(
            x, weight, torch.zeros(16), top_k=4, groups=4, top_groups=2, normalise=True, scale=1.0
        )
        (choice.weights_Nk.square().sum() + choice.scores_NE.square().mean()).backward()
        now = [choice.indices_Nk, choice.weights_Nk.detach(), x.grad, weight.grad]
        first = first or now
        assert all(torch.equal(a, b) for a, b in zip(now, first, strict=True))


def test_pinned_choices_are_taken_as_they_are() -> None:
    g = torch.Generator().manual_seed(12)
    x, weight = torch.randn(5, 3, generator=g), torch.randn(6, 3, generator=g)
    pinned = torch.tensor([[5, 0]] * 5)
    choice = sigmoid_router(
        x,
        weight,
        torch.full((6,), -9.0),
        top_k=2,
        groups=3,
        top_groups=1,
        normalise=False,
        scale=1.0,
        pinned_Nk=pinned,
    )
    assert torch.equal(choice.indices_Nk, pinned)
    torch.testing.assert_close(choice.weights_Nk, (x @ weight.T).sigmoid()[:, [5, 0]])
    with pytest.raises(RuntimeError):  # an expert that does not exist
        sigmoid_router(
            x,
            weight,
            torch.zeros(6),
            top_k=2,
            groups=1,
            top_groups=1,
            normalise=False,
            scale=1.0,
            pinned_Nk=torch.tensor([[6, 0]] * 5),
        )


def test_rows_of_minus_one_choose_for_themselves() -> None:
    g = torch.Generator().manual_seed(13)
    x, weight = torch.randn(5, 3, generator=g), torch.randn(6, 3, generator=g)
    for router in (
        partial(
            sigmoid_router, bias_E=torch.zeros(6), groups=3, top_groups=2, normalise=True, scale=2.0
        ),
        partial(softmax_router, groups=3, top_groups=2, scale=2.0),
        partial(sqrt_softplus_router, bias_E=None, scale=2.0),
    ):
        free = router(x, weight, top_k=2)
        pinned = torch.tensor([[5, 0], [-1, -1], [1, 2], [-1, -1], [0, 5]])
        choice = router(x, weight, top_k=2, pinned_Nk=pinned)
        assert torch.equal(choice.indices_Nk[[0, 2, 4]], pinned[[0, 2, 4]])
        assert torch.equal(choice.indices_Nk[[1, 3]], free.indices_Nk[[1, 3]])
        assert torch.equal(choice.weights_Nk[[1, 3]], free.weights_Nk[[1, 3]])


@given(
    seed=st.integers(0, 2**31),
    experts=st.integers(1, 6),
    tokens=st.integers(1, 5),
    biased=st.booleans(),
)
def test_v4s_router_against_loops(seed: int, experts: int, tokens: int, biased: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(n, 3, generator=g, dtype=torch.float64) for n in (tokens, experts))
    bias = torch.randn(experts, generator=g).double() if biased else None
    top_k = 1 + seed % experts
    got = sqrt_softplus_router(x, weight, bias, top_k=top_k, scale=1.5)
    for n in range(tokens):
        scores = [(1 + (x[n] @ row).exp()).log().sqrt() for row in weight]
        order = sorted(
            range(experts),
            key=lambda e: -float(scores[e]) - (0 if bias is None else float(bias[e])),
        )
        assert set(got.indices_Nk[n].tolist()) == set(order[:top_k])
        total = sum(scores[e] for e in order[:top_k])
        for place, e in enumerate(got.indices_Nk[n].tolist()):
            torch.testing.assert_close(
                got.weights_Nk[n, place], 1.5 * scores[e] / total, rtol=1e-10, atol=0
            )


def test_v4s_router_far_below_zero_has_finite_gradients() -> None:
    """There softplus is exactly 0 and the square root's slope infinite. The gradient must not be 0
    * inf, also for experts that were not chosen.
    """
    x, weight = torch.tensor([[1.0]]), torch.tensor([[2.0], [-500.0], [1.0]], requires_grad=True)
    choice = sqrt_softplus_router(x, weight, None, top_k=2, scale=1.0)
    (choice.weights_Nk.sum() + choice.scores_NE.sum()).backward()
    assert weight.grad.isfinite().all() and choice.indices_Nk.sort().values.tolist() == [[0, 2]]


def test_v4s_hash_layers_weigh_what_the_table_says() -> None:
    x, weight = torch.randn(4, 3), torch.randn(5, 3)
    pinned = torch.tensor([[4, 0], [1, 2], [3, 4], [0, 1]])
    choice = sqrt_softplus_router(x, weight, None, top_k=2, scale=2.0, pinned_Nk=pinned)
    assert torch.equal(choice.indices_Nk, pinned)
    torch.testing.assert_close(choice.weights_Nk.sum(-1), torch.full((4,), 2.0))
