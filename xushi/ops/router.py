"""The routers: V3's sigmoid scores with a bias that steers selection only, and V2's softmax, both
limited to groups; V4's square root of softplus, without groups.

Axes: N tokens, D hidden, E experts, k experts per token.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from xushi.ops.linear import linear


@dataclass(frozen=True)
class RouterChoice:
    """What the router decided for N tokens."""

    scores_NE: Tensor  # affinities of all experts, float32, with gradient
    indices_Nk: Tensor  # chosen experts, int64
    weights_Nk: Tensor  # gate values, float32, with gradient


def sigmoid_router(
    x_ND: Tensor,
    weight_ED: Tensor,
    bias_E: Tensor,
    *,
    top_k: int,
    groups: int,
    top_groups: int,
    normalise: bool,
    scale: float,
    pinned_Nk: Tensor | None = None,
) -> RouterChoice:
    """Scores, choice and gate values (DeepSeek-V3, arXiv:2412.19437, eqs. 12-16; transformers'
    `DeepseekV3TopkRouter`).

    A group's score is the sum of its two best biased scores; experts outside the best groups cannot
    be chosen; the bias never enters the gate values. The product and the scores are float32 at
    least whatever x's dtype. With `pinned_Nk` the choice is given and only the gate values are
    computed (comparison of forms, routing replay), but in rows of -1.
    """
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    scores_NE = linear(x_ND.to(wide), weight_ED.to(wide)).sigmoid()
    indices_Nk = _choice(
        pinned_Nk, lambda: _best_of_groups(scores_NE + bias_E, top_k, groups, top_groups, members=2)
    )
    weights_Nk = scores_NE.gather(1, indices_Nk)
    if normalise:
        weights_Nk = weights_Nk / (weights_Nk.sum(-1, keepdim=True) + 1e-20)
    return RouterChoice(scores_NE, indices_Nk, weights_Nk * scale)


def softmax_router(
    x_ND: Tensor,
    weight_ED: Tensor,
    *,
    top_k: int,
    groups: int,
    top_groups: int,
    scale: float,
    pinned_Nk: Tensor | None = None,
) -> RouterChoice:
    """DeepSeek-V2's (arXiv:2405.04434, section 2.2; transformers' `DeepseekV2TopkRouter`).

    A group's score is that of its best expert, and the gate values are the softmax scores
    themselves, never normalised over the chosen. Product and scores are float32 at least.
    `pinned_Nk` as in `sigmoid_router`.
    """
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    scores_NE = linear(x_ND.to(wide), weight_ED.to(wide)).softmax(-1)
    indices_Nk = _choice(
        pinned_Nk, lambda: _best_of_groups(scores_NE, top_k, groups, top_groups, members=1)
    )
    return RouterChoice(scores_NE, indices_Nk, scores_NE.gather(1, indices_Nk) * scale)


def sqrt_softplus_router(
    x_ND: Tensor,
    weight_ED: Tensor,
    bias_E: Tensor | None,
    *,
    top_k: int,
    scale: float,
    pinned_Nk: Tensor | None = None,
) -> RouterChoice:
    """DeepSeek-V4's (transformers' `DeepseekV4TopKRouter`): scores sqrt(softplus(x W^T)), best k of
    score + bias.

    Gate values are the chosen scores, normalised, without the bias. Its hash layers choose by the
    token's id (`DeepseekV4HashRouter`): that choice comes as `pinned_Nk` and there is no bias.
    Product and scores are float32 at least; transformers computes them in the model's dtype, where
    bfloat16 picks other experts.
    """
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    # Far below zero softplus is exactly 0, where the square root's slope is infinite and the
    # gradient 0 * inf.
    scores_NE = (
        F.softplus(linear(x_ND.to(wide), weight_ED.to(wide)))
        .clamp(min=torch.finfo(wide).tiny)
        .sqrt()
    )
    biased_NE = scores_NE if bias_E is None else scores_NE + bias_E
    indices_Nk = _choice(pinned_Nk, lambda: biased_NE.topk(top_k, dim=-1).indices)
    weights_Nk = scores_NE.gather(1, indices_Nk)
    weights_Nk = weights_Nk / (weights_Nk.sum(-1, keepdim=True) + 1e-20)
    return RouterChoice(scores_NE, indices_Nk, weights_Nk * scale)


def _choice(pinned_Nk: Tensor | None, own: Callable[[], Tensor]) -> Tensor:
    """The given choice [N, k], and the router's own where none is given."""
    if pinned_Nk is not None and not (free_Nk := pinned_Nk < 0).any():
        return pinned_Nk
    with torch.no_grad():
        return own() if pinned_Nk is None else torch.where(free_Nk, own(), pinned_Nk)


def _best_of_groups(
    scores_NE: Tensor, top_k: int, groups: int, top_groups: int, members: int
) -> Tensor:
    """The top-k experts [N, k] of the best groups, a group's score being the sum of its `members`
    best.
    """
    if groups > 1:
        grouped = scores_NE.view(scores_NE.shape[0], groups, -1)
        group_scores = grouped.topk(members, dim=-1).values.sum(-1)
        best = group_scores.topk(top_groups, dim=-1).indices
        outside = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, best, False)
        scores_NE = grouped.masked_fill(outside[..., None], float("-inf")).flatten(1)
    return scores_NE.topk(top_k, dim=-1).indices
