"""The compiled routed experts as a differentiable function.

Axes: N tokens, D hidden, E experts, F expert width, k experts per token, P = N k (token, expert)
pairs sorted by expert.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from xushi.ops.native.calls import call, check_shapes, threads


class NativeExperts(torch.autograd.Function):
    """`ops.routed_experts`. Of the pairs' rows, only the gate and up products [P, 2F] are kept for
    the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        indices_Nk: Tensor,
        weights_Nk: Tensor,
        gate_up_EGD: Tensor,
        down_EDF: Tensor,
        limit: float | None,
    ) -> Tensor:
        x = x_ND.contiguous()
        weights = weights_Nk.contiguous()
        gate_up = gate_up_EGD.contiguous()
        down = down_EDF.contiguous()
        tokens, per_token = indices_Nk.shape
        experts, hidden, width = down.shape
        check_shapes(
            x.shape == (tokens, hidden)
            and weights.shape == (tokens, per_token)
            and gate_up.shape == (experts, 2 * width, hidden)
        )
        sorted_pairs = _sort_by_expert(x.dtype, indices_Nk, experts)
        products = x.new_empty(tokens * per_token, 2 * width)
        out = torch.empty_like(x)
        ctx.sizes = (tokens, per_token, hidden, width, experts, limit or 0.0)
        saved = (x, weights, gate_up, down, *sorted_pairs, products)
        call(x.dtype, "xushi_experts", *saved, out, *ctx.sizes, threads())
        ctx.save_for_backward(*saved)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor, Tensor, Tensor, None]:
        saved = ctx.saved_tensors
        dx, d_weights, d_gate_up, d_down = (torch.empty_like(t) for t in saved[:4])
        call(
            saved[0].dtype,
            "xushi_experts_backward",
            *saved,
            gradients[0].contiguous(),
            dx,
            d_weights,
            d_gate_up,
            d_down,
            *ctx.sizes,
            threads(),
        )
        return dx, None, d_weights, d_gate_up, d_down, None


def _sort_by_expert(
    dtype: torch.dtype, indices_Nk: Tensor, experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs sorted by expert, all int32: the flat index n * k + i of each sorted row [P], the
    sorted row of each pair [P], and the first row of each expert with the end last [E + 1].
    """
    if not 0 <= int(indices_Nk.min()) <= int(indices_Nk.max()) < experts:
        raise IndexError(f"an expert index is outside the {experts} experts")
    pairs = indices_Nk.numel()
    rows = torch.empty(pairs, dtype=torch.int32)
    place = torch.empty(pairs, dtype=torch.int32)
    bounds = torch.empty(experts + 1, dtype=torch.int32)
    indices = indices_Nk.long().contiguous()
    call(dtype, "xushi_sort_by_expert", indices, pairs, experts, rows, place, bounds)
    return rows, place, bounds
