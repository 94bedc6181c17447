"""The routed experts: y_n = sum over the chosen experts e of token n of gate_ne * SwiGLU_e(x_n).

Axes: N tokens, k experts per token, E experts, D hidden, F expert width, G = 2F gate and up rows,
P rows sorted by expert and padded.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xushi.ops import native
from xushi.ops.dispatch import use_reference

# oneDNN compiles a kernel for every new row count, and the counts change at every step. Rounding
# them up makes oneDNN find its kernels in its cache.
ROW_MULTIPLE = 32


def routed_experts_reference(
    x_ND: Tensor,
    indices_Nk: Tensor,
    weights_Nk: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    limit: float | None = None,
) -> Tensor:
    """The definition, a loop over experts: [N, D] in x's dtype.

    `indices_Nk` are the chosen experts and `weights_Nk` their gate values. `gate_up_EGD` is [E, 2F,
    D], gate rows first. `limit` clamps the gate from above and `up` from both sides (V4's SwiGLU).
    """
    out_ND = torch.zeros_like(x_ND)
    for expert in range(gate_up_EGD.shape[0]):
        token, place = torch.where(indices_Nk == expert)
        gate, up = _gate_and_up(
            F.linear(x_ND.index_select(0, token), gate_up_EGD[expert].to(x_ND.dtype)), limit
        )
        y = F.linear(F.silu(gate) * up, down_EDF[expert].to(x_ND.dtype))
        weight = weights_Nk.flatten().index_select(0, token * weights_Nk.shape[1] + place)
        out_ND = out_ND.index_add(0, token, y * weight[:, None].to(y.dtype))
    return out_ND


def _gate_and_up(h_PG: Tensor, limit: float | None) -> tuple[Tensor, Tensor]:
    gate, up = h_PG.chunk(2, dim=-1)
    return (gate, up) if limit is None else (gate.clamp(max=limit), up.clamp(-limit, limit))


def routed_experts(
    x_ND: Tensor,
    indices_Nk: Tensor,
    weights_Nk: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    limit: float | None = None,
) -> Tensor:
    """`routed_experts_reference` in a fast form: rows sorted by expert, one product per expert, and
    a hand-written backward pass.
    """
    if use_reference() or x_ND.dtype == torch.float64:
        return routed_experts_reference(x_ND, indices_Nk, weights_Nk, gate_up_EGD, down_EDF, limit)
    compiled = native.serves(x_ND, weights=(weights_Nk, gate_up_EGD, down_EDF))
    form = native.NativeExperts if compiled else _RoutedExperts
    result: Tensor = form.apply(  # type: ignore[no-untyped-call]
        x_ND, indices_Nk, weights_Nk, gate_up_EGD, down_EDF, limit
    )
    return result


def sort_by_expert(indices_Nk: Tensor, experts: int) -> tuple[Tensor, Tensor, list[int]]:
    """Sort the (token, expert) pairs by expert and pad each expert's rows to a multiple of
    `ROW_MULTIPLE`.

    Returns, for each padded row [P], the flat index n * k + i of its pair and whether the row is
    real; and the first row of each expert, with the end last. A padding row has index 0 and must be
    given weight zero.
    """
    flat = indices_Nk.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=experts)
    padded = (counts + ROW_MULTIPLE - 1) // ROW_MULTIPLE * ROW_MULTIPLE
    ends = padded.cumsum(0)
    starts = ends - padded
    rank = torch.arange(flat.numel(), device=flat.device) - (
        counts.cumsum(0) - counts
    ).index_select(0, flat[order])
    place = starts.index_select(0, flat[order]) + rank
    bounds = [0, *ends.tolist()]
    rows_P = torch.zeros(bounds[-1], dtype=torch.int64, device=flat.device).index_copy_(
        0, place, order
    )
    real_P = torch.zeros(bounds[-1], dtype=torch.bool, device=flat.device).index_fill_(
        0, place, True
    )
    return rows_P, real_P, bounds


def _can_group(*factors: Tensor) -> bool:
    """Whether `F.grouped_mm` takes these factors: bfloat16 on a GPU, with rows of a multiple of 16
    bytes.
    """
    return all(
        t.is_cuda and t.dtype == torch.bfloat16 and t.shape[-1] % 8 == 0 and t.shape[-2] % 8 == 0
        for t in factors
    )


def _products(x_PA: Tensor, w_EAB: Tensor, bounds: list[int]) -> Tensor:
    """Each expert's rows times its matrix: [P, A] and [E, A, B] to [P, B]."""
    if _can_group(x_PA, w_EAB):
        made: Tensor = F.grouped_mm(
            x_PA, w_EAB, offs=torch.tensor(bounds[1:], dtype=torch.int32, device=x_PA.device)
        )
        return made
    y_PB = x_PA.new_empty(x_PA.shape[0], w_EAB.shape[2])
    for e, (begin, end) in enumerate(pairwise(bounds)):
        if begin < end:
            torch.mm(x_PA[begin:end], w_EAB[e], out=y_PB[begin:end])
    return y_PB


def _weight_gradients(a_PA: Tensor, b_PB: Tensor, bounds: list[int]) -> Tensor:
    """a^T b over each expert's rows: [P, A] and [P, B] to [E, A, B]."""
    if _can_group(a_PA, b_PB):
        made: Tensor = F.grouped_mm(
            a_PA.T, b_PB, offs=torch.tensor(bounds[1:], dtype=torch.int32, device=a_PA.device)
        )
        return made
    gradient_EAB = a_PA.new_zeros(len(bounds) - 1, a_PA.shape[1], b_PB.shape[1])
    for e, (begin, end) in enumerate(pairwise(bounds)):
        if begin < end:
            torch.mm(a_PA[begin:end].T, b_PB[begin:end], out=gradient_EAB[e])
    return gradient_EAB


class _RoutedExperts(torch.autograd.Function):
    """Keeps the gathered rows and the gate and up products for the backward pass, which recomputes
    everything else.
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
        dtype = x_ND.dtype
        rows_P, real_P, bounds = sort_by_expert(indices_Nk, gate_up_EGD.shape[0])
        token_P = rows_P // indices_Nk.shape[1]
        weight_P = weights_Nk.flatten().index_select(0, rows_P).masked_fill(~real_P, 0).to(dtype)
        gate_up = gate_up_EGD.to(dtype)
        down = down_EDF.to(dtype)
        x_PD = x_ND.index_select(0, token_P)
        h_PG = _products(x_PD, gate_up.mT, bounds)
        gate, up = _gate_and_up(h_PG, limit)
        a_PF = F.silu(gate).mul_(up)
        y_PD = _products(a_PF, down.mT, bounds)
        out_ND = torch.zeros_like(x_ND).index_add_(0, token_P, y_PD.mul_(weight_P[:, None]))
        ctx.save_for_backward(x_PD, h_PG, weight_P, rows_P, real_P, token_P, gate_up, down)
        ctx.bounds = bounds
        ctx.shape = x_ND.shape
        ctx.pairs_shape = indices_Nk.shape
        ctx.limit = limit
        ctx.dtypes = (weights_Nk.dtype, gate_up_EGD.dtype, down_EDF.dtype)
        return out_ND

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor, Tensor, Tensor, None]:
        x_PD, h_PG, weight_P, rows_P, real_P, token_P, gate_up, down = ctx.saved_tensors
        bounds = ctx.bounds
        weight_dtype, gate_up_dtype, down_dtype = ctx.dtypes
        gate, up = _gate_and_up(h_PG, ctx.limit)
        silu = F.silu(gate)
        a_PF = silu * up
        dy_PD = gradients[0].index_select(0, token_P)  # before the gate value multiplies
        da_PF = _products(dy_PD, down, bounds)
        d_down = _weight_gradients(dy_PD, a_PF * weight_P[:, None], bounds)
        d_weight_P = (da_PF * a_PF).sum(-1)
        da_PF.mul_(weight_P[:, None])
        dh_PG = torch.empty_like(h_PG)
        d_gate, d_up = dh_PG.chunk(2, dim=-1)
        torch.mul(da_PF, silu, out=d_up)
        # This rounds to bfloat16 once; sigmoid(g) (1 + g - silu(g)) written out rounds four times.
        torch.ops.aten.silu_backward(da_PF.mul_(up), gate, grad_input=d_gate)
        if ctx.limit is not None:  # clamped values have gradient zero
            raw_gate, raw_up = h_PG.chunk(2, dim=-1)
            d_gate.masked_fill_(raw_gate > ctx.limit, 0)
            d_up.masked_fill_(raw_up.abs() > ctx.limit, 0)
        dx_PD = _products(dh_PG, gate_up, bounds)
        d_gate_up = _weight_gradients(dh_PG, x_PD, bounds)
        dx_ND = dx_PD.new_zeros(ctx.shape).index_add_(0, token_P, dx_PD)
        # Padding rows carry index 0, so without the mask they would add to the gradient of the
        # first pair's weight.
        d_weights = (
            d_weight_P.new_zeros(ctx.pairs_shape)
            .flatten()
            .index_add_(0, rows_P, d_weight_P.masked_fill(~real_P, 0))
        )
        return (
            dx_ND,
            None,
            d_weights.view(ctx.pairs_shape).to(weight_dtype),
            d_gate_up.to(gate_up_dtype),
            d_down.to(down_dtype),
            None,
        )
