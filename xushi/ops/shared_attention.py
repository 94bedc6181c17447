"""DeepSeek-V4's attention: all heads share one key per token, which is also the value, and each
head has a sink.

Axes: B batch, T queries, H heads, K width, S keys, W compressed entries.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from xushi.ops.dispatch import use_reference

QUERY_BLOCK = 128


class MaskedKeys(NamedTuple):
    """Keys, and which of them each query may attend to."""

    keys_BSK: Tensor
    allowed_BTS: Tensor


def shared_attention(
    q_BTHK: Tensor, keys_BSK: Tensor, allowed_BTS: Tensor, sinks_H: Tensor, scale: float
) -> Tensor:
    """sum over s of p[t, h, s] * key s, with p = softmax over the allowed keys and one sink logit:
    [B, T, H, K].

    The sink takes part in the softmax and contributes no value (transformers'
    `eager_attention_forward` of V4), so a query without allowed keys gets zeros. Softmax in float32
    or wider.
    """
    wide = torch.promote_types(q_BTHK.dtype, torch.float32)
    batch, queries, heads, _ = q_BTHK.shape
    scores = (q_BTHK.flatten(1, 2) @ keys_BSK.mT).view(batch, queries, heads, -1).to(wide) * scale
    scores = scores.masked_fill(~allowed_BTS[:, :, None], float("-inf"))
    sink = sinks_H.to(wide)[:, None].expand(batch, queries, heads, 1)
    shares = torch.cat((scores, sink), -1).softmax(-1)[..., :-1].to(q_BTHK.dtype)
    return (shares.flatten(1, 2) @ keys_BSK).view_as(q_BTHK)


def windowed_attention_reference(
    q_BTHK: Tensor, tokens: MaskedKeys, entries: MaskedKeys, sinks_H: Tensor, scale: float
) -> Tensor:
    """`shared_attention` over tokens and compressed entries together: [B, T, H, K]."""
    return shared_attention(
        q_BTHK,
        torch.cat((tokens.keys_BSK, entries.keys_BSK), 1),
        torch.cat((tokens.allowed_BTS, entries.allowed_BTS), -1),
        sinks_H,
        scale,
    )


def windowed_attention(
    q_BTHK: Tensor,
    tokens: MaskedKeys,
    entries: MaskedKeys,
    sinks_H: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    """`windowed_attention_reference` with queries in blocks. `tokens` must allow a query no token
    before its last `window`.

    A block is multiplied only with the tokens that its windows reach. The backward pass recomputes
    each block's scores, so that no scores by head are kept.
    """
    if use_reference():
        return windowed_attention_reference(q_BTHK, tokens, entries, sinks_H, scale)
    outputs = []
    for start in range(0, q_BTHK.shape[1], QUERY_BLOCK):
        rows = slice(start, start + QUERY_BLOCK)
        outputs.append(
            checkpoint(
                windowed_attention_reference,
                q_BTHK[:, rows],
                _near(tokens, rows, window),
                MaskedKeys(entries.keys_BSK, entries.allowed_BTS[:, rows]),
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
    tokens: MaskedKeys,
    entries: MaskedKeys,
    sinks_H: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    """The share of each query's attention to entries that goes to each entry, summed over heads:
    [B, T, W] in float32 or wider.

    Each head's softmax covers tokens, entries and sink. The entries' part is summed over heads and
    normalised to sum to 1; it is zero if a query attends to no entry. Queries are computed in
    blocks.
    """
    wide = torch.promote_types(q_BTHK.dtype, torch.float32)
    blocks = []
    for start in range(0, q_BTHK.shape[1], QUERY_BLOCK):
        rows = slice(start, start + QUERY_BLOCK)
        near = _near(tokens, rows, window)
        keys = torch.cat((near.keys_BSK, entries.keys_BSK), 1)
        scores = torch.einsum("bthk,bsk->bths", q_BTHK[:, rows], keys).to(wide) * scale
        allowed = torch.cat((near.allowed_BTS, entries.allowed_BTS[:, rows]), -1)[:, :, None]
        sink = sinks_H.to(wide)[:, None].expand(*scores.shape[:3], 1)
        shares = torch.cat((scores.masked_fill(~allowed, float("-inf")), sink), -1).softmax(-1)
        on_entries = shares[..., near.keys_BSK.shape[1] : -1].sum(2)
        blocks.append(
            on_entries / on_entries.sum(-1, keepdim=True).clamp(min=torch.finfo(wide).tiny)
        )
    return torch.cat(blocks, 1)


def _near(tokens: MaskedKeys, rows: slice, window: int) -> MaskedKeys:
    """The tokens that the windows of the queries `rows` reach."""
    near = slice(max(0, rows.start - window + 1), rows.stop)
    return MaskedKeys(tokens.keys_BSK[:, near], tokens.allowed_BTS[:, rows, near])
