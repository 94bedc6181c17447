"""The other compiled kernels: linear maps, SwiGLU, RMS norm and the output head with its loss as
differentiable functions; AdamW and Newton-Schulz in place.

Axes: N tokens, D hidden, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from xushi.ops.native.calls import call, check_shapes, threads


class NativeLinear(torch.autograd.Function):
    """x W^T for x [..., in] and W [out, in]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        outputs, inputs = weight.shape
        check_shapes(x.shape[-1] == inputs)
        y = x.new_empty(*x.shape[:-1], outputs)
        call(x.dtype, "xushi_linear", x, weight, y, x.numel() // inputs, outputs, inputs, threads())
        ctx.save_for_backward(x, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dy = gradients[0].contiguous()
        outputs, inputs = weight.shape
        sizes = (x.numel() // inputs, outputs, inputs, threads())
        dx = d_weight = None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x)
            call(dy.dtype, "xushi_linear_input", dy, weight, dx, *sizes)
        if ctx.needs_input_grad[1]:
            d_weight = torch.empty_like(weight)
            call(dy.dtype, "xushi_linear_weight", dy, x, d_weight, *sizes)
        return dx, d_weight


class NativeSwiglu(torch.autograd.Function):
    """silu(gate) * up, with V4's clamp if `limit` is given."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, limit: float | None) -> Tensor:
        check_shapes(gate.shape == up.shape)
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        ctx.limit = limit or 0.0
        ctx.sizes = (gate.numel() // gate.shape[-1], gate.shape[-1])
        out = torch.empty_like(gate)
        call(gate.dtype, "xushi_swiglu", gate, up, out, *ctx.sizes, ctx.limit, threads())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        d_gate = torch.empty_like(gate)
        d_up = torch.empty_like(up)
        call(
            gate.dtype,
            "xushi_swiglu_backward",
            gate,
            up,
            gradients[0].contiguous(),
            d_gate,
            d_up,
            *ctx.sizes,
            ctx.limit,
            threads(),
        )
        return d_gate, d_up, None


class NativeNorm(torch.autograd.Function):
    """x / rms(x) * weight over the last axis."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        width = x.shape[-1]
        check_shapes(weight.shape == (width,))
        y = torch.empty_like(x)
        scale = weight.new_empty(x.numel() // width)
        call(x.dtype, "xushi_rms_norm", x, weight, y, scale, scale.numel(), width, eps, threads())
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        dx = torch.empty_like(x)
        d_weight = torch.empty_like(weight)
        call(
            x.dtype,
            "xushi_rms_norm_backward",
            x,
            weight,
            scale,
            gradients[0].contiguous(),
            dx,
            d_weight,
            scale.numel(),
            x.shape[-1],
            threads(),
        )
        return dx, d_weight, None


def _cross_entropy(
    x_ND: Tensor, head_VD: Tensor, targets_N: Tensor, weights_N: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Losses [N], and the gradients of their weighted sum by x and head; without weights only the
    losses.
    """
    x = x_ND.contiguous()
    head = head_VD.contiguous()
    targets = targets_N.long().contiguous()
    weights = None if weights_N is None else weights_N.contiguous()
    check_shapes(head.shape[1:] == x.shape[1:] and targets.shape == x.shape[:1])
    check_shapes(weights is None or weights.shape == targets.shape)
    if not 0 <= int(targets.min()) <= int(targets.max()) < head.shape[0]:
        raise IndexError(f"a target is outside the vocabulary of {head.shape[0]} tokens")
    losses = torch.empty(x.shape[0])
    dx = None if weights is None else torch.empty_like(x)
    d_head = None if weights is None else torch.empty_like(head)
    call(
        x.dtype,
        "xushi_cross_entropy",
        x,
        head,
        targets,
        weights,
        losses,
        dx,
        d_head,
        *x.shape,
        head.shape[0],
        threads(),
    )
    return losses, dx, d_head


class NativeLogProbabilities(torch.autograd.Function):
    """log softmax(x head^T)[target]: [N]. The backward pass recomputes the logits."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, head_VD: Tensor, targets_N: Tensor) -> Tensor:
        ctx.save_for_backward(x_ND, head_VD, targets_N)
        return -_cross_entropy(x_ND, head_VD, targets_N, None)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_ND, head_VD, targets_N = ctx.saved_tensors
        _, dx, d_head = _cross_entropy(x_ND, head_VD, targets_N, -gradients[0])
        return dx, d_head, None


class NativeCrossEntropy(torch.autograd.Function):
    """sum of weight * -log softmax(x head^T)[target]. The forward pass computes both gradients."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, head_VD: Tensor, targets_N: Tensor, weights_N: Tensor
    ) -> Tensor:
        losses, dx, d_head = _cross_entropy(x_ND, head_VD, targets_N, weights_N)
        ctx.save_for_backward(dx, d_head)
        return (losses * weights_N).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dx, d_head = ctx.saved_tensors
        return dx * gradients[0], d_head * gradients[0], None, None


def adamw(
    parameter: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    *,
    rate: float,
    betas: tuple[float, float],
    correction2: float,
    eps: float,
    decay: float,
) -> None:
    """One AdamW update in place, all tensors float32.

    `rate` is the learning rate divided by the first moment's bias correction; `correction2` is the
    square root of the second moment's; `decay` is learning rate times weight decay.
    """
    call(
        torch.float32,
        "xushi_adamw",
        parameter,
        gradient,
        mean,
        square,
        parameter.numel(),
        rate,
        *betas,
        correction2,
        eps,
        decay,
        threads(),
    )


def newton_schulz(x_NRC: Tensor, coefficients: tuple[float, float, float], steps: int) -> None:
    """x <- a x + (b G + c G G) x with G = x x^T, `steps` times, in place for each of the N float32
    matrices [R, C]. Needs R <= C.
    """
    call(torch.float32, "xushi_newton_schulz", x_NRC, *x_NRC.shape, *coefficients, steps, threads())
