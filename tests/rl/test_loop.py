"""Learning from rewards: the loss on a rollout against answers scored one by one, and that the
reward rises.
"""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from xushi.base.messages import Message
from xushi.base.tracking import Tracking
from xushi.engine import Request
from xushi.envs import Score
from xushi.model import Deepseek
from xushi.ops import RouterChoice
from xushi.rl import RLConfig, grpo_loss, reinforce
from xushi.rl import loop as module
from xushi.rl.loop import Rollout, policy_loss, sample_rollout
from xushi.tokenizer import encode_chat, parse_assistant
from xushi.train import PackedExamples, pack_examples

CONFIG = RLConfig(
    steps=10,
    learning_rate=0.003,
    optimizer="adamw",
    weight_decay=0.0,
    prompts=6,
    samples=8,
    max_tokens=4,
    sequence_length=32,
    dtype="fp32",
    checkpoint_every=4,
)


def log_probabilities(model: Deepseek, request: Request) -> Tensor:
    """log p of an answer's tokens by the whole model on that one sequence."""
    ids = torch.tensor([[*request.prompt_ids, *request.token_ids]])
    logits = model(ids).logits[0, len(request.prompt_ids) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(request.token_ids)[:, None])[:, 0]


def one_by_one(model: Deepseek, rollout: Rollout) -> Tensor:
    """The loss without packing: each answer in its own forward."""
    rewards, counted = rollout.rewards_PS, rollout.counted_PS
    total = torch.zeros(())
    for index, answer in enumerate(rollout.answers):
        p, s = divmod(index, rewards.shape[1])
        if not counted[p, s]:
            continue
        group = rewards[p][counted[p]]
        advantage = float(rewards[p, s] - group.mean())
        ratio = (log_probabilities(model, answer) - torch.tensor(answer.sampling_logprobs)).exp()
        total = total + torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage).mean()
    return -total / len(rollout.answers)


def gradients(model: Deepseek, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()]
    )


@pytest.fixture
def rollout(fine_tuned, tokenizer, environment) -> Rollout:
    return sample_rollout(fine_tuned(), tokenizer, environment, CONFIG, 7, 0)


def test_a_rollout_is_scored_answers(rollout, tokenizer, environment) -> None:
    assert (
        rollout.rewards_PS.shape == rollout.counted_PS.shape == (6, 8)
        and len(rollout.answers) == 48
    )
    for index, answer in enumerate(rollout.answers):
        p, s = divmod(index, 8)
        task = environment.task("train", p)
        assert answer.prompt_ids == encode_chat(tokenizer, [Message("user", task.prompt)])
        message, finished = parse_assistant(tokenizer, answer.token_ids)
        content = message.content
        assert rollout.rewards_PS[p, s] == (finished and content in ("2", "4", "6", "8"))
        assert rollout.counted_PS[p, s] == (not finished or content != "0")
    assert 0.1 < rollout.rewards_PS.mean() < 0.9 and not rollout.counted_PS.all()


def test_a_rollout_is_a_function_of_weights_seed_and_step(
    fine_tuned, tokenizer, environment, rollout
) -> None:
    def tokens(seed: int, step: int) -> list[list[int]]:
        return [
            a.token_ids
            for a in sample_rollout(
                fine_tuned(), tokenizer, environment, CONFIG, seed, step
            ).answers
        ]

    same = [answer.token_ids for answer in rollout.answers]
    assert tokens(7, 0) == same and tokens(8, 0) != same and tokens(7, 1) != same
    later = sample_rollout(fine_tuned(), tokenizer, environment, CONFIG, 7, 3)
    tasks = [environment.task("train", 3 * 6 + p).prompt for p in range(6)]
    assert [
        tokenizer.decode(a.prompt_ids, skip_special=True) for a in later.answers[::8]
    ] == tasks, "fresh tasks"
    first = [a.token_ids for a in rollout.answers[:8]]
    assert len({tuple(ids) for ids in first}) > 1, "samples of one task must differ"


def test_sampler_and_trainer_agree_on_the_probabilities(fine_tuned, tokenizer, rollout) -> None:
    """One model object in both forms: what is left is float32's rounding. Places that were off by
    one would differ by whole nats.
    """
    model = fine_tuned()
    figures = policy_loss(model, tokenizer, CONFIG, rollout).figures
    assert figures["logprob_difference"] < 1e-4
    by_hand = max(
        float((log_probabilities(model, a).detach() - torch.tensor(a.logprobs)).abs().max())
        for a in rollout.answers
    )
    assert by_hand < 1e-4


