"""DeepSeek-V3's router: sigmoid scores, a bias that steers selection only, and group-limited top-k.

Axes: N tokens, D hidden, E experts, k experts per token.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class RouterChoice:
    """What the router decided for N tokens."""

    scores_NE: Tensor  # sigmoid affinities, float32, with gradient
    indices_Nk: Tensor  # chosen experts, int64
    weights_Nk: Tensor  # gate values, float32, with gradient


def sigmoid_router(x_ND: Tensor, weight_ED: Tensor, bias_E: Tensor, *, top_k: int, groups: int, top_groups: int,
                   normalise: bool, scale: float, pinned_Nk: Tensor | None = None) -> RouterChoice:
    """Scores, choice and gate values (DeepSeek-V3, arXiv:2412.19437, eqs. 12-16; transformers' `DeepseekV3TopkRouter`).

    A group's score is the sum of its two best biased scores; experts outside the best groups cannot be chosen; the
    bias never enters the gate values. The product and the scores are float32 at least whatever x's dtype. With
    `pinned_Nk` the choice is given and only the gate values are computed (comparison of forms, routing replay).
    """
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    scores_NE = F.linear(x_ND.to(wide), weight_ED.to(wide)).sigmoid()
    if pinned_Nk is None:
        with torch.no_grad():
            choice_NE = scores_NE + bias_E
            if groups > 1:
                grouped = choice_NE.view(choice_NE.shape[0], groups, -1)
                group_scores = grouped.topk(2, dim=-1).values.sum(-1)
                best = group_scores.topk(top_groups, dim=-1).indices
                outside = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, best, False)
                choice_NE = grouped.masked_fill(outside[..., None], float("-inf")).flatten(1)
            pinned_Nk = choice_NE.topk(top_k, dim=-1).indices
    weights_Nk = scores_NE.gather(1, pinned_Nk)
    if normalise:
        weights_Nk = weights_Nk / (weights_Nk.sum(-1, keepdim=True) + 1e-20)
    return RouterChoice(scores_NE, pinned_Nk, weights_Nk * scale)
