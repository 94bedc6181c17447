"""Causal attention inside segments, for training and for scoring whole sequences; and MLA on a
cache of latents.

Axes: B batch, H heads, T tokens, K query and key width, V value width, R rotated width, W what a
head's key without rotation and its value take; S sequences of a decoding call, Q new tokens of a
sequence, L cached positions, C latent and rotated width.
"""

from typing import Any

import torch
from torch import Tensor

from xushi.ops import native
from xushi.ops.dispatch import use_reference
from xushi.ops.rope import apply_rope

# up to this length the weights are kept for the backward pass, beyond it they are made again
KEEP_WEIGHTS = 256
QUERY_BLOCK = 128  # of 32, 64, 128 and 256 the fastest at 256 tokens (docs/lab-log.md)


def segment_mask(segments_BT: Tensor) -> Tensor | None:
    """[B, 1, T, T], True where a query may look: not ahead, and not across a segment border.

    None when every row is one segment, so that plain causal attention serves.
    """
    if bool((segments_BT == segments_BT[:, :1]).all()):
        return None
    length = segments_BT.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments_BT.device).tril()
    return (causal & (segments_BT[:, :, None] == segments_BT[:, None, :]))[:, None]


def causal_attention_reference(
    q_BHTK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """softmax(scale * q k^T + mask) v in the inputs' own dtype: [B, H, T, V]."""
    if mask is None:
        length = q_BHTK.shape[-2]
        mask = torch.ones(length, length, dtype=torch.bool, device=q_BHTK.device).tril()
    scores = (q_BHTK @ k_BHTK.transpose(-1, -2)) * scale
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v_BHTV


@torch.no_grad()
def largest_scores(q_BHTK: Tensor, k_BHTK: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Each head's largest scale * q k^T among what `causal_attention` looks at: [H], in float32 at
    least.
    """
    length, wide = q_BHTK.shape[2], torch.promote_types(q_BHTK.dtype, torch.float32)
    q, k = q_BHTK.to(wide), k_BHTK.to(wide)
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
    """[B, T] int32: where each position's document begins; None where a document does not lie in
    one piece.
    """
    length = segments_BT.shape[1]
    positions = torch.arange(length, device=segments_BT.device).expand_as(segments_BT)
    border = torch.ones_like(segments_BT, dtype=torch.bool)
    border[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    documents = segments_BT.sort(1).values.diff(dim=1).ne(0).sum(1) + 1
    if not bool((border.sum(1) == documents).all()):
        return None
    return positions.where(border, 0).cummax(1).values.to(torch.int32)


def causal_attention(
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTV: Tensor,
    mask: Tensor | None,
    scale: float,
    starts_BT: Tensor | None = None,
) -> Tensor:
    """The same with softmax in float32 at least, queries in blocks, and a backward pass written
    out: [B, H, T, V].

    A block of queries sees only the keys up to its own end. In long sequences its weights are made
    again in the backward pass, so what is kept is linear in T. PyTorch's fused form takes 1.2
    (fp32) to 2.9 (bf16) times as long on a CPU (docs/lab-log.md). A mask made of segments in one
    piece may come with `segment_starts`, for the compiled form.
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
    """Queries, keys [B, H, T, K] and values [B, H, T, V] of latent attention (DeepSeek-V2, section
    2.1.3).

    The last R of K values of a query are rotated; a head's keys and values stand in `kv_BTHW`, the
    keys' rotated part is the same for all heads. `angles` are cos and sin [B, T, R / 2].
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
    """Causal attention of what `expand_heads` makes: [B, T, H, V]. Mask and starts as in
    `causal_attention`.
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
    """softmax(scale * q k^T) in q's dtype where `mask` [B or 1, 1, t, s] allows: q [B*H, t, K], k
    [B*H, s, K].
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
    """MLA on the cached latents themselves: softmax(scale * q . context) of the context's first
    `latent` values.

    Queries [S, Q, H, C] have the keys' expansion absorbed, beside their rotated part; the context
    [S, L, C] holds latent and rotated key (DeepSeek-V2, arXiv:2405.04434, section 2.1.2). Softmax
    in float32 at least. What each head read comes back as a latent, [S, Q, H, latent], for the
    values' expansion.
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
    """dP = dO V^T, dS = P (dP - sum(dO O)), dQ = dS K, dK = dS^T Q, dV = P^T dO."""

    @staticmethod
    def forward(
        ctx: Any, q_BHTK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, mask: Tensor, scale: float
    ) -> Tensor:
        shape, length = q_BHTK.shape[:2], q_BHTK.shape[2]
        q, k, v = (x.reshape(-1, length, x.shape[-1]) for x in (q_BHTK, k_BHTK, v_BHTV))
        out, kept = torch.empty_like(v), []
        for start in range(0, length, QUERY_BLOCK):
            end = min(start + QUERY_BLOCK, length)
            weights = _weights(q[:, start:end], k[:, :end], mask[..., start:end, :end], scale)
            out[:, start:end] = torch.bmm(weights, v[:, :end])
            if length <= KEEP_WEIGHTS:
                kept.append(weights)
        ctx.save_for_backward(q, k, v, out, mask, *kept)
        ctx.scale, ctx.shape = scale, shape
        return out.view(*shape, length, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, mask, *kept = ctx.saved_tensors
        length = q.shape[1]
        d_out = gradients[0].reshape(out.shape)
        mean = (d_out.to(torch.promote_types(out.dtype, torch.float32)) * out).sum(-1, keepdim=True)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for block, start in enumerate(range(0, length, QUERY_BLOCK)):
            end = min(start + QUERY_BLOCK, length)
            queries, d_block = q[:, start:end], d_out[:, start:end]
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
