"""The compiled attention as differentiable functions.

Axes: B batch, H heads, T tokens, K query and key width, V value width; of a head's K values, N are
not rotated and R are.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from xushi.ops.native.calls import call, check_shapes, threads


class NativeAttention(torch.autograd.Function):
    """Causal attention of [B, H, T, width] tensors: query t sees the keys from `starts_BT[b, t]`
    (int32) to t.
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
        made = _attention_backward(gradients[0].transpose(1, 2), ctx.saved_tensors, ctx.scale)
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
        q = q.contiguous()
        kv = kv.contiguous()
        starts_BT = starts_BT.to(torch.int32).contiguous()
        cos = cos.float().contiguous()
        sin = sin.float().contiguous()
        ctx.sizes = _head_sizes(q, kv, k_rope, cos, sin, interleaved)
        queries, keys = _rotated_heads(q, kv, k_rope, cos, sin, ctx.sizes)
        nope = ctx.sizes[2]
        out, sums = _attention(queries, keys, kv[..., nope:], starts_BT, scale)
        ctx.save_for_backward(queries, keys, kv, starts_BT, out, sums, cos, sin)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, kv, starts_BT, out, sums, cos, sin = ctx.saved_tensors
        _, _, nope, rotated, _, _ = ctx.sizes
        saved = (queries, keys, kv[..., nope:], starts_BT, out, sums)
        made = _attention_backward(gradients[0], saved, ctx.scale)
        dq = torch.empty_like(queries)
        d_kv = torch.empty_like(kv)
        d_k_rope = kv.new_empty(*kv.shape[:2], rotated)
        call(
            kv.dtype,
            "xushi_heads_backward",
            *made,
            cos,
            sin,
            dq,
            d_kv,
            d_k_rope,
            *ctx.sizes,
            threads(),
        )
        return dq, d_kv, d_k_rope, None, None, None, None, None


def _attention(
    q: Tensor, k: Tensor, v: Tensor, starts_BT: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """From tensors [B, T, H, width]: the contiguous output, and the scores' log-sum-exp [B, H, T]
    in float32.
    """
    batch, length, heads, width = q.shape
    check_shapes(
        k.shape == q.shape and v.shape[:3] == q.shape[:3] and starts_BT.shape == (batch, length)
    )
    out = q.new_empty(batch, length, heads, v.shape[-1])
    sums = torch.empty(batch, heads, length)
    call(
        q.dtype,
        "xushi_attention",
        q,
        k,
        v,
        _strides(q, k, v),
        starts_BT,
        out,
        sums,
        batch,
        length,
        heads,
        width,
        v.shape[-1],
        scale,
        threads(),
    )
    return out, sums


def _attention_backward(d_out: Tensor, saved: tuple[Tensor, ...], scale: float) -> list[Tensor]:
    """Gradients of q, k and v, contiguous [B, T, H, width]. `saved`: q, k, v, starts, output and
    log-sum-exp of the forward pass.
    """
    q, k, v, starts_BT, out, sums = saved
    made = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    call(
        q.dtype,
        "xushi_attention_backward",
        q,
        k,
        v,
        _strides(q, k, v),
        starts_BT,
        out,
        sums,
        d_out.contiguous(),
        *made,
        *q.shape,
        v.shape[-1],
        scale,
        threads(),
    )
    return made


def _strides(*tensors: Tensor) -> Tensor:
    """Strides over batch, position and head of each tensor, one after another."""
    return torch.tensor([x.stride(axis) for x in tensors for axis in range(3)])


def _head_sizes(
    q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[int, ...]:
    """B * T, H, N, R, V and `interleaved` as the kernels take them, once the shapes are checked."""
    batch, length, heads, _ = q.shape
    rotated = k_rope.shape[-1]
    nope = q.shape[-1] - rotated
    values = kv.shape[-1] - nope
    check_shapes(
        kv.shape[:3] == q.shape[:3]
        and k_rope.shape[:2] == q.shape[:2]
        and nope >= 0
        and values > 0
        and cos.shape == sin.shape == (batch, length, rotated // 2)
    )
    return batch * length, heads, nope, rotated, values, int(interleaved)


def _rotated_heads(
    q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, sizes: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Queries and keys [B, T, H, N + R] with their last R values rotated."""
    length = q.shape[1]
    if k_rope.stride(-1) != 1 or k_rope.stride(0) != length * k_rope.stride(1):
        k_rope = k_rope.contiguous()
    queries = torch.empty_like(q)
    keys = torch.empty_like(q)
    call(
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
        *sizes,
        threads(),
    )
    return queries, keys
