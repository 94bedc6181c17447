"""The small modules of every block: linear map, norm and SwiGLU, which compute in their input's
dtype.

Weights keep their own dtype (float32 in training) and are cast when they are used. So the dtype of
the activations decides whether a model computes in bfloat16 or float32.
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
    """Root-mean-square norm with a learned weight [width]. With `wide_weight` (V4) the product with
    the weight is in float32.
    """

    def __init__(self, width: int, eps: float, wide_weight: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps
        self.wide_weight = wide_weight

    def forward(self, x: Tensor) -> Tensor:
        """Normalise over the last axis."""
        return rms_norm(x, self.weight, self.eps, self.wide_weight)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x)).

    `limit` (V4) clamps the gate from above and `up` from both sides.
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
