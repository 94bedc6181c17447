"""The compiled kernels: linear maps, SwiGLU, AdamW and Newton-Schulz, and equal bits for any number
of threads.

The other kernels are tested with their op's test file, which runs once for each form; how they are
built is tested in test_native_build.py.
"""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from xushi.ops import (
    cross_entropy,
    linear,
    native,
    rms_norm,
    routed_experts,
    swiglu,
    swiglu_reference,
)
from xushi.ops.attention import causal_attention
from xushi.ops.linear import FEWEST_ROWS
from xushi.train.optimizer import orthogonalise

compiled = pytest.mark.skipif(native.load() is None, reason=native.status())
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


@pytest.fixture(autouse=True)
def nothing_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XUSHI_OPS", raising=False)


@compiled
@given(
    rows=st.integers(1, 700),
    outputs=st.integers(1, 300),
    inputs=st.integers(1, 300),
    bias=st.booleans(),
    dtype=dtypes,
)
def test_linear(
    rows: int, outputs: int, inputs: int, bias: bool, dtype: torch.dtype, within, leaves
) -> None:
    g, half = torch.Generator().manual_seed(rows), int(dtype == torch.bfloat16)
    tensors = [
        torch.randn(rows, inputs, generator=g).to(dtype),
        torch.randn(outputs, inputs, generator=g),
    ]
    if bias:
        tensors.append(torch.randn(outputs, generator=g))
    d_out = torch.randn(rows, outputs, generator=g).to(dtype)
    fast, exact = (
        leaves(dtype, tensors[0]) + leaves(torch.float32, *tensors[1:]),
        leaves(torch.float64, *tensors),
    )
    sizes = leaves(torch.float64, *(t.abs() for t in tensors))
    results = []
    for form, inputs_, direction in (
        (linear, fast, d_out),
        (F.linear, exact, d_out.double()),
        (F.linear, sizes, d_out.double().abs()),
    ):
        y = form(*inputs_)
        y.backward(direction)
        results.append(y.detach())
    # The weight, the bias, the product and its sum with the bias are each rounded to bfloat16. The
    # gradient of a weight is not rounded.
    few = rows < FEWEST_ROWS  # then PyTorch's form runs, which rounds weights' gradients too
    within("output", *results, inputs + 2, 4 * half)
    for name, a, b, size, halves in zip(
        ("x", "weight", "bias"), fast, exact, sizes, (2, int(few), rows), strict=False
    ):
        within(f"gradient of {name}", a.grad, b.grad, size.grad, rows + outputs + 2, halves * half)


@compiled
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 70),
    width=st.integers(1, 40),
    limit=st.sampled_from([None, 0.5, 7.0]),
    scale=st.sampled_from([0.1, 3.0, 60.0]),
    dtype=dtypes,
)
def test_swiglu(
    seed: int,
    rows: int,
    width: int,
    limit: float | None,
    scale: float,
    dtype: torch.dtype,
    within,
    leaves,
) -> None:
    g, half = torch.Generator().manual_seed(seed), int(dtype == torch.bfloat16)
    gate, up, d_out = (
        (torch.randn(rows, width, generator=g) * s).to(dtype) for s in (scale, scale, 1.0)
    )
    fast, exact = leaves(dtype, gate, up), leaves(torch.float64, gate, up)
    got, want = swiglu(*fast, limit), swiglu_reference(*exact, limit)
    got.backward(d_out)
    want.backward(d_out.double())
    gate64, up64, d64 = gate.double().abs(), up.double().abs(), d_out.double().abs()
    # silu(g) is g sigmoid(g), with a slope of at most 1.1; the error of sigmoid is a few roundings
    # of 1 + e^-g.
    within("output", got.detach(), want.detach(), gate64 * up64, 12, half)
    within("gradient of gate", fast[0].grad, exact[0].grad, d64 * up64 * (1 + gate64), 24, half)
    within("gradient of up", fast[1].grad, exact[1].grad, d64 * gate64, 16, half)


@compiled
@given(
    seed=st.integers(0, 2**31),
    count=st.integers(0, 3),
    rows=st.integers(1, 40),
    more=st.integers(0, 40),
)
def test_newton_schulz(seed: int, count: int, rows: int, more: int) -> None:
    """Each step multiplies an earlier error by at most 3.45, the quintic's slope at 0, and adds the
    rounding of its own sums.
    """
    x = torch.randn(count, rows, rows + more, generator=torch.Generator().manual_seed(seed))
    got, want = orthogonalise(x), orthogonalise(x.double())
    largest = rows**0.5 * 1.3  # bounds the result's Frobenius norm: singular values reach about 1.2
    bound = 3.45**5 * 5 * (4 * rows + 2 * more + 8) * 2.0**-24 * largest
    assert got.dtype == torch.float32 and ((got.double() - want).norm(dim=(1, 2)) <= bound).all()


