"""Shared by the tests of ops: a bound on rounding errors, and running on two threads.

The bound is derived, not tuned. A sum of n products in float32, in any order, has an error of at
most n * 2^-24 times the sum of the products' absolute values (Higham 2002, section 3.1, first
order). So each test computes the op once more in float64 with every term made positive
(`magnitude`). `roundings` counts the lengths of all sums on the longest path to a result, plus the
pointwise operations on that path. `halves` counts the values on it that are rounded to bfloat16, by
2^-8 each; sums are float32 in bfloat16 too.

The bound holds for each element. An element with small terms may only have a small error, so a leak
from one row into another shows.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from xushi.ops import native

UNIT_ROUNDOFF = 2.0**-24
BFLOAT16_ROUNDOFF = 2.0**-8


@pytest.fixture(scope="session")
def within() -> Callable[..., None]:
    """Assert |got - exact| <= (roundings * 2^-24 + halves * 2^-8) * magnitude for each element."""

    def check(
        name: str,
        got: Tensor,
        exact: Tensor,
        magnitude: Tensor,
        roundings: float,
        halves: float = 0,
    ) -> None:
        assert got.shape == exact.shape == magnitude.shape, name
        assert got.isfinite().all(), f"{name} is not finite"
        error = (got.double() - exact).abs()
        bound = (roundings * UNIT_ROUNDOFF + halves * BFLOAT16_ROUNDOFF) * magnitude + 1e-30
        worst = (error / bound).max()
        assert worst <= 1, (
            f"{name}: {worst:.3g} times the bound of {roundings} roundings and {halves} to bfloat16"
        )

    return check


@pytest.fixture(scope="module", params=["compiled", "pytorch"])
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test with each fast form, the PyTorch one and the compiled one. Modules use it with
    `pytestmark = pytest.mark.usefixtures("form")`.
    """
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "pytorch":
            patch.setenv("XUSHI_OPS", "pytorch")
        elif native.load() is None:
            pytest.skip(native.status())
        yield request.param


@pytest.fixture(scope="module")
def compiled_bfloat16(form: str) -> None:
    """For tests of the compiled bfloat16 forms: skips the run with PyTorch's form."""
    if form != "compiled" or native.load("bf16") is None:
        pytest.skip("only for the compiled bfloat16 forms")


@pytest.fixture(autouse=True)
def two_threads(one_thread: None) -> None:
    """Run on two threads, since kernels divide their work and one thread shows no race."""
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def leaves() -> Callable[..., list[Tensor]]:
    """Copies of tensors in another dtype, as leaves that require gradients."""
    return lambda dtype, *tensors: [
        tensor.detach().to(dtype).clone().requires_grad_() for tensor in tensors
    ]
