"""The lightning indexer, which chooses the keys that a query attends to: its scores, a
deterministic choice of the best keys, and its training loss.

Source: DeepSeek Sparse Attention (DeepSeek-V3.2, arXiv:2512.02556, section 2.1).

Axes: B batch, T queries, S keys, J index heads, I index width, H attention heads, K query and key
width.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from xushi.ops.dispatch import use_reference

QUERY_BLOCK = 128


def index_scores_reference(q_BTJI: Tensor, k_BSI: Tensor, weights_BTJ: Tensor) -> Tensor:
    """score[t, s] = sum over j of w[t, j] ReLU(q[t, j] . k[s] / sqrt(I)), eq. 1: [B, T, S] in
    float32 or wider.
    """
    wide = torch.promote_types(q_BTJI.dtype, torch.float32)
    products = (
        torch.einsum("btji,bsi->btjs", q_BTJI.to(wide), k_BSI.to(wide)) * q_BTJI.shape[-1] ** -0.5
    )
    return torch.einsum("btj,btjs->bts", weights_BTJ.to(wide), products.relu())


def index_scores(q_BTJI: Tensor, k_BSI: Tensor, weights_BTJ: Tensor) -> Tensor:
    """`index_scores_reference` with queries in blocks. The products of each head [B, T, J, S] are
    never kept: the backward pass recomputes them block by block.
    """
    if use_reference():
        return index_scores_reference(q_BTJI, k_BSI, weights_BTJ)
    blocks = zip(
        torch.split(q_BTJI, QUERY_BLOCK, 1), torch.split(weights_BTJ, QUERY_BLOCK, 1), strict=True
    )
    return torch.cat(
        [
            checkpoint(
                index_scores_reference, q, k_BSI, w, use_reentrant=False, preserve_rng_state=False
            )
            for q, w in blocks
        ],
        1,
    )


@torch.no_grad()
def best_keys(scores: Tensor, allowed: Tensor, count: int) -> Tensor:
    """[..., S], True for each query's `count` best allowed keys, or for all allowed keys if there
    are fewer.

    `allowed` broadcasts to `scores` [..., S]. Of keys with equal scores the earlier ones are
    chosen. ReLU makes many scores exactly zero and `topk` does not define their order, so without
    this rule a whole sequence and a growing cache could choose different keys.
    """
    allowed = allowed.expand_as(scores)
    if scores.shape[-1] <= count:
        return allowed
    scores = scores.masked_fill(~allowed, float("-inf"))
    least = scores.topk(count, dim=-1, sorted=True).values[..., -1:]
    above = scores > least
    level = scores == least
    room = count - above.sum(-1, keepdim=True)
    return (above | (level & (level.cumsum(-1) <= room))) & allowed


@torch.no_grad()
def attention_shares(q_BHTK: Tensor, k_BHSK: Tensor, mask_BTS: Tensor, scale: float) -> Tensor:
    """The share of each query's attention that goes to each key, averaged over heads: [B, T, S] in
    float32 or wider; rows sum to 1.

    This is the sum over heads, L1-normalised, of section 2.1.1. Queries are computed in blocks.
    """
    wide = torch.promote_types(q_BHTK.dtype, torch.float32)
    return torch.cat(
        [
            ((q @ k_BHSK.mT).to(wide) * scale)
            .masked_fill(~mask[:, None], float("-inf"))
            .softmax(-1)
            .mean(1)
            for q, mask in zip(
                torch.split(q_BHTK, QUERY_BLOCK, 2),
                torch.split(mask_BTS, QUERY_BLOCK, 1),
                strict=True,
            )
        ],
        1,
    )


def index_divergence(scores_BTS: Tensor, shares_BTS: Tensor, mask_BTS: Tensor) -> Tensor:
    """KL(shares || softmax of the scores over the keys that the mask allows) for each query, eqs. 3
    and 4: [B, T].
    """
    # Finite instead of minus infinity, so that a query without allowed keys gets 0 and not NaN.
    log_q = scores_BTS.masked_fill(~mask_BTS, -1e30).log_softmax(-1).masked_fill(~mask_BTS, 0.0)
    return (torch.xlogy(shares_BTS, shares_BTS) - shares_BTS * log_q).sum(-1)
