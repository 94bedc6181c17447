"""Linear maps and SwiGLU."""

import torch.nn.functional as F
from torch import Tensor

from xushi.ops import native

FEWEST_ROWS = 32  # for fewer rows, packing the weight costs more than the compiled kernel gains


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W^T (+ b) for x [..., I], in x's dtype: [..., O]."""
    if x.numel() >= FEWEST_ROWS * x.shape[-1] and native.serves(x, weights=(weight_OI,)):
        y: Tensor = native.NativeLinear.apply(x, weight_OI)  # type: ignore[no-untyped-call]
        return y if bias_O is None else y + bias_O.to(y.dtype)
    return F.linear(x, weight_OI.to(x.dtype), None if bias_O is None else bias_O.to(x.dtype))


def swiglu_reference(gate: Tensor, up: Tensor, limit: float | None = None) -> Tensor:
    """silu(gate) * up (Shazeer 2020). `limit` clamps the gate from above and `up` from both sides
    (V4).
    """
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return F.silu(gate) * up


def swiglu(gate: Tensor, up: Tensor, limit: float | None = None) -> Tensor:
    """`swiglu_reference`, compiled if possible."""
    if native.serves(gate, up):
        result: Tensor = native.NativeSwiglu.apply(gate, up, limit)  # type: ignore[no-untyped-call]
        return result
    return swiglu_reference(gate, up, limit)
