"""Attention in which all heads share one key per token that is also the value, with a sink per head
(DeepSeek-V4).

Axes: B batch, T queries, H heads, K width, S keys.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from xushi.ops.dispatch import use_reference

QUERY_BLOCK = 128


def shared_attention(
    q_BTHK: Tensor, keys_BSK: Tensor, allowed_BTS: Tensor, sinks_H: Tensor, scale: float
) -> Tensor:
    """sum over s of p[t, h, s] * key s, with p = softmax over the allowed keys and one sink logit:
    [B, T, H, K].

    The sink takes part in the softmax and gives nothing (transformers' `eager_attention_forward` of
    V4), so that a query may look at nothing at all. Softmax in float32 at least.
    """
    wide = torch.promote_types(q_BTHK.dtype, torch.float32)
    batch, queries, heads, _ = q_BTHK.shape
    scores = (q_BTHK.flatten(1, 2) @ keys_BSK.mT).view(batch, queries, heads, -1).to(wide) * scale
    scores = scores.masked_fill(~allowed_BTS[:, :, None], float("-inf"))
    sink = sinks_H.to(wide)[:, None].expand(batch, queries, heads, 1)
    shares = torch.cat((scores, sink), -1).softmax(-1)[..., :-1].to(q_BTHK.dtype)
    return (shares.flatten(1, 2) @ keys_BSK).view_as(q_BTHK)


def windowed_attention_reference(
    q_BTHK: Tensor,
    kv_BTK: Tensor,
    window_BTT: Tensor,
    entries_BWK: Tensor,
    chosen_BTW: Tensor,
    sinks_H: Tensor,
    scale: float,
) -> Tensor:
    """Each query over the tokens that `window_BTT` allows and the compressed entries that
    `chosen_BTW` allows.
    """
    return shared_attention(
        q_BTHK,
        torch.cat((kv_BTK, entries_BWK), 1),
        torch.cat((window_BTT, chosen_BTW), -1),
        sinks_H,
        scale,
    )


def windowed_attention(
    q_BTHK: Tensor,
    kv_BTK: Tensor,
    window_BTT: Tensor,
    entries_BWK: Tensor,
    chosen_BTW: Tensor,
    sinks_H: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    """The same, queries in blocks that see no key outside the last `window`; each block's scores
    are made again in the backward pass, so that no scores by head are kept.
    """
    if use_reference():
        return windowed_attention_reference(
            q_BTHK, kv_BTK, window_BTT, entries_BWK, chosen_BTW, sinks_H, scale
        )
    length, outputs = q_BTHK.shape[1], []
    for start in range(0, length, QUERY_BLOCK):
        rows, keys = (
            slice(start, start + QUERY_BLOCK),
            slice(max(0, start - window + 1), start + QUERY_BLOCK),
        )
        outputs.append(
            checkpoint(
                windowed_attention_reference,
                q_BTHK[:, rows],
                kv_BTK[:, keys],
                window_BTT[:, rows, keys],
                entries_BWK,
                chosen_BTW[:, rows],
                sinks_H,
                scale,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        )
    return torch.cat(outputs, 1)


@torch.no_grad()
def entry_shares(
    q_BTHK: Tensor,
    kv_BTK: Tensor,
    window_BTT: Tensor,
    entries_BWK: Tensor,
    chosen_BTW: Tensor,
    sinks_H: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    """How much of each query's attention to entries goes to each entry, all heads together: [B, T,
    W] float32.

    The shares of the whole attention (tokens, entries and sink) are summed over heads and, on the
    entries alone, made to add up to 1; zeros where a query attends to no entry. Queries in blocks.
    """
    wide = torch.promote_types(q_BTHK.dtype, torch.float32)
    blocks = []
    for start in range(0, q_BTHK.shape[1], QUERY_BLOCK):
        rows, near = (
            slice(start, start + QUERY_BLOCK),
            slice(max(0, start - window + 1), start + QUERY_BLOCK),
        )
        keys = torch.cat((kv_BTK[:, near], entries_BWK), 1)
        scores = torch.einsum("bthk,bsk->bths", q_BTHK[:, rows], keys).to(wide) * scale
        allowed = torch.cat((window_BTT[:, rows, near], chosen_BTW[:, rows]), -1)[:, :, None]
        sink = sinks_H.to(wide)[:, None].expand(*scores.shape[:3], 1)
        shares = torch.cat((scores.masked_fill(~allowed, float("-inf")), sink), -1).softmax(-1)
        on_entries = shares[..., keys.shape[1] - entries_BWK.shape[1] : -1].sum(2)
        blocks.append(
            on_entries / on_entries.sum(-1, keepdim=True).clamp(min=torch.finfo(wide).tiny)
        )
    return torch.cat(blocks, 1)
