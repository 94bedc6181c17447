"""Causal attention inside segments, for training and for scoring whole sequences.

Axes: B batch, H heads, T tokens, K query and key width, V value width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from xushi.ops.dispatch import use_reference

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


def causal_attention_reference(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, mask: Tensor | None,
                               scale: float) -> Tensor:
    """softmax(scale * q k^T + mask) v in the inputs' own dtype: [B, H, T, V]."""
    if mask is None:
        length = q_BHTK.shape[-2]
        mask = torch.ones(length, length, dtype=torch.bool, device=q_BHTK.device).tril()
    scores = (q_BHTK @ k_BHTK.transpose(-1, -2)) * scale
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v_BHTV


def causal_attention(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The same through PyTorch's fused attention: [B, H, T, V].

    The fused CPU form asks for equal key and value widths, so the narrower one is padded with zeros, which change
    neither the scores nor the part of the output that is kept; unpadded, MLA falls to a path two to four times slower.
    Queries go in blocks that see only the keys up to their own end, as the fused form also computes what it masks.
    """
    if use_reference():
        return causal_attention_reference(q_BHTK, k_BHTK, v_BHTV, mask, scale)
    key_width, value_width = q_BHTK.shape[-1], v_BHTV.shape[-1]
    if value_width < key_width:
        v_BHTV = F.pad(v_BHTV, (0, key_width - value_width))
    elif key_width < value_width:
        q_BHTK = F.pad(q_BHTK, (0, value_width - key_width))
        k_BHTK = F.pad(k_BHTK, (0, value_width - key_width))
    length = q_BHTK.shape[-2]
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=q_BHTK.device).tril()
    blocks = []
    for start in range(0, length, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, length)
        blocks.append(F.scaled_dot_product_attention(
            q_BHTK[:, :, start:end], k_BHTK[:, :, :end], v_BHTV[:, :, :end], attn_mask=mask[..., start:end, :end],
            scale=scale))
    return torch.cat(blocks, dim=2)[..., :value_width]
