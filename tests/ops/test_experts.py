"""The sorted form of the routed experts against the reference in float64; padding rows must have no
effect.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from xushi.ops import experts, routed_experts, routed_experts_reference

pytestmark = pytest.mark.usefixtures("form")


@st.composite
def cases(draw: st.DrawFn, tokens: int = 70) -> tuple[Tensor, ...]:
    """x [N, D], distinct experts [N, k], gate values [N, k], weights, and the gradient of the
    result [N, D].
    """
    n, experts_ = draw(st.integers(1, tokens)), draw(st.integers(1, 7))
    k = draw(st.integers(1, min(4, experts_)))
    d, f = draw(st.integers(1, 41)), draw(st.integers(1, 33))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    # No token chooses the other experts. With used == k all tokens choose the same experts.
    used = draw(st.integers(k, experts_))
    names = torch.randperm(experts_, generator=g)[:used]
    choice = names[torch.rand(n, used, generator=g).argsort(1)[:, :k]]
    return (
        torch.randn(n, d, generator=g),
        choice,
        torch.rand(n, k, generator=g) * 2,
        torch.randn(experts_, 2 * f, d, generator=g) / d**0.5,
        torch.randn(experts_, d, f, generator=g) / f**0.5,
        torch.randn(n, d, generator=g),
    )


def magnitude(x: Tensor, choice: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The reference with every term made positive, and silu replaced by a polynomial whose value
    and slope bound the errors that silu and its slope propagate: |silu(g)| <= |g|, |silu'| <= 1.1,
    |silu''| <= 1/2.
    """
    out = torch.zeros_like(x)
    for expert in range(gate_up.shape[0]):
        token, place = torch.where(choice == expert)
        gate, up = (x[token] @ gate_up[expert].T).chunk(2, dim=-1)
        y = ((1.1 * gate + 0.5 * gate.square()) * up) @ down[expert].T
        out = out.index_add(0, token, y * weights[token, place][:, None])
    return out


def check_against_float64(
    case: tuple[Tensor, ...], within, leaves, dtype: torch.dtype = torch.float32
) -> None:
    x, choice, weights, gate_up, down, d_out = case
    x, d_out = x.to(dtype), d_out.to(dtype)
    fast = leaves(dtype, x) + leaves(torch.float32, weights, gate_up, down)
    exact = leaves(torch.float64, x, weights, gate_up, down)
    sizes = leaves(torch.float64, *(t.abs() for t in (x, weights, gate_up, down)))
    results = []
    for form, (x_, w_, gu_, dn_), direction in (
        (routed_experts, fast, d_out),
        (routed_experts_reference, exact, d_out.double()),
        (magnitude, sizes, d_out.double().abs()),
    ):
        y = form(x_, choice, w_, gu_, dn_)
        y.backward(direction)
        results.append(y.detach())
    # Sums: over D for the gate and up products, over F for y, over k for a token; in the backward
    # pass over D again, and over an expert's rows for its weights. silu and its slope are a dozen
    # operations.
    roundings = 3 * x.shape[1] + down.shape[2] + x.shape[0] + choice.shape[1] + 16
    # Rounded to bfloat16 on the longest paths, forward: gate_up, h, the activation, down and the
    # output. Backward: gate_up and h, once each for silu, its slope and the other factor; then
    # down, dh, gate_up and the gradient.
    halves = (5, 10) if dtype == torch.bfloat16 else (0, 0)
    within("output", *results, roundings, halves[0])
    for name, got, want, size in zip(
        ("x", "weights", "gate_up", "down"), fast, exact, sizes, strict=True
    ):
        within(f"gradient of {name}", got.grad, want.grad, size.grad, roundings, halves[1])


@given(case=cases())
def test_values_and_gradients(case, within, leaves) -> None:
    check_against_float64(case, within, leaves)


@pytest.mark.usefixtures("compiled_bfloat16")
@given(case=cases())
def test_compiled_bfloat16(case, within, leaves) -> None:
    check_against_float64(case, within, leaves, torch.bfloat16)


@given(case=cases(), large=st.sampled_from([1e3, 1e6]))
def test_padding_rows_leave_no_trace(case, large: float, within, leaves) -> None:
    """Padding rows repeat token 0. If token 0 is huge, any leak into another token's output, or
    into the gradient of an expert that it did not choose, far exceeds the bound of those rows.
    """
    x, *rest, d_out = case
    x, d_out = x.clone(), d_out.clone()
    x[0] *= large
    d_out[0] *= large
    check_against_float64((x, *rest, d_out), within, leaves)