def run_everything(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Results and gradients of every kernel, on shapes that need several tasks."""
    g = torch.Generator().manual_seed(seed)

    def made(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=g).to(dtype).requires_grad_()

    x, weight, norm, head = made(333, 70, dtype=dtype), made(130, 70), made(70), made(301, 70)
    gate_up, down, gates = (
        made(5, 34, 70),
        made(5, 70, 17),
        torch.rand(333, 2, generator=g).requires_grad_(),
    )
    q, k, v = (made(2, 3, 190, width, dtype=dtype) for width in (11, 11, 9))
    chosen = torch.stack([torch.randperm(5, generator=g)[:2] for _ in range(333)])
    starts = torch.zeros(2, 190, dtype=torch.int32)
    starts[0, 100:] = 100
    outputs = [
        linear(x, weight),
        rms_norm(x, norm, 1e-6),
        routed_experts(x, chosen, gates, gate_up, down),
        swiglu(x, x * 2),
        cross_entropy(x, head, torch.arange(333) % 301, torch.ones(333)),
        causal_attention(q, k, v, torch.zeros(1), 0.3, starts),
    ]
    torch.stack([out.float().square().sum() for out in outputs]).sum().backward()
    mean, square, parameter = torch.zeros(70), torch.zeros(70), norm.detach().clone()
    native.adamw(
        parameter,
        norm.grad,
        mean,
        square,
        rate=0.1,
        betas=(0.9, 0.99),
        correction2=0.1,
        eps=1e-8,
        decay=0.01,
    )
    directions = [orthogonalise(torch.randn(n, 9, 30, generator=g)) for n in (1, 4)]
    leaves = (x, weight, norm, head, gate_up, down, gates, q, k, v)
    return (
        [t.detach() for t in outputs]
        + [t.grad for t in leaves]
        + [parameter, mean, square, *directions]
    )


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(run_everything(1, dtype))
    finally:
        torch.set_num_threads(before)
    assert all(equal(results[0], other) for other in results[1:])


@compiled
def test_two_threads_at_once_do_not_disturb_each_other() -> None:
    wanted = [run_everything(seed) for seed in (2, 3)]
    barrier = threading.Barrier(2)

    def work(which: int) -> bool:
        barrier.wait()
        return all(equal(run_everything(which + 2), wanted[which]) for _ in range(8))

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(work, range(2)))


@compiled
def test_a_forked_child_has_none_of_the_workers_and_goes_on() -> None:
    x, weight = torch.randn(4000, 64), torch.randn(64, 64)
    wanted = linear(x, weight)  # starts the workers
    if (child := os.fork()) == 0:
        torch.set_num_threads(1)
        os._exit(0 if torch.equal(linear(x, weight), wanted) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@compiled
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_non_finite_input_gives_non_finite_output(poison: float) -> None:
    """Training stops at a non-finite gradient, so no kernel may turn NaN or inf into a number."""
    g = torch.Generator().manual_seed(6)

    def made(*shape: int) -> Tensor:
        tensor = torch.randn(*shape, generator=g)
        tensor.view(-1)[shape[-1] + 1] = poison
        return tensor.requires_grad_()

    x, q, v = made(40, 9), made(1, 1, 40, 9), made(1, 1, 40, 9)
    chosen, gates = torch.zeros(40, 1, dtype=torch.int64), torch.ones(40, 1)
    clean = [
        torch.randn(*shape, generator=g) for shape in ((7, 9), (9,), (11, 9), (1, 8, 9), (1, 9, 4))
    ]
    weight, norm, head, gate_up, down = (t.requires_grad_() for t in clean)
    for out, leaf in (
        (linear(x, weight), weight),
        (rms_norm(x, norm, 1e-6), norm),
        (swiglu(x, x), x),
        (routed_experts(x, chosen, gates, gate_up, down), down),
        (cross_entropy(x, head, torch.arange(40) % 11, torch.ones(40)), head),
        (causal_attention(q, q, v, None, 0.3), v),
    ):
        assert not out.isfinite().all()
        leaf.grad = None
        out.sum().backward()
        assert not leaf.grad.isfinite().all()
    direction = torch.randn(2, 3, 5, generator=g)
    direction[0, 1, 1] = poison
    assert (
        not orthogonalise(direction)[0].isfinite().any()
        and orthogonalise(direction)[1].isfinite().all()
    )


@compiled
def test_shapes_that_do_not_match_are_refused() -> None:
    x = torch.randn(40, 8)
    for call in (
        lambda: linear(x, torch.randn(3, 7)),
        lambda: swiglu(x, torch.randn(40, 7)),
        lambda: rms_norm(x, torch.randn(7), 1e-6),
        lambda: cross_entropy(
            x.requires_grad_(), torch.randn(9, 7), torch.zeros(40).long(), torch.ones(40)
        ),
        lambda: cross_entropy(x, torch.randn(9, 8), torch.zeros(39).long(), torch.ones(40)),
        lambda: causal_attention(
            torch.randn(1, 1, 4, 3), torch.randn(1, 1, 4, 2), torch.randn(1, 1, 4, 3), None, 1.0
        ),
        lambda: routed_experts(
            x,
            torch.zeros(40, 1).long(),
            torch.ones(40, 1),
            torch.randn(3, 4, 7),
            torch.randn(3, 8, 2),
        ),
    ):
        with pytest.raises(ValueError, match="do not match"):
            call()


@compiled
def test_empty_input_gives_empty_output() -> None:
    x = torch.randn(0, 8)
    assert linear(x, torch.randn(3, 8)).shape == (0, 3) and rms_norm(
        x, torch.ones(8), 1e-6
    ).shape == (0, 8)
    assert routed_experts(
        x, torch.zeros(0, 1).long(), torch.ones(0, 1), torch.randn(3, 4, 8), torch.randn(3, 8, 2)
    ).shape == (0, 8)


@compiled
def test_indices_out_of_range_are_refused() -> None:
    x, head = torch.randn(40, 8).requires_grad_(), torch.randn(9, 8)
    with pytest.raises(IndexError, match="vocabulary of 9"):
        cross_entropy(x, head, torch.full((40,), 9), torch.ones(40))
    with pytest.raises(IndexError, match="outside the 3 experts"):
        routed_experts(
            x,
            torch.full((40, 1), -1),
            torch.ones(40, 1),
            torch.randn(3, 4, 8),
            torch.randn(3, 8, 2),
        )


@compiled
def test_other_dtypes_take_another_form() -> None:
    for dtype in (torch.bfloat16, torch.float64):
        assert linear(torch.ones(40, 4, dtype=dtype), torch.ones(3, 4)).dtype == dtype
