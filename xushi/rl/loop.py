"""The loop of reinforcement learning: sample with the model that is trained, score, one update,
again.

Sampling runs through the very model object that learns, so the only difference between the
sampler's probabilities and the trainer's is that of decoding and whole-sequence form; it is
measured at every step (`logprob_difference`). Killed anywhere it goes on from its checkpoint with
the same tasks and the same random numbers.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from xushi.base.interrupt import finish_step_first
from xushi.base.progress import StepProgress, say
from xushi.base.seeds import derive
from xushi.base.tracking import Tracking
from xushi.engine import Request, SamplingParams, generate_ids
from xushi.envs import Environment, Task
from xushi.evaluate import score_answer
from xushi.model import Batch, Deepseek
from xushi.model.objective import expert_loads
from xushi.ops import token_log_probabilities
from xushi.rl.config import RLConfig
from xushi.rl.grpo import group_advantages, grpo_loss
from xushi.tokenizer import Tokenizer, encode_chat
from xushi.train import (
    CheckpointWriter,
    PackedExamples,
    TrainingState,
    guarded_update,
    latest_checkpoint,
    pack_examples,
    report_problem,
)

# A rollout whose groups all agree has no gradient; so many in a row mean that the task or the
# verifier is at fault.
LIMIT_WITHOUT_SIGNAL = 50


@dataclass(frozen=True)
class Rollout:
    """Answers to P tasks, S each, in that order, with their rewards [P, S] and which verdicts count
    [P, S].
    """

    answers: list[Request]
    rewards_PS: Tensor
    counted_PS: Tensor


def sample_rollout(
    model: Deepseek,
    tokenizer: Tokenizer,
    environment: Environment,
    config: RLConfig,
    seed: int,
    step: int,
) -> Rollout:
    """The rollout of one step: a pure function of the weights, the seed and the step's number."""
    tasks = [environment.task("train", step * config.prompts + p) for p in range(config.prompts)]
    prompts = [
        _prompt_ids(tokenizer, environment, task) for task in tasks for _ in range(config.samples)
    ]
    params = [
        SamplingParams(
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            seed=derive(seed, "rollout", step, p, s),
        )
        for p in range(config.prompts)
        for s in range(config.samples)
    ]
    answers = generate_ids(model, prompts, params, eos_id=tokenizer.eos_id, routing=True)
    verdicts = [
        score_answer(environment, task, tokenizer, answer.token_ids).verdict
        for task, answer in zip(
            [t for t in tasks for _ in range(config.samples)], answers, strict=True
        )
    ]
    shape = (config.prompts, config.samples)
    rewards = torch.tensor([float(verdict == "right") for verdict in verdicts]).view(shape)
    counted = torch.tensor([verdict != "error" for verdict in verdicts]).view(shape)
    return Rollout(answers, rewards, counted)


def _prompt_ids(tokenizer: Tokenizer, environment: Environment, task: Task) -> list[int]:
    question = environment.reply(task, ())
    assert question is not None, "an episode begins with its question"
    return encode_chat(tokenizer, [question])


@dataclass(frozen=True)
class PolicyLoss:
    """GRPO's loss on a rollout, the batch it was computed on, its figures, and the experts' loads."""

    total: Tensor
    batch: Batch
    figures: dict[str, float]
    loads: dict[str, Tensor]


def sampled_experts(answers: Sequence[Request], packed: PackedExamples) -> list[Tensor]:
    """The sampler's experts [B*T, k] for each MoE layer, -1 where nothing was sampled (V3.2's Keep
    Routing, section 3.1).

    Where two experts score nearly the same, decoding and whole-sequence form may choose
    differently, and then a token's two probabilities differ by nats, which the ratio of an update
    takes for a policy that has moved.
    """
    routed = [
        torch.stack(answer.routed_experts or [], 1) for answer in answers
    ]  # [MoE layers, places, k]
    shape = routed[0].shape
    experts = torch.full((shape[0], packed.batch.tokens.numel(), shape[2]), -1)
    for answer, places, chosen in zip(answers, packed.places, routed, strict=True):
        start = places[0] - (len(answer.prompt_ids) - 1)
        experts[:, start : start + chosen.shape[1]] = chosen
    return list(experts)


