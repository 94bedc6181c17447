"""The policy's loss on a rollout: GRPO on packed episodes, through the experts that sampled them.

Axes: G episodes, T sampled tokens of an episode (padded), N sampled tokens of all episodes, B rows
and P tasks, S samples.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from xushi.model import Batch, Deepseek, Hidden
from xushi.model.objective import expert_loads
from xushi.ops import token_log_probabilities
from xushi.rl.config import RLConfig
from xushi.rl.grpo import Objective, group_advantages, grpo_loss
from xushi.rl.rollout import Rollout
from xushi.train import Layout, PackedExamples, pack_examples


@dataclass(frozen=True)
class PolicyLoss:
    """GRPO's loss on a rollout, this process's part of the whole batch's.

    `batch` is what it was computed on, on the CPU. `figures` and `loads` are the whole batch's.
    """

    total: Tensor
    batch: Batch
    figures: dict[str, float]
    loads: dict[str, Tensor]


def policy_loss(
    model: Deepseek, config: RLConfig, pad_id: int, rollout: Rollout, layout: Layout | None = None
) -> PolicyLoss:
    """The loss on this process's episodes; the losses of all processes add up to the whole's."""
    layout = layout or Layout()
    branches = rollout.branches
    examples = [(branch.ids, branch.sampled) for branch in branches]
    packed = pack_examples(examples, config.sequence_length, pad_id)
    batch = packed.batch.to(model.device)
    experts = [chosen.to(model.device) for chosen in sampled_experts(rollout, packed)]
    trunk = model.hidden(batch.tokens, batch.positions, batch.segments, experts or None)
    log_p_N = _log_probabilities(model, trunk, batch, packed)
    advantages_PS = group_advantages(rollout.rewards_PS, rollout.counted_PS)
    loss = _loss(config, rollout, log_p_N, advantages_PS, layout)
    figures = _figures(rollout, loss, log_p_N, advantages_PS, layout)
    return PolicyLoss(loss, packed.batch, figures, _loads(model, trunk, batch, layout))


def sampled_experts(rollout: Rollout, packed: PackedExamples) -> list[Tensor]:
    """The sampler's experts [B*T, k] for each MoE layer, -1 where nothing was sampled.

    This is V3.2's Keep Routing (section 3.1). Where two experts score nearly the same, decoding and
    the whole-sequence form may choose differently. Then a token's two probabilities differ by
    nats, and the ratio of an update would take that for a policy that has moved.
    """
    chosen = [torch.stack(branch.experts, 1) for branch in rollout.branches if branch.experts]
    if not chosen:  # a model without experts
        return []
    layers, _, per_token = chosen[0].shape
    experts = torch.full((layers, packed.batch.tokens.numel(), per_token), -1)
    for start, routed in zip(packed.starts, chosen, strict=True):
        experts[:, start : start + routed.shape[1]] = routed
    return list(experts)


def _log_probabilities(
    model: Deepseek, trunk: Hidden, batch: Batch, packed: PackedExamples
) -> Tensor:
    """log p of the sampled tokens [N], branch by branch."""
    flat = [place for places in packed.places for place in places]
    places = torch.tensor(flat, device=model.device)
    hidden_ND = trunk.hidden_BTD.flatten(0, 1).index_select(0, places)
    return token_log_probabilities(
        hidden_ND.to(model.compute_dtype or hidden_ND.dtype),
        model.head_VD,
        batch.targets.flatten().index_select(0, places),
    )


def _loss(
    config: RLConfig, rollout: Rollout, log_p_N: Tensor, advantages_PS: Tensor, layout: Layout
) -> Tensor:
    """GRPO's loss, divided by the counts of the whole batch."""
    device = log_p_N.device
    lengths = torch.tensor([episode.tokens for episode in rollout.episodes])
    row_N = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(device)
    column_N = torch.cat([torch.arange(n) for n in lengths.tolist()]).to(device)
    shape = (len(lengths), int(lengths.max()))

    def as_rows(values_N: Tensor) -> Tensor:
        flat = values_N.new_zeros(shape[0] * shape[1])
        return flat.index_copy(0, row_N * shape[1] + column_N, values_N).view(shape)

    log_p_GT = as_rows(log_p_N)
    mask_GT = as_rows(torch.ones_like(log_p_N))
    # At a temperature other than 1 the sampler's distribution is not the model's. Then the
    # trainer's own probability before the update, equal on-policy, is taken for the old one.
    old_GT = log_p_GT.detach()
    if config.temperature == 1.0:
        old = [p for branch in rollout.branches for p in branch.sampling_logprobs]
        old_GT = as_rows(torch.tensor(old, dtype=log_p_N.dtype, device=device))
    tokens = config.loss_mean == "tokens"
    count = layout.total(mask_GT.sum() if tokens else mask_GT.new_tensor(float(len(lengths))))
    return grpo_loss(
        log_p_GT,
        old_GT,
        advantages_PS.flatten().to(device),
        mask_GT,
        Objective(config.clip_low, config.clip_high, token_mean=tokens),
        count=count,
    )


def _figures(
    rollout: Rollout, loss: Tensor, log_p_N: Tensor, advantages_PS: Tensor, layout: Layout
) -> dict[str, float]:
    """The whole batch's figures; the sums of all processes are put together here."""
    episodes, branches = rollout.episodes, rollout.branches
    logprobs = [p for branch in branches for p in branch.logprobs]
    model_N = torch.tensor(logprobs, dtype=log_p_N.dtype, device=log_p_N.device)
    sums = {
        "loss": float(loss.detach()),
        "tasks": float(len(rollout.rewards_PS)),
        "episodes": float(len(episodes)),
        "sampled": float(len(logprobs)),
        "tokens": float(sum(len(branch.ids) - 1 for branch in branches)),
        "reward": float(rollout.rewards_PS.double().sum()),  # 0 where the verifier failed
        "counted": float(rollout.counted_PS.sum()),
        "surprise": -float(model_N.double().sum()),
        "truncated": float(sum(episode.finish_reason == "length" for episode in episodes)),
        "errors": float((~rollout.counted_PS).sum()),
        "with_signal": float((advantages_PS.abs().sum(1) > 0).sum()),
    }
    difference = float((log_p_N.detach() - model_N).abs().max())
    gathered = layout.team.gather((sums, difference))
    whole = {name: sum(part[name] for part, _ in gathered) for name in sums}
    return {
        "loss": whole["loss"],
        "tokens": whole["tokens"],
        "target_tokens": whole["sampled"],
        "reward": whole["reward"] / max(1.0, whole["counted"]),
        "length": whole["sampled"] / whole["episodes"],
        "entropy": whole["surprise"] / whole["sampled"],
        "truncated": whole["truncated"] / whole["episodes"],
        "verifier_errors": whole["errors"],
        "with_signal": whole["with_signal"] / whole["tasks"],
        "logprob_difference": max(found for _, found in gathered),
    }


def _loads(model: Deepseek, trunk: Hidden, batch: Batch, layout: Layout) -> dict[str, Tensor]:
    """How many tokens of the whole batch chose each expert, by router of the trunk."""
    valid_N = (batch.segments >= 0).flatten()
    names = [name for name in model.routers() if int(name) < model.config.num_hidden_layers]
    loads = [expert_loads(choice, valid_N) for choice in trunk.routing]
    return dict(zip(names, layout.total(torch.stack(loads)), strict=True)) if loads else {}
