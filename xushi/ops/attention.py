"""Causal attention within segments, for training and for scoring whole sequences; and MLA on cached
latents, for decoding.

Axes: B batch, H heads, T tokens, K query and key width, V value width, R rotated width, W width of
a head's unrotated key and its value together; S sequences of a decoding call, Q new tokens of a
sequence, L cached positions, C width of latent and rotated key together.
"""

from typing import Any

import torch
from torch import Tensor

from xushi.ops import native
from xushi.ops.dispatch import use_reference
from xushi.ops.rope import apply_rope

# Attention weights of sequences up to this length are kept for the backward pass; those of longer
# sequences are recomputed.
KEEP_WEIGHTS = 256
QUERY_BLOCK = 128  # the fastest of 32, 64, 128 and 256 for 256 tokens (docs/lab-log.md)


def segment_mask(segments_BT: Tensor) -> Tensor | None:
    """[B, 1, T, T], True for the keys that a query may attend to: its own and earlier positions of
    its own segment.

    None if every row is a single segment: plain causal attention is then enough.
    """
    if bool((segments_BT == segments_BT[:, :1]).all()):
        return None
    length = segments_BT.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments_BT.device).tril()
    return (causal & (segments_BT[:, :, None] == segments_BT[:, None, :]))[:, None]