@pytest.mark.parametrize("off_policy", [False, True])
def test_the_packed_loss_is_that_of_the_answers_one_by_one(
    off_policy, fine_tuned, tokenizer, rollout
) -> None:
    """Value and gradient. Off-policy, the sampler's probabilities are moved so that ratios differ
    and some are clipped: a place that belongs to another token or another answer would meet the
    wrong one.
    """
    model = fine_tuned()
    if off_policy:
        stream = torch.Generator().manual_seed(5)
        for answer in rollout.answers:
            moved = torch.randn(len(answer.token_ids), generator=stream) * 0.3
            answer.sampling_logprobs[:] = (torch.tensor(answer.logprobs) + moved).tolist()
    policy = policy_loss(model, tokenizer, CONFIG, rollout)
    loss, figures = policy.total, policy.figures
    want = one_by_one(model, rollout)
    assert figures["loss"] == float(loss.detach()) == pytest.approx(float(want.detach()), abs=1e-5)
    got, expected = gradients(model, loss), gradients(model, want)
    assert expected.norm() > 1e-3 and (got - expected).norm() <= 1e-4 * expected.norm()


def test_the_update_goes_through_the_experts_that_sampled(fine_tuned, tokenizer, rollout) -> None:
    """A router that has moved since, as rounding moves one that is near a tie: the choice stays,
    the gates follow.
    """
    model = fine_tuned()
    chosen = [choice.indices_Nk for choice in policy_choice(model, tokenizer, rollout)]
    for router in model.routers().values():
        torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(3))
    moved = [choice.indices_Nk for choice in policy_choice(model, tokenizer, rollout)]
    assert all(torch.equal(a, b) for a, b in zip(chosen, moved, strict=True))
    batch = pack(rollout, tokenizer).batch
    free = model.hidden(batch.tokens, batch.positions, batch.segments).routing
    assert not torch.equal(free[0].indices_Nk[(batch.segments >= 0).flatten()], moved[0])


def pack(rollout: Rollout, tokenizer) -> PackedExamples:
    return pack_examples(
        [
            ([*a.prompt_ids, *a.token_ids], [False] * len(a.prompt_ids) + [True] * len(a.token_ids))
            for a in rollout.answers
        ],
        CONFIG.sequence_length,
        tokenizer.pad_id,
    )


def policy_choice(model: Deepseek, tokenizer, rollout: Rollout) -> list[RouterChoice]:
    """What the routers did at the places of answers in the loss's forward pass."""
    seen, hidden = [], model.hidden
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "hidden", lambda *inputs: seen.append(hidden(*inputs)) or seen[-1])
        policy_loss(model, tokenizer, CONFIG, rollout)
    inside = (pack(rollout, tokenizer).batch.segments >= 0).flatten()
    return [replace(choice, indices_Nk=choice.indices_Nk[inside]) for choice in seen[0].routing]


def test_at_another_temperature_the_update_is_on_policy(fine_tuned, tokenizer, rollout) -> None:
    """The sampler's distribution is then not the model's, so the trainer's own probability stands
    for the old one: every ratio is 1 and only the gradient is left.
    """
    for answer in rollout.answers:
        answer.sampling_logprobs[:] = [-9.0] * len(answer.token_ids)
    config = CONFIG.model_copy(update={"temperature": 0.7})
    model = fine_tuned()
    loss = policy_loss(model, tokenizer, config, rollout).total
    assert abs(float(loss.detach())) < 1e-6
    for answer in rollout.answers:
        answer.sampling_logprobs[:] = answer.logprobs
    expected = gradients(model, one_by_one(model, rollout))
    assert (gradients(model, loss) - expected).norm() <= 1e-4 * expected.norm()


def test_the_figures(fine_tuned, tokenizer, rollout) -> None:
    model = fine_tuned()
    policy = policy_loss(model, tokenizer, CONFIG, rollout)
    figures, loads = policy.figures, policy.loads
    assert figures["reward"] == pytest.approx(float(rollout.rewards_PS.mean()))
    assert figures["length"] == pytest.approx(sum(len(a.token_ids) for a in rollout.answers) / 48)
    assert figures["entropy"] == pytest.approx(
        -sum(sum(a.logprobs) for a in rollout.answers)
        / sum(len(a.token_ids) for a in rollout.answers),
        rel=1e-5,
    )
    assert figures["truncated"] == sum(a.finish_reason == "length" for a in rollout.answers) / 48
    assert figures["verifier_errors"] == int((~rollout.counted_PS).sum())
    agree = [
        len(set(r[c].tolist())) <= 1
        for r, c in zip(rollout.rewards_PS, rollout.counted_PS, strict=True)
    ]
    assert figures["with_signal"] == pytest.approx(1 - sum(agree) / 6)
    places = sum(len(a.prompt_ids) + len(a.token_ids) - 1 for a in rollout.answers)
    assert (
        set(loads) == {"1"} and float(loads["1"].sum()) == 2 * places
    )  # the MTP layer does not run