def policy_loss(
    model: Deepseek, tokenizer: Tokenizer, config: RLConfig, rollout: Rollout
) -> PolicyLoss:
    """GRPO's loss on a rollout, by the experts that sampled it."""
    answers = rollout.answers
    packed = pack_examples(
        [
            ([*a.prompt_ids, *a.token_ids], [False] * len(a.prompt_ids) + [True] * len(a.token_ids))
            for a in answers
        ],
        config.sequence_length,
        tokenizer.pad_id,
    )
    device = model.device
    batch = packed.batch.to(device)
    experts = sampled_experts(answers, packed)
    trunk = model.hidden(
        batch.tokens, batch.positions, batch.segments, [e.to(device) for e in experts]
    )
    places = torch.tensor([place for example in packed.places for place in example], device=device)
    hidden_ND = trunk.hidden_BTD.flatten(0, 1).index_select(0, places)
    log_p_N = token_log_probabilities(
        hidden_ND.to(model.compute_dtype or hidden_ND.dtype),
        model.head_VD,
        batch.targets.flatten().index_select(0, places),
    )
    lengths = torch.tensor([len(a.token_ids) for a in answers])
    row_N = torch.repeat_interleave(torch.arange(len(answers)), lengths).to(device)
    column_N = torch.cat([torch.arange(n) for n in lengths.tolist()]).to(device)
    shape = (len(answers), int(lengths.max()))

    def as_rows(values_N: Tensor) -> Tensor:
        flat = values_N.new_zeros(shape[0] * shape[1])
        return flat.index_copy(0, row_N * shape[1] + column_N, values_N).view(shape)

    old_N = torch.tensor(
        [p for a in answers for p in a.sampling_logprobs], dtype=log_p_N.dtype, device=device
    )
    mask_GT = as_rows(torch.ones_like(log_p_N))
    advantages_G = group_advantages(rollout.rewards_PS, rollout.counted_PS).flatten().to(device)
    # At a temperature other than 1 the sampler's distribution is not the model's; then the
    # trainer's own probability before the update, equal on-policy, stands for the old one.
    old_GT = as_rows(old_N) if config.temperature == 1.0 else as_rows(log_p_N).detach()
    loss = grpo_loss(
        as_rows(log_p_N),
        old_GT,
        advantages_G,
        mask_GT,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        token_mean=config.loss_mean == "tokens",
    )
    model_N = torch.tensor(
        [p for a in answers for p in a.logprobs], dtype=log_p_N.dtype, device=device
    )
    difference = (log_p_N.detach() - model_N).abs().max()
    figures = {
        "loss": float(loss.detach()),
        "reward": float(rollout.rewards_PS.mean()),
        "length": float(lengths.float().mean()),
        "entropy": float(-model_N.mean()),
        "truncated": sum(a.finish_reason == "length" for a in answers) / len(answers),
        "verifier_errors": float((~rollout.counted_PS).sum()),
        "with_signal": float(
            (advantages_G.view_as(rollout.rewards_PS).abs().sum(1) > 0).float().mean()
        ),
        "logprob_difference": float(difference),
    }
    valid_N = (batch.segments >= 0).flatten()
    names = [name for name in model.routers() if int(name) < model.config.num_hidden_layers]
    loads = {
        name: expert_loads(choice, valid_N)
        for name, choice in zip(names, trunk.routing, strict=True)
    }
    return PolicyLoss(loss, batch, figures, loads)


def reinforce(
    model: Deepseek,
    tokenizer: Tokenizer,
    environment: Environment,
    config: RLConfig,
    seed: int,
    directory: Path,
    tracking: Tracking,
) -> None:
    """Train `model` in place for `config.steps` steps; checkpoints go to `directory`, figures to
    stage "rl".
    """
    state = TrainingState.begin(model, config)
    first = state.restore(latest_checkpoint(directory))
    without_signal = 0
    with (
        finish_step_first() as stop,
        StepProgress("rl", config.steps, first) as progress,
        CheckpointWriter(directory, config.keep_checkpoints, config.keep_every) as writer,
    ):
        for step in range(first, config.steps):
            step_began = time.monotonic()
            rollout = sample_rollout(model, tokenizer, environment, config, seed, step)
            policy = policy_loss(model, tokenizer, config, rollout)
            figures = policy.figures
            # A policy's loss lies about zero whatever it has learnt: there is no scale to judge it
            # by.
            updated, problem = guarded_update(
                state, config, step, 0.0, figures["loss"], policy.total, policy.loads
            )
            done = step + 1
            figures |= updated | {"seconds": time.monotonic() - step_began}
            tracking.metrics("rl", done, figures)
            progress.update(
                done,
                f"reward {figures['reward']:.2f}  length {figures['length']:.1f}  "
                f"truncated {figures['truncated']:.0%}",
            )
            if problem is not None:
                report_problem("rl", done, state, problem, policy.batch, directory, tracking)
            flat = figures["with_signal"] == 0 and figures["reward"] < 0.5
            without_signal = without_signal + 1 if flat else 0
            hopeless = without_signal == LIMIT_WITHOUT_SIGNAL
            if (
                done % config.checkpoint_every == 0
                or done == config.steps
                or stop.requested
                or hopeless
            ):
                writer.save(state.checkpoint(done))
            if stop.requested:
                raise KeyboardInterrupt
            if hopeless:
                say(
                    f"rl: no group of the last {LIMIT_WITHOUT_SIGNAL} steps had both right and "
                    "wrong answers, so there "
                    f"is nothing to learn from; stopped after {done} steps (more sft.steps may "
                    "help)"
                )
                tracking.event("rl", "stopped_without_signal", step=done)
                break
    if stop.requested:  # while the last step was saved
        raise KeyboardInterrupt
