"""The routers of a mixture of experts.

V2: softmax scores. V3: sigmoid scores, and a bias that influences the choice only. Both choose from
the best groups of experts. V4: square root of softplus, without groups.

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
    """A router's result for N tokens. Floating-point values are float32 or wider."""

    scores_NE: Tensor  # scores of all experts, with gradient
    indices_Nk: Tensor  # chosen experts, int64
    weights_Nk: Tensor  # gate values of the chosen experts, with gradient


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
    """DeepSeek-V3's router (arXiv:2412.19437, eqs. 12-16; transformers' `DeepseekV3TopkRouter`).

    A group's score is the sum of its two best biased scores. Experts outside the `top_groups` best
    groups cannot be chosen. The bias does not enter the gate values. The product and the scores are
    float32 or wider, whatever x's dtype.

    `pinned_Nk` gives the choice, for comparing forms and for routing replay; the router then
    computes only the gate values. For rows of -1 it chooses itself.
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
    """DeepSeek-V2's router (arXiv:2405.04434, section 2.2; transformers' `DeepseekV2TopkRouter`).

    A group's score is that of its best expert. The gate values are the softmax scores times
    `scale`, not normalised over the chosen experts. The product and the scores are float32 or
    wider. `pinned_Nk` as in `sigmoid_router`.
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
    """DeepSeek-V4's router (transformers' `DeepseekV4TopKRouter`): scores sqrt(softplus(x W^T)),
    the k experts with the best score + bias.

    Gate values are the chosen scores without the bias, normalised over the chosen experts, times
    `scale`. V4's hash layers choose by token id (`DeepseekV4HashRouter`): they pass the choice as
    `pinned_Nk` and have no bias. The product and the scores are float32 or wider. transformers
    computes them in the model's dtype, and in bfloat16 chooses other experts.
    """
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    # For very negative inputs softplus is exactly 0. The square root's slope is infinite there and
    # the gradient would be 0 * inf = NaN.
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
    """The pinned choice [N, k]; in rows of -1, or if nothing is pinned, the router's own choice."""
    with torch.no_grad():
        if pinned_Nk is None:
            return own()
        free_Nk = pinned_Nk < 0
        return torch.where(free_Nk, own(), pinned_Nk) if free_Nk.any() else pinned_Nk


def _best_of_groups(
    scores_NE: Tensor, top_k: int, groups: int, top_groups: int, members: int
) -> Tensor:
    """The `top_k` best experts [N, k] of the `top_groups` best groups. A group's score is the sum
    of its `members` best scores.
    """
    if groups > 1:
        grouped = scores_NE.view(scores_NE.shape[0], groups, -1)
        group_scores = grouped.topk(members, dim=-1).values.sum(-1)
        best = group_scores.topk(top_groups, dim=-1).indices
        outside = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, best, False)
        scores_NE = grouped.masked_fill(outside[..., None], float("-inf")).flatten(1)
    return scores_NE.topk(top_k, dim=-1).indices
