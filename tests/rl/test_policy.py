"""The policy's loss on a rollout, against episodes scored one by one; its figures, and through
which experts it goes.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from xushi.evaluate import Branch
from xushi.model import Deepseek
from xushi.ops import RouterChoice
from xushi.rl.policy import policy_loss
from xushi.rl.rollout import Rollout, Sampler
from xushi.train import PackedExamples, pack_examples

from .conftest import CONFIG, SHAPE


def log_probabilities(model: Deepseek, branch: Branch) -> Tensor:
    """log p of a branch's sampled tokens by the whole model on that one sequence."""
    ids, sampled = torch.tensor(branch.ids), torch.tensor(branch.sampled)
    log_p = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    return log_p[sampled[1:]]


def one_by_one(model: Deepseek, rollout: Rollout, token_mean: bool = False) -> Tensor:
    """The loss without packing: each answer in its own forward."""
    rewards, counted = rollout.rewards_PS, rollout.counted_PS
    total = torch.zeros(())
    for index, episode in enumerate(rollout.episodes):
        p, s = divmod(index, rewards.shape[1])
        if not counted[p, s]:
            continue
        group = rewards[p][counted[p]]
        advantage = float(rewards[p, s] - group.mean())
        log_p = torch.cat([log_probabilities(model, branch) for branch in episode.branches])
        old = torch.tensor([old for branch in episode.branches for old in branch.sampling_logprobs])
        ratio = (log_p - old).exp()
        values = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
        total = total + (values.sum() if token_mean else values.mean())
    episodes = rollout.episodes
    return -total / (sum(e.tokens for e in episodes) if token_mean else len(episodes))


def gradients(model: Deepseek, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()]
    )


def test_sampler_and_trainer_agree_on_the_probabilities(fine_tuned, tokenizer, rollout) -> None:
    """One model object in both forms: what is left is float32's rounding. Places that were off by
    one would differ by whole nats.
    """
    model = fine_tuned()
    figures = policy_loss(model, CONFIG, tokenizer.pad_id, rollout).figures
    assert figures["logprob_difference"] < 1e-4
    by_hand = max(
        float((log_probabilities(model, b).detach() - torch.tensor(b.logprobs)).abs().max())
        for b in rollout.branches
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
        for branch in rollout.branches:
            moved = torch.randn(len(branch.logprobs), generator=stream) * 0.3
            branch.sampling_logprobs[:] = (torch.tensor(branch.logprobs) + moved).tolist()
    policy = policy_loss(model, CONFIG, tokenizer.pad_id, rollout)
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
    examples = [(branch.ids, branch.sampled) for branch in rollout.branches]
    return pack_examples(examples, CONFIG.sequence_length, tokenizer.pad_id)


def policy_choice(model: Deepseek, tokenizer, rollout: Rollout) -> list[RouterChoice]:
    """What the routers did at the places of answers in the loss's forward pass."""
    seen, hidden = [], model.hidden
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "hidden", lambda *inputs: seen.append(hidden(*inputs)) or seen[-1])
        policy_loss(model, CONFIG, tokenizer.pad_id, rollout)
    inside = (pack(rollout, tokenizer).batch.segments >= 0).flatten()
    return [replace(choice, indices_Nk=choice.indices_Nk[inside]) for choice in seen[0].routing]


def test_at_another_temperature_the_update_is_on_policy(fine_tuned, tokenizer, rollout) -> None:
    """The sampler's distribution is then not the model's, so the trainer's own probability stands
    for the old one: every ratio is 1 and only the gradient is left.
    """
    for branch in rollout.branches:
        branch.sampling_logprobs[:] = [-9.0] * len(branch.logprobs)
    config = CONFIG.model_copy(update={"temperature": 0.7})
    model = fine_tuned()
    loss = policy_loss(model, config, tokenizer.pad_id, rollout).total
    assert abs(float(loss.detach())) < 1e-6
    for branch in rollout.branches:
        branch.sampling_logprobs[:] = branch.logprobs
    expected = gradients(model, one_by_one(model, rollout))
    assert (gradients(model, loss) - expected).norm() <= 1e-4 * expected.norm()


