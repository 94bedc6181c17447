"""The kernels as differentiable functions of tensors. Which shapes and dtypes they take is
`serves`; callers ask first.

Axes: N tokens, D hidden, E experts, F expert width, k experts per token, V vocabulary or value
width; B batch, H heads, T tokens, K query and key width.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from xushi.ops.dispatch import asked_form
from xushi.ops.native.build import load

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
PLAIN = (
    Tensor,
    torch.nn.Parameter,
)  # what else is a tensor, such as one shard of it, has no memory to be read


def serves(*activations: Tensor, weights: tuple[Tensor, ...] = ()) -> bool:
    """Whether the kernels take these: float32, or bfloat16 with float32 `weights`; on the CPU, none
    empty, and XUSHI_OPS asks for no other form.
    """
    dtype = activations[0].dtype
    return (
        dtype in DTYPES
        and all(t.dtype == dtype for t in activations)
        and all(t.dtype == torch.float32 for t in weights)
        and all(
            t.device.type == "cpu" and t.numel() and type(t) in PLAIN
            for t in (*activations, *weights)
        )
        and asked_form() is None
        and load(DTYPES[dtype]) is not None
    )


def _call(dtype: torch.dtype, name: str, *arguments: Tensor | int | float | None) -> None:
    library = load(DTYPES[dtype])
    assert library is not None
    converted: list[Any] = []
    for argument in arguments:
        if argument is None or isinstance(argument, Tensor):
            converted.append(ctypes.c_void_p(None if argument is None else argument.data_ptr()))
        else:
            converted.append(
                ctypes.c_int64(argument) if isinstance(argument, int) else ctypes.c_float(argument)
            )
    getattr(library, name)(*converted)  # ctypes lets other Python threads run meanwhile


def _agree(shapes_agree: bool) -> None:
    """The kernels trust their sizes: shapes that do not belong together would be read beyond their
    end.
    """
    if not shapes_agree:
        raise ValueError("the shapes of an op's inputs do not belong together")


def _threads() -> int:
    return torch.get_num_threads()


class NativeLinear(torch.autograd.Function):
    """x W^T for x [..., in] and W [out, in]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        outputs, inputs = weight.shape
        _agree(x.shape[-1] == inputs)
        y = x.new_empty(*x.shape[:-1], outputs)
        _call(
            x.dtype, "xushi_linear", x, weight, y, x.numel() // inputs, outputs, inputs, _threads()
        )
        ctx.save_for_backward(x, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dy = gradients[0].contiguous()
        outputs, inputs = weight.shape
        sizes = (x.numel() // inputs, outputs, inputs, _threads())
        dx = d_weight = None
        if ctx.needs_input_grad[0]:
            _call(dy.dtype, "xushi_linear_input", dy, weight, dx := torch.empty_like(x), *sizes)
        if ctx.needs_input_grad[1]:
            _call(
                dy.dtype, "xushi_linear_weight", dy, x, d_weight := torch.empty_like(weight), *sizes
            )
        return dx, d_weight


class NativeSwiglu(torch.autograd.Function):
    """silu(gate) * up, with V4's clamp if there is a limit."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, limit: float | None) -> Tensor:
        _agree(gate.shape == up.shape)
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        ctx.limit, ctx.sizes = limit or 0.0, (gate.numel() // gate.shape[-1], gate.shape[-1])
        _call(
            gate.dtype,
            "xushi_swiglu",
            gate,
            up,
            out := torch.empty_like(gate),
            *ctx.sizes,
            ctx.limit,
            _threads(),
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        _call(
            gate.dtype,
            "xushi_swiglu_backward",
            gate,
            up,
            gradients[0].contiguous(),
            d_gate,
            d_up,
            *ctx.sizes,
            ctx.limit,
            _threads(),
        )
        return d_gate, d_up, None


class NativeNorm(torch.autograd.Function):
    """x / rms(x) * weight over the last axis."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        width = x.shape[-1]
        _agree(weight.shape == (width,))
        y, scale = torch.empty_like(x), weight.new_empty(x.numel() // width)
        _call(x.dtype, "xushi_rms_norm", x, weight, y, scale, scale.numel(), width, eps, _threads())
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        dx, d_weight = torch.empty_like(x), torch.empty_like(weight)
        _call(
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
            _threads(),
        )
        return dx, d_weight, None


def _attention(
    q: Tensor, k: Tensor, v: Tensor, starts_BT: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """From [B, T, H, width] tensors: the output, contiguous, and log sum exp of the scores [B, H,
    T].
    """
    batch, length, heads, width = q.shape
    _agree(k.shape == q.shape and v.shape[:3] == q.shape[:3] and starts_BT.shape == (batch, length))
    out, sums = q.new_empty(batch, length, heads, v.shape[-1]), torch.empty(batch, heads, length)
    strides = torch.tensor([x.stride(axis) for x in (q, k, v) for axis in range(3)])
    _call(
        q.dtype,
        "xushi_attention",
        q,
        k,
        v,
        strides,
        starts_BT,
        out,
        sums,
        batch,
        length,
        heads,
        width,
        v.shape[-1],
        scale,
        _threads(),
    )
    return out, sums


def _attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts_BT: Tensor,
    out: Tensor,
    sums: Tensor,
    scale: float,
) -> list[Tensor]:
    """Gradients of q, k and v, [B, T, H, width] and contiguous."""
    made = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    strides = torch.tensor([x.stride(axis) for x in (q, k, v) for axis in range(3)])
    _call(
        q.dtype,
        "xushi_attention_backward",
        q,
        k,
        v,
        strides,
        starts_BT,
        out,
        sums,
        d_out.contiguous(),
        *made,
        *q.shape,
        v.shape[-1],
        scale,
        _threads(),
    )
    return made


class NativeAttention(torch.autograd.Function):
    """Causal attention of [B, H, T, width] tensors; a query sees the keys from `starts_BT` (int32)
    to itself.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, starts_BT: Tensor, scale: float
    ) -> Tensor:
        q, k, v = ((x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2) for x in (q, k, v))
        starts_BT = starts_BT.to(torch.int32).contiguous()
        out, sums = _attention(q, k, v, starts_BT, scale)
        ctx.save_for_backward(q, k, v, starts_BT, out, sums)
        ctx.scale = scale
        return out.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, starts_BT, out, sums = ctx.saved_tensors
        made = _attention_backward(
            gradients[0].transpose(1, 2), q, k, v, starts_BT, out, sums, ctx.scale
        )
        return (*(x.transpose(1, 2) for x in made), None, None)


class NativeLatentAttention(torch.autograd.Function):
    """`ops.rotated_attention`: from q [B, T, H, N + R], kv [B, T, H, N + V] and k_rope [B, T, R] to
    [B, T, H, V].
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        kv: Tensor,
        k_rope: Tensor,
        cos: Tensor,
        sin: Tensor,
        interleaved: bool,
        starts_BT: Tensor,
        scale: float,
    ) -> Tensor:
        q, kv, starts_BT = q.contiguous(), kv.contiguous(), starts_BT.to(torch.int32).contiguous()
        cos, sin = cos.float().contiguous(), sin.float().contiguous()
        batch, length, heads, _ = q.shape
        rotated = k_rope.shape[-1]
        nope = q.shape[-1] - rotated
        values = kv.shape[-1] - nope
        _agree(
            kv.shape[:3] == q.shape[:3]
            and k_rope.shape[:2] == q.shape[:2]
            and nope >= 0 < values
            and cos.shape == sin.shape == (batch, length, rotated // 2)
        )
        if k_rope.stride(-1) != 1 or k_rope.stride(0) != length * k_rope.stride(1):
            k_rope = k_rope.contiguous()
        queries, keys = torch.empty_like(q), torch.empty_like(q)
        ctx.sizes = (batch * length, heads, nope, rotated, values, int(interleaved))
        _call(
            q.dtype,
            "xushi_heads",
            q,
            kv,
            k_rope,
            k_rope.stride(1),
            cos,
            sin,
            queries,
            keys,
            *ctx.sizes,
            _threads(),
        )
        out, sums = _attention(queries, keys, kv[..., nope:], starts_BT, scale)
        ctx.save_for_backward(queries, keys, kv, starts_BT, out, sums, cos, sin)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, kv, starts_BT, out, sums, cos, sin = ctx.saved_tensors
        _, _, nope, rotated, _, _ = ctx.sizes
        made = _attention_backward(
            gradients[0], queries, keys, kv[..., nope:], starts_BT, out, sums, ctx.scale
        )
        dq, d_kv, d_k_rope = (
            torch.empty_like(queries),
            torch.empty_like(kv),
            kv.new_empty(*kv.shape[:2], rotated),
        )
        _call(
            kv.dtype,
            "xushi_heads_backward",
            *made,
            cos,
            sin,
            dq,
            d_kv,
            d_k_rope,
            *ctx.sizes,
            _threads(),
        )
        return dq, d_kv, d_k_rope, None, None, None, None, None


class NativeExperts(torch.autograd.Function):
    """`ops.routed_experts`; the backward pass keeps the gate and up products and nothing else of
    its rows.
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
        x, weights, gate_up, down = (
            t.contiguous() for t in (x_ND, weights_Nk, gate_up_EGD, down_EDF)
        )
        tokens, per_token = indices_Nk.shape
        experts, hidden, width = down.shape
        _agree(
            x.shape == (tokens, hidden)
            and weights.shape == (tokens, per_token)
            and gate_up.shape == (experts, 2 * width, hidden)
        )
        rows, place = (torch.empty(tokens * per_token, dtype=torch.int32) for _ in range(2))
        bounds = torch.empty(experts + 1, dtype=torch.int32)
        if not 0 <= int(indices_Nk.min()) <= int(indices_Nk.max()) < experts:
            raise IndexError(f"an expert of {experts} was chosen that does not exist")
        _call(
            x.dtype,
            "xushi_sort_by_expert",
            indices_Nk.long().contiguous(),
            tokens * per_token,
            experts,
            rows,
            place,
            bounds,
        )
        products, out = x.new_empty(tokens * per_token, 2 * width), torch.empty_like(x)
        ctx.sizes = (tokens, per_token, hidden, width, experts, limit or 0.0)
        _call(
            x.dtype,
            "xushi_experts",
            x,
            weights,
            gate_up,
            down,
            rows,
            place,
            bounds,
            products,
            out,
            *ctx.sizes,
            _threads(),
        )
        ctx.save_for_backward(x, weights, gate_up, down, rows, place, bounds, products)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor, Tensor, Tensor, None]:
        saved = ctx.saved_tensors
        dx, d_weights, d_gate_up, d_down = (torch.empty_like(t) for t in saved[:4])
        _call(
            saved[0].dtype,
            "xushi_experts_backward",
            *saved,
            gradients[0].contiguous(),
            dx,
            d_weights,
            d_gate_up,
            d_down,
            *ctx.sizes,
            _threads(),
        )
        return dx, None, d_weights, d_gate_up, d_down, None


def _cross_entropy(
    x_ND: Tensor, head_VD: Tensor, targets_N: Tensor, weights_N: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Losses [N] and the gradients of their weighted sum; without weights the losses alone."""
    x, head, targets = x_ND.contiguous(), head_VD.contiguous(), targets_N.long().contiguous()
    weights = None if weights_N is None else weights_N.contiguous()
    _agree(head.shape[1:] == x.shape[1:] and targets.shape == x.shape[:1])
    _agree(weights is None or weights.shape == targets.shape)
    if not 0 <= int(targets.min()) <= int(targets.max()) < head.shape[0]:
        raise IndexError(f"a target lies outside the vocabulary of {head.shape[0]}")
    losses = torch.empty(x.shape[0])
    dx, d_head = (None, None) if weights is None else (torch.empty_like(x), torch.empty_like(head))
    _call(
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
        _threads(),
    )
    return losses, dx, d_head


class NativeLogProbabilities(torch.autograd.Function):
    """log softmax(x head^T)[target] [N]; the logits are made again in the backward pass."""

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
    """sum of weight * -log softmax(x head^T)[target], both gradients made on the way forward."""

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
    """One update in place; `rate` has the first moment's correction in it, `correction2` is the
    second's root.
    """
    _call(
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
        _threads(),
    )


def newton_schulz(x_NRC: Tensor, coefficients: tuple[float, float, float], steps: int) -> None:
    """x <- a x + (b G + c G G) x with G = x x^T, `steps` times, for each float32 matrix in place;
    rows are at most columns.
    """
    _call(
        torch.float32, "xushi_newton_schulz", x_NRC, *x_NRC.shape, *coefficients, steps, _threads()
    )
