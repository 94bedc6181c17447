"""RMS norm against transformers' module; values and gradients against the formula in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm

from xushi.ops import rms_norm, rms_norm_reference

pytestmark = pytest.mark.usefixtures("form")


@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 9),
    width=st.integers(1, 70),
    scale=st.sampled_from([1e-4, 1.0, 1e4]),
)
def test_values_and_gradients(
    seed: int, rows: int, width: int, scale: float, within, leaves
) -> None:
    check(seed, rows, width, scale, within, leaves, torch.float32)


@pytest.mark.usefixtures("compiled_bfloat16")
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 9), width=st.integers(1, 70))
def test_compiled_bfloat16(seed: int, rows: int, width: int, within, leaves) -> None:
    check(seed, rows, width, 1.0, within, leaves, torch.bfloat16)


def check(
    seed: int, rows: int, width: int, scale: float, within, leaves, dtype: torch.dtype
) -> None:
    g = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, width, generator=g) * scale, torch.randn(width, generator=g)
    d_out, halves = torch.randn(rows, width, generator=g).to(dtype), int(dtype == torch.bfloat16)
    (x,), (weight,) = leaves(dtype, inputs[0]), leaves(torch.float32, inputs[1])
    x64, weight64 = leaves(torch.float64, x, weight)
    got, want = (
        rms_norm(x, weight, 1e-6),
        weight64 * x64 / (x64.square().mean(-1, keepdim=True) + 1e-6).sqrt(),
    )
    got.backward(d_out)
    want.backward(d_out.double())
    root = (x64.detach().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    normal, back = x64.detach().abs() / root, (d_out.double() * weight64.detach()).abs()
    within(
        "output", got.detach(), want.detach(), weight64.detach().abs() * normal, width + 8, halves
    )
    within(
        "gradient of x",
        x.grad,
        x64.grad,
        (back + normal * (back * normal).mean(-1, keepdim=True)) / root,
        2 * width + 16,
        halves,
    )
    within(
        "gradient of the weight",
        weight.grad,
        weight64.grad,
        (d_out.double().abs() * normal).sum(0),
        rows + width + 8,
    )


@given(seed=st.integers(0, 2**31), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_it_is_transformers_own_bit_by_bit(seed: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(seed)
    theirs = DeepseekV3RMSNorm(24, eps=1e-5).to(dtype)
    theirs.weight.data = torch.randn(24, generator=g).to(dtype)
    x = torch.randn(5, 24, generator=g).to(dtype)
    assert torch.equal(rms_norm_reference(x, theirs.weight, 1e-5), theirs(x))


def test_v4_multiplies_the_weight_before_it_rounds(form: str) -> None:
    """V4 multiplies before it rounds to bfloat16 and V3 after; each matches transformers. The
    compiled form rounds once for both.
    """
    x, weight = torch.randn(40, 16).bfloat16(), torch.randn(16)
    wide = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    norm = rms_norm if form == "pytorch" else rms_norm_reference
    v4, v3 = norm(x, weight, 1e-6, wide_weight=True), norm(x, weight, 1e-6)
    assert torch.equal(v4, (weight * wide).bfloat16())
    assert torch.equal(v3, weight.bfloat16() * wide.bfloat16())
    assert not torch.equal(v4, v3)
    assert torch.equal(rms_norm(x, None, 1e-6), wide.bfloat16())