def test_the_figures(fine_tuned, tokenizer, rollout) -> None:
    model = fine_tuned()
    policy = policy_loss(model, CONFIG, tokenizer.pad_id, rollout)
    figures, loads = policy.figures, policy.loads
    counted = int(rollout.counted_PS.sum())  # where the verifier failed there is no reward
    assert counted < 48
    assert figures["reward"] == pytest.approx(float(rollout.rewards_PS.sum()) / counted)
    assert figures["length"] == pytest.approx(sum(e.tokens for e in rollout.episodes) / 48)
    assert figures["entropy"] == pytest.approx(
        -sum(sum(b.logprobs) for b in rollout.branches) / sum(e.tokens for e in rollout.episodes),
        rel=1e-5,
    )
    assert figures["target_tokens"] == sum(e.tokens for e in rollout.episodes)
    assert figures["tokens"] == sum(len(b.ids) - 1 for b in rollout.branches)
    assert figures["truncated"] == sum(e.finish_reason == "length" for e in rollout.episodes) / 48
    assert figures["verifier_errors"] == int((~rollout.counted_PS).sum())
    agree = [
        len(set(r[c].tolist())) <= 1
        for r, c in zip(rollout.rewards_PS, rollout.counted_PS, strict=True)
    ]
    assert figures["with_signal"] == pytest.approx(1 - sum(agree) / 6)
    places = sum(len(b.ids) - 1 for b in rollout.branches)
    assert (
        set(loads) == {"1"} and float(loads["1"].sum()) == 2 * places
    )  # the MTP layer does not run


def test_rewards_that_agree_leave_the_model_alone(fine_tuned, tokenizer, rollout) -> None:
    model = fine_tuned()
    flat = Rollout(rollout.episodes, torch.ones(6, 8), torch.ones(6, 8, dtype=torch.bool))
    policy = policy_loss(model, CONFIG, tokenizer.pad_id, flat)
    loss, figures = policy.total, policy.figures
    assert figures["with_signal"] == 0 and not gradients(model, loss).any()


@pytest.mark.parametrize("loss_mean", ["answers", "tokens"])
def test_an_episodes_branches_share_its_advantage_and_its_mean(
    loss_mean, fine_tuned, tokenizer, rollout
) -> None:
    """Most pairs of episodes taken for one of two branches: its tokens are those of both."""
    pairs = []
    for number, first in enumerate(rollout.episodes[::2]):
        second = rollout.episodes[2 * number + 1]
        if number % 3:  # so that answers are of unequal lengths
            branches, tokens = first.branches + second.branches, first.tokens + second.tokens
            first = replace(first, branches=branches, tokens=tokens)
        pairs.append(first)
    joined = Rollout(pairs, rollout.rewards_PS[:, ::2], rollout.counted_PS[:, ::2])
    config = CONFIG.model_copy(update={"loss_mean": loss_mean})
    model = fine_tuned()
    policy = policy_loss(model, config, tokenizer.pad_id, joined)
    got = gradients(model, policy.total)
    expected = gradients(model, one_by_one(model, joined, loss_mean == "tokens"))
    other = gradients(model, one_by_one(model, joined, loss_mean != "tokens"))
    assert expected.norm() > 1e-3 and (got - expected).norm() <= 1e-4 * expected.norm()
    assert (got - other).norm() > 1e-2 * other.norm()
    assert policy.figures["length"] == pytest.approx(sum(e.tokens for e in pairs) / 24)


def test_the_difference_has_no_sign(fine_tuned, tokenizer, rollout) -> None:
    """The sampler's numbers far below the trainer's count as much as those far above."""
    model = fine_tuned()
    for shift in (-3.0, 3.0):
        branch = rollout.branches[5]
        moved = replace(branch, logprobs=[p + shift for p in branch.logprobs])
        episodes = list(rollout.episodes)
        episodes[5] = replace(episodes[5], branches=[moved])
        changed = replace(rollout, episodes=episodes)
        figures = policy_loss(model, CONFIG, tokenizer.pad_id, changed).figures
        assert figures["logprob_difference"] == pytest.approx(3.0, abs=1e-3)


def test_a_model_without_experts_learns_too(tokenizer, environment) -> None:
    dense = SHAPE.model_copy(update={"first_k_dense_replace": 2, "num_nextn_predict_layers": 0})
    model = Deepseek(dense).initialise(2)
    rollout = Sampler(tokenizer, environment, CONFIG, 7).rollout(model, 0, range(6))
    policy = policy_loss(model, CONFIG, tokenizer.pad_id, rollout)
    assert policy.loads == {} and policy.figures["logprob_difference"] < 1e-4
