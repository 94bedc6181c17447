"""GRPO as DeepSeek-V3.2 states it (arXiv:2512.02556, section 3.1, eqs. 5-9).

Axes: G sampled answers of a batch, T tokens of an answer (padded), P tasks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def group_advantages(rewards_PS: Tensor, counted_PS: Tensor | None = None) -> Tensor:
    """reward - mean of its task's rewards, not divided by their deviation: [P, S].

    Answers that are not `counted` (their verifier failed) enter no mean and have advantage zero.
    """
    # In float64 equal float32 rewards add up without rounding, so that a group that agrees has
    # advantages of exactly zero: AdamW would make a full step even of a gradient of rounding
    # errors.
    rewards = rewards_PS.double()
    counted = torch.ones_like(rewards) if counted_PS is None else counted_PS.double()
    mean = (rewards * counted).sum(1, keepdim=True) / counted.sum(1, keepdim=True).clamp(min=1)
    return ((rewards - mean) * counted).to(rewards_PS.dtype)


@dataclass(frozen=True)
class Objective:
    """The numbers in GRPO's loss.

    The ratio earns nothing more below 1 - `clip_low` and above 1 + `clip_high`. With `token_mean`
    the mean is over all tokens at once (DAPO, Yu et al. 2025, arXiv:2503.14476, eq. 8), so that a
    token's weight does not depend on the length of its answer; else it is over each answer's
    tokens, then over answers. `off_policy_limit` drops the clipped term of an answer with negative
    advantage whose mean log(p_old/p) exceeds it (eqs. 8-9). One update per rollout with the model
    that sampled it needs neither that nor the KL term.
    """

    clip_low: float
    clip_high: float
    token_mean: bool = False
    kl_weight: float = 0.0
    off_policy_limit: float | None = None


def grpo_loss(
    log_p_GT: Tensor,
    old_log_p_GT: Tensor,
    advantages_G: Tensor,
    mask_GT: Tensor,
    objective: Objective,
    *,
    reference_log_p_GT: Tensor | None = None,
    count: Tensor | None = None,
) -> Tensor:
    """-mean over answers of the mean over tokens of min(rho A, clip(rho) A) - kl_weight * rho * k3,
    a scalar.

    rho = p / p_old with p_old as the sampler returned it; k3 = p_ref/p - log(p_ref/p) - 1, whose
    product with rho has an unbiased gradient (eq. 7). Matches TRL 1.16's `GRPOTrainer` so
    configured. `count` is the number of answers (with `token_mean`: of tokens) of the whole batch
    where these are a part of it; then the parts' losses add up to the whole's.
    """
    ratio = (log_p_GT - old_log_p_GT).exp()
    advantage = advantages_G[:, None]
    clipped = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)
    gain = torch.minimum(ratio * advantage, clipped * advantage)
    tokens_G = mask_GT.sum(1).clamp(min=1)
    if objective.off_policy_limit is not None:
        drift = ((old_log_p_GT - log_p_GT.detach()) * mask_GT).sum(1) / tokens_G
        gain = gain * ~((advantages_G < 0) & (drift > objective.off_policy_limit))[:, None]
    if reference_log_p_GT is not None:
        difference = reference_log_p_GT - log_p_GT
        gain = gain - objective.kl_weight * ratio * (difference.exp() - difference - 1)
    if objective.token_mean:
        total = (gain * mask_GT).sum()
        return -total / (mask_GT.sum() if count is None else count).clamp(min=1)
    total = ((gain * mask_GT).sum(1) / tokens_G).sum()
    return -total / (len(gain) if count is None else count)
