"""The small parts every block is made of: linear maps and norms that compute in the dtype of what
comes in.

Weights stay in their own dtype (float32 while training) and are cast where they are used, so one
model computes in bfloat16 or float32 by what its activations are.
"""

import torch
from torch import Tensor, nn

from xushi.ops import linear, rms_norm, swiglu


class Linear(nn.Module):
    """y = x W^T (+ b), weight [out, in]."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out] in x's dtype."""
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned weight [width], multiplied in float32 if `wide_weight`
    (V4's).
    """

    def __init__(self, width: int, eps: float, wide_weight: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps, self.wide_weight = eps, wide_weight

    def forward(self, x: Tensor) -> Tensor:
        """Normalise over the last axis."""
        return rms_norm(x, self.weight, self.eps, self.wide_weight)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x)).

    With a `limit` (V4), the gate is clamped from above and `up` from both sides before they meet.
    """

    def __init__(self, hidden: int, width: int, limit: float | None = None) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, width)
        self.up_proj = Linear(hidden, width)
        self.down_proj = Linear(width, hidden)
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] to [..., hidden]."""
        result: Tensor = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x), self.limit))
        return result