def test_rewards_that_agree_leave_the_model_alone(fine_tuned, tokenizer, rollout) -> None:
    model = fine_tuned()
    flat = Rollout(rollout.answers, torch.ones(6, 8), torch.ones(6, 8, dtype=torch.bool))
    policy = policy_loss(model, tokenizer, CONFIG, flat)
    loss, figures = policy.total, policy.figures
    assert figures["with_signal"] == 0 and not gradients(model, loss).any()


def rewards(directory: Path, fine_tuned, tokenizer, environment, steps: int) -> list[float]:
    tracking = Tracking(directory / "tracking.sqlite")
    config = CONFIG.model_copy(update={"steps": steps})
    reinforce(fine_tuned(), tokenizer, environment, config, 3, directory / "checkpoints", tracking)
    return [value for _, value in tracking.series("rl", "reward")]


def test_the_reward_rises(fine_tuned, tokenizer, environment, tmp_path, monkeypatch) -> None:
    """From about four right in ten to nearly all; with the loss's sign turned, to nearly none."""
    got = rewards(tmp_path / "right", fine_tuned, tokenizer, environment, 25)
    assert got[0] < 0.65 and sum(got[-5:]) / 5 > 0.9, got

    monkeypatch.setattr(
        module, "grpo_loss", lambda *arguments, **keywords: -grpo_loss(*arguments, **keywords)
    )
    turned = rewards(tmp_path / "turned", fine_tuned, tokenizer, environment, 25)
    assert sum(turned[-5:]) / 5 < 0.1, turned


def final_weights(directory: Path) -> bytes:
    return (max(directory.glob("step-*")) / "model.safetensors").read_bytes()


def test_killed_and_gone_on_with_it_ends_with_the_same_bits(
    fine_tuned, tokenizer, environment, tmp_path, monkeypatch
) -> None:
    """Killed while sampling, after a checkpoint and before one."""
    rewards(tmp_path / "whole", fine_tuned, tokenizer, environment, 10)

    class Killed(Exception):
        """Stands for the process's end."""

    for when in (2, 6):

        def killed(*arguments, when: int = when) -> Rollout:
            if arguments[-1] == when:
                raise Killed
            return sample_rollout(*arguments)

        monkeypatch.setattr(module, "sample_rollout", killed)
        with pytest.raises(Killed):
            rewards(tmp_path / "killed", fine_tuned, tokenizer, environment, 10)
        monkeypatch.undo()
    rewards(tmp_path / "killed", fine_tuned, tokenizer, environment, 10)
    assert final_weights(tmp_path / "killed" / "checkpoints") == final_weights(
        tmp_path / "whole" / "checkpoints"
    )


def test_nothing_to_learn_from_ends_it_and_says_so(
    fine_tuned, tokenizer, environment, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(module, "LIMIT_WITHOUT_SIGNAL", 3)
    monkeypatch.setattr(
        type(environment), "score", lambda self, task, transcript: Score("wrong", "always")
    )
    tracking = Tracking(tmp_path / "tracking.sqlite")
    model = fine_tuned()
    reinforce(model, tokenizer, environment, CONFIG, 3, tmp_path / "checkpoints", tracking)
    assert [step for step, _ in tracking.series("rl", "reward")] == [1, 2, 3]
    assert [event["details"] for event in tracking.events("rl")] == [{"step": 3}]
    said = capsys.readouterr()
    assert "nothing to learn from" in said.out + said.err
    assert (tmp_path / "checkpoints" / "step-000000003").is_dir()
    before = fine_tuned().state_dict()
    moved = {
        name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert not moved  # the routers' biases neither, unless the recipe says so


def test_figures_are_tracked_at_every_step(fine_tuned, tokenizer, environment, tmp_path) -> None:
    tracking = Tracking(tmp_path / "tracking.sqlite")
    reinforce(
        fine_tuned(),
        tokenizer,
        environment,
        CONFIG.model_copy(update={"steps": 2}),
        3,
        tmp_path / "checkpoints",
        tracking,
    )
    names = set(tracking.names("rl"))
    assert {
        "reward",
        "length",
        "entropy",
        "truncated",
        "with_signal",
        "verifier_errors",
        "logprob_difference",
        "gradient_norm",
        "router.1.max_violation",
    } <= names
    assert all(math.isfinite(value) for name in names for _, value in tracking.series("rl", name))