def test_many_rows_at_once(within, leaves) -> None:
    g = torch.Generator().manual_seed(0)
    choice = torch.rand(700, 6, generator=g).argsort(1)[:, :2]
    check_against_float64(
        (
            torch.randn(700, 24, generator=g),
            choice,
            torch.rand(700, 2, generator=g),
            torch.randn(6, 26, 24, generator=g) / 5,
            torch.randn(6, 24, 13, generator=g) / 4,
            torch.randn(700, 24, generator=g),
        ),
        within,
        leaves,
    )


def test_an_expert_that_nobody_chose_has_a_zero_gradient(leaves) -> None:
    g = torch.Generator().manual_seed(1)
    x, w, gate_up, down = leaves(
        torch.float32,
        torch.randn(9, 5, generator=g),
        torch.rand(9, 2, generator=g),
        torch.randn(4, 6, 5, generator=g),
        torch.randn(4, 5, 3, generator=g),
    )
    routed_experts(x, torch.tensor([[0, 3]] * 9), w, gate_up, down).sum().backward()
    for parameter in (gate_up, down):
        assert not parameter.grad[[1, 2]].any() and parameter.grad[[0, 3]].abs().amax((1, 2)).all()


@given(
    choice=st.lists(st.integers(0, 5), min_size=1, max_size=100),
    multiple=st.sampled_from([1, 4, 32]),
)
def test_sorting_places_every_row_once(choice: list[int], multiple: int) -> None:
    indices = torch.tensor(choice)[:, None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts, "ROW_MULTIPLE", multiple)
        rows, real, bounds = experts.sort_by_expert(indices, 6)
    assert sorted(rows[real].tolist()) == list(range(len(choice)))
    assert not rows[~real].any() and bounds[0] == 0 and bounds[-1] == len(rows)
    for expert in range(6):
        part = slice(bounds[expert], bounds[expert + 1])
        assert (bounds[expert + 1] - bounds[expert]) % multiple == 0
        assert (indices[rows[part][real[part]], 0] == expert).all()
        assert rows[part][real[part]].tolist() == [n for n, e in enumerate(choice) if e == expert]


def errors(
    form, dtype: torch.dtype, case: tuple[Tensor, ...], exact: list[Tensor], leaves
) -> Tensor:
    """The float64 norm of (form in `dtype` - exact) for the result and each gradient."""
    x, choice, weights, gate_up, down, d_out = case
    parameters = leaves(torch.float32, weights, gate_up, down)
    (x_,) = leaves(dtype, x)
    y = form(x_, choice, *parameters)
    y.backward(d_out.to(dtype))
    got = [y.detach(), x_.grad, *(p.grad for p in parameters)]
    return torch.stack([(a.double() - b).norm() for a, b in zip(got, exact, strict=True)])


def test_bfloat16_is_as_near_as_the_plain_form(leaves) -> None:
    """Both forms round the same products to bfloat16, at different places. Over some thousand
    elements the norms of their errors agree within a few per cent, so a factor of 1.1 allows for
    chance but not for one more rounding.
    """
    g = torch.Generator().manual_seed(2)
    choice = torch.rand(300, 8, generator=g).argsort(1)[:, :2]
    case = (
        torch.randn(300, 48, generator=g).bfloat16(),
        choice,
        torch.rand(300, 2, generator=g),
        torch.randn(8, 40, 48, generator=g) / 7,
        torch.randn(8, 48, 20, generator=g) / 4,
        torch.randn(300, 48, generator=g).bfloat16(),
    )
    x, _, weights, gate_up, down, d_out = case
    exact = leaves(torch.float64, x, weights, gate_up, down)
    y = routed_experts_reference(exact[0], choice, *exact[1:])
    y.backward(d_out.double())
    truth = [y.detach(), *(t.grad for t in exact)]
    fast = errors(routed_experts, torch.bfloat16, case, truth, leaves)
    plain = errors(routed_experts_reference, torch.bfloat16, case, truth, leaves)
    assert (fast <= 1.1 * plain).all(), (fast / plain).tolist()


def test_ten_runs_on_two_threads_give_the_same_bits(two_threads, leaves) -> None:
    g = torch.Generator().manual_seed(3)
    # The sum of two terms does not depend on their order, so three experts per token are needed.
    choice = torch.rand(3000, 8, generator=g).argsort(1)[:, :6]
    inputs = (
        torch.randn(3000, 64, generator=g),
        torch.rand(3000, 6, generator=g),
        torch.randn(8, 64, 64, generator=g),
        torch.randn(8, 64, 32, generator=g),
    )
    first: list[Tensor] = []
    for _ in range(10):
        x, w, gate_up, down = leaves(torch.float32, *inputs)
        y = routed_experts(x, choice, w, gate_up, down)
        y.square().sum().backward()
        now = [y.detach(), x.grad, w.grad, gate_up.grad, down.grad]
        first = first or now
        assert all(torch.equal(a, b) for a, b in zip(now, first, strict=True))