def causal_attention_reference(
    q_BHTK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """softmax(scale * q k^T + mask) v in the inputs' dtype: [B, H, T, V]. `mask` None is causal."""
    if mask is None:
        length = q_BHTK.shape[-2]
        mask = torch.ones(length, length, dtype=torch.bool, device=q_BHTK.device).tril()
    scores = (q_BHTK @ k_BHTK.transpose(-1, -2)) * scale
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v_BHTV


@torch.no_grad()
def largest_scores(q_BHTK: Tensor, k_BHTK: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Each head's largest attention logit scale * q k^T among the allowed pairs: [H] in float32 or
    wider.
    """
    length = q_BHTK.shape[2]
    wide = torch.promote_types(q_BHTK.dtype, torch.float32)
    q = q_BHTK.to(wide)
    k = k_BHTK.to(wide)
    if mask is None:
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=q.device).tril()
    best_H = q.new_full(q.shape[1:2], float("-inf"))
    for start in range(0, length, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, length)
        scores = (q[:, :, start:end] @ k[:, :, :end].mT).masked_fill_(
            ~mask[..., start:end, :end], float("-inf")
        )
        best_H = torch.maximum(best_H, scores.amax((0, 2, 3)))
    return best_H * scale


def segment_starts(segments_BT: Tensor) -> Tensor | None:
    """[B, T] int32: the first position of each token's segment. None if a segment is not
    contiguous.
    """
    length = segments_BT.shape[1]
    positions = torch.arange(length, device=segments_BT.device).expand_as(segments_BT)
    begins = torch.ones_like(segments_BT, dtype=torch.bool)
    begins[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    different = segments_BT.sort(1).values.diff(dim=1).ne(0).sum(1) + 1
    if not bool((begins.sum(1) == different).all()):
        return None
    return positions.where(begins, 0).cummax(1).values.to(torch.int32)


def causal_attention(
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTV: Tensor,
    mask: Tensor | None,
    scale: float,
    starts_BT: Tensor | None = None,
) -> Tensor:
    """`causal_attention_reference` in a fast form: softmax in float32 or wider, queries in blocks,
    and a hand-written backward pass: [B, H, T, V].

    A block of queries is multiplied only with the keys up to its own end. For sequences longer than
    `KEEP_WEIGHTS` the backward pass recomputes the attention weights, so that the memory kept is
    linear in T. On a CPU, PyTorch's fused attention takes 1.2 (fp32) to 2.9 (bf16) times as long
    (docs/lab-log.md).

    The compiled form takes no mask. It needs `mask` None, or `starts_BT` from `segment_starts` for
    the same segments.
    """
    if use_reference():
        return causal_attention_reference(q_BHTK, k_BHTK, v_BHTV, mask, scale)
    batch, _, length, _ = q_BHTK.shape
    if (mask is None or starts_BT is not None) and native.serves(q_BHTK, k_BHTK, v_BHTV):
        if starts_BT is None:
            starts_BT = torch.zeros(batch, length, dtype=torch.int32)
        made: Tensor = native.NativeAttention.apply(  # type: ignore[no-untyped-call]
            q_BHTK, k_BHTK, v_BHTV, starts_BT, scale
        )
        return made
    if mask is None:
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=q_BHTK.device).tril()
    result: Tensor = _CausalAttention.apply(q_BHTK, k_BHTK, v_BHTV, mask, scale)  # type: ignore[no-untyped-call]
    return result


def expand_heads(
    q_BTHK: Tensor,
    kv_BTHW: Tensor,
    k_rope_BTR: Tensor,
    angles: tuple[Tensor, Tensor],
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys [B, H, T, K] and values [B, H, T, V] of latent attention (DeepSeek-V2,
    section 2.1.3).

    The last R of a query's K values are rotated. `kv_BTHW` holds each head's unrotated key and
    value; `k_rope_BTR` is the keys' rotated part, shared by all heads. `angles` are cos and sin [B,
    T, R / 2].
    """
    rotated = k_rope_BTR.shape[-1]
    nope = q_BTHK.shape[-1] - rotated
    cos, sin = angles
    q_rope = apply_rope(q_BTHK[..., nope:], cos[..., None, :], sin[..., None, :], interleaved)
    k_rope = apply_rope(k_rope_BTR, cos, sin, interleaved)[..., None, :].expand_as(q_rope)
    q = torch.cat((q_BTHK[..., :nope], q_rope), dim=-1)
    k = torch.cat((kv_BTHW[..., :nope], k_rope), dim=-1)
    return q.transpose(1, 2), k.transpose(1, 2), kv_BTHW[..., nope:].transpose(1, 2)


def rotated_attention(
    q_BTHK: Tensor,
    kv_BTHW: Tensor,
    k_rope_BTR: Tensor,
    angles: tuple[Tensor, Tensor],
    interleaved: bool,
    mask: Tensor | None,
    scale: float,
    starts_BT: Tensor | None = None,
) -> Tensor:
    """`causal_attention` of `expand_heads`, in one kernel if possible: [B, T, H, V]. `mask` and
    `starts_BT` as in `causal_attention`.
    """
    if (mask is None or starts_BT is not None) and native.serves(q_BTHK, kv_BTHW, k_rope_BTR):
        if starts_BT is None:
            starts_BT = torch.zeros(q_BTHK.shape[:2], dtype=torch.int32)
        made: Tensor = native.NativeLatentAttention.apply(  # type: ignore[no-untyped-call]
            q_BTHK, kv_BTHW, k_rope_BTR, *angles, interleaved, starts_BT, scale
        )
        return made
    heads = expand_heads(q_BTHK, kv_BTHW, k_rope_BTR, angles, interleaved)
    return causal_attention(*heads, mask, scale, starts_BT).transpose(1, 2)


def _weights(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> Tensor:
    """softmax(scale * q k^T) over the keys that `mask` [B or 1, 1, t, s] allows, in q's dtype:
    [B*H, t, s] from q [B*H, t, K] and k [B*H, s, K].
    """
    bias = torch.zeros(
        mask.shape, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device
    )
    bias.masked_fill_(~mask, float("-inf"))
    scores = torch.bmm(q, k.mT).view(mask.shape[0], -1, *mask.shape[2:])
    return torch.add(bias, scores, alpha=scale).softmax(-1).to(q.dtype).flatten(0, 1)


def latent_attention(
    q_SQHC: Tensor, context_SLC: Tensor, allowed_SQL: Tensor, scale: float, latent: int
) -> Tensor:
    """MLA computed directly on cached latents (DeepSeek-V2, arXiv:2405.04434, section 2.1.2): [S,
    Q, H, latent].

    The context [S, L, C] holds the latent, of width `latent`, and then the rotated key. The queries
    [S, Q, H, C] have the key expansion absorbed and are followed by their rotated part. The result
    is softmax(scale * q . context) times the latents; the caller expands it to values. The softmax
    is in float32 or wider.
    """
    sequences, queries, heads, _ = q_SQHC.shape
    scores = (q_SQHC.flatten(1, 2) @ context_SLC.mT).view(sequences, queries, heads, -1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
    weights = (
        scores.masked_fill(~allowed_SQL[:, :, None], float("-inf")).softmax(-1).to(q_SQHC.dtype)
    )
    return (weights.flatten(1, 2) @ context_SLC[..., :latent]).view(
        sequences, queries, heads, latent
    )


class _CausalAttention(torch.autograd.Function):
    """Backward: dP = dO V^T, dS = P (dP - sum(dO O)), dQ = dS K, dK = dS^T Q, dV = P^T dO."""

    @staticmethod
    def forward(
        ctx: Any, q_BHTK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, mask: Tensor, scale: float
    ) -> Tensor:
        shape = q_BHTK.shape[:2]
        length = q_BHTK.shape[2]
        q, k, v = (x.reshape(-1, length, x.shape[-1]) for x in (q_BHTK, k_BHTK, v_BHTV))
        out = torch.empty_like(v)
        kept = []
        for start in range(0, length, QUERY_BLOCK):
            end = min(start + QUERY_BLOCK, length)
            weights = _weights(q[:, start:end], k[:, :end], mask[..., start:end, :end], scale)
            out[:, start:end] = torch.bmm(weights, v[:, :end])
            if length <= KEEP_WEIGHTS:
                kept.append(weights)
        ctx.save_for_backward(q, k, v, out, mask, *kept)
        ctx.scale = scale
        ctx.shape = shape
        return out.view(*shape, length, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, mask, *kept = ctx.saved_tensors
        length = q.shape[1]
        d_out = gradients[0].reshape(out.shape)
        mean = (d_out.to(torch.promote_types(out.dtype, torch.float32)) * out).sum(-1, keepdim=True)
        dq = torch.empty_like(q)
        dk = torch.zeros_like(k)
        dv = torch.zeros_like(v)
        for block, start in enumerate(range(0, length, QUERY_BLOCK)):
            end = min(start + QUERY_BLOCK, length)
            queries = q[:, start:end]
            d_block = d_out[:, start:end]
            weights = (
                kept[block]
                if kept
                else _weights(queries, k[:, :end], mask[..., start:end, :end], ctx.scale)
            )
            d_weights = torch.bmm(d_block, v[:, :end].mT)
            d_scores = (d_weights - mean[:, start:end]).mul_(weights).to(q.dtype)
            dv[:, :end] += torch.bmm(weights.mT, d_block)
            dq[:, start:end] = torch.bmm(d_scores, k[:, :end])
            dk[:, :end] += torch.bmm(d_scores.mT, queries)
        dq, dk, dv = (
            d.view(*ctx.shape, length, -1) for d in (dq.mul_(ctx.scale), dk.mul_(ctx.scale), dv)
        )
        return dq, dk, dv, None, None
