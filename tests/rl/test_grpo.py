"""GRPO as DeepSeek-V3.2 states it: values and gradients against TRL's, and what only a gradient can
tell.

`golden_grpo.json` holds TRL 1.16.0's numbers. There the ratio is taken to `logp_old`, the trainer's
own probabilities before the update, while the mask for off-policy answers is measured on
`logp_sampler`, what the sampler returned. `grpo_loss` takes one tensor for both, and V3.2 says
which: its pi_old is the sampler's. So the numbers are matched with `logp_old` for both; the mask
comes out the same with either, and that is tested too.
"""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from xushi.rl import Objective, group_advantages, grpo_loss

GOLDEN = json.loads((Path(__file__).parent / "golden_grpo.json").read_text())
INPUTS = {
    name: torch.tensor(values, dtype=torch.float64) for name, values in GOLDEN["inputs"].items()
}
MASK = INPUTS["mask"]
V32 = {"clip_low": 0.2, "clip_high": 0.2, "kl_weight": 0.001, "off_policy_limit": 0.1}


def value_and_gradient(log_p: Tensor, *arguments: Tensor, **settings) -> tuple[float, Tensor]:
    leaf = log_p.clone().requires_grad_()
    reference = settings.pop("reference_log_p_GT", None)
    objective = Objective(**settings)
    loss = grpo_loss(leaf, *arguments, objective, reference_log_p_GT=reference)
    loss.backward()
    return float(loss.detach()), leaf.grad


def golden(case: str) -> tuple[float, Tensor]:
    return GOLDEN["cases"][case]["loss"], torch.tensor(
        GOLDEN["cases"][case]["grad"], dtype=torch.float64
    )


def test_v32_is_trls() -> None:
    loss, gradient = value_and_gradient(
        INPUTS["logp_new"],
        INPUTS["logp_old"],
        INPUTS["adv_mean"],
        MASK,
        reference_log_p_GT=INPUTS["logp_ref"],
        **V32,
    )
    want, want_gradient = golden("v3.2")
    assert abs(loss - want) <= 1e-12 and (gradient - want_gradient).abs().max() <= 1e-12


def test_advantages_are_trls() -> None:
    got = group_advantages(INPUTS["rewards"].view(2, 4)).flatten()
    assert (got - INPUTS["adv_mean"]).abs().max() <= 1e-12
    assert (got - INPUTS["adv_z"]).abs().max() > 0.1, (
        "advantages divided by their deviation would pass for these"
    )


def test_the_mask_drops_answer_six_by_either_old_probability() -> None:
    """Only its clipped term goes: what is left of its gradient is that of the KL term."""
    for old in ("logp_old", "logp_sampler"):
        arguments = INPUTS["logp_new"], INPUTS[old], INPUTS["adv_mean"], MASK
        keywords = V32 | {"reference_log_p_GT": INPUTS["logp_ref"]}
        _, masked = value_and_gradient(*arguments, **keywords)
        _, whole = value_and_gradient(*arguments, **(keywords | {"off_policy_limit": None}))
        assert torch.where((masked != whole).any(1))[0].tolist() == [6]
        no_advantage = INPUTS["adv_mean"].clone()
        no_advantage[6] = 0
        _, only_kl = value_and_gradient(*arguments[:2], no_advantage, MASK, **keywords)
        torch.testing.assert_close(masked[6], only_kl[6], rtol=1e-12, atol=0)


def test_the_samplers_probabilities_give_another_ratio() -> None:
    """The two tensors are different things: one may not pass for the other unnoticed."""
    loss, _ = value_and_gradient(
        INPUTS["logp_new"],
        INPUTS["logp_sampler"],
        INPUTS["adv_mean"],
        MASK,
        reference_log_p_GT=INPUTS["logp_ref"],
        **V32,
    )
    assert abs(loss - golden("v3.2")[0]) > 1e-4


def test_the_mean_over_all_tokens_is_trls() -> None:
    """DAPO, with the recipe's own upper clip of 0.28 and its advantages."""
    loss, gradient = value_and_gradient(
        INPUTS["logp_new"],
        INPUTS["logp_old"],
        INPUTS["adv_z"],
        MASK,
        clip_low=0.2,
        clip_high=0.28,
        token_mean=True,
    )
    want, want_gradient = golden("dapo")
    assert abs(loss - want) <= 1e-12 and (gradient - want_gradient).abs().max() <= 1e-12


def test_only_the_mean_over_all_tokens_leaves_equal_answers_of_unequal_lengths_alone() -> None:
    """Answers of two kinds that begin with one of two tokens, advantages that add up to zero: the
    gradient of the first token's probability must add up to zero too, or all other tokens are
    pushed. Long right and short wrong answers do push them where each answer has its own mean.
    """
    advantages = torch.tensor([0.5, -0.5], dtype=torch.float64)
    mask = torch.tensor([[True] * 12, [True] * 3 + [False] * 9])
    log_p = torch.full((2, 12), -1.0, dtype=torch.float64)
    settings = {"clip_low": 0.2, "clip_high": 0.28}
    _, tokens = value_and_gradient(log_p, log_p, advantages, mask, token_mean=True, **settings)
    _, answers = value_and_gradient(log_p, log_p, advantages, mask, **settings)
    assert tokens[:, 0].sum() == 0
    assert answers[:, 0].sum() > 0  # descent lowers what was sampled first, whatever it was


def loops(log_p, old, advantages, mask, low, high, reference, weight, limit) -> Tensor:
    """Equations 5 to 9 token by token."""
    total = torch.zeros((), dtype=torch.float64)
    for g in range(len(log_p)):
        places = [t for t in range(log_p.shape[1]) if mask[g, t]]
        drift = sum(float(old[g, t] - log_p[g, t].detach()) for t in places) / max(len(places), 1)
        kept = not (limit is not None and advantages[g] < 0 and drift > limit)
        answer = torch.zeros((), dtype=torch.float64)
        for t in places:
            ratio = (log_p[g, t] - old[g, t]).exp()
            clipped = ratio.clamp(1 - low, 1 + high)
            answer = answer + kept * torch.minimum(ratio * advantages[g], clipped * advantages[g])
            if reference is not None:
                inverse = (reference[g, t] - log_p[g, t]).exp()
                answer = answer - weight * ratio * (inverse - inverse.log() - 1)
        total = total + answer / max(len(places), 1)
    return -total / len(log_p)


@given(
    seed=st.integers(0, 2**31),
    answers=st.integers(1, 5),
    tokens=st.integers(1, 6),
    kl=st.booleans(),
    limit=st.sampled_from([None, 0.0, 0.2]),
)
def test_value_and_gradient_are_the_equations(seed, answers, tokens, kl, limit) -> None:
    g = torch.Generator().manual_seed(seed)
    log_p, old, reference = (
        -torch.rand(answers, tokens, generator=g, dtype=torch.float64) * 2 for _ in range(3)
    )
    advantages = torch.randn(answers, generator=g, dtype=torch.float64)
    mask = torch.arange(tokens) < torch.randint(0, tokens + 1, (answers, 1), generator=g)
    settings = {"clip_low": 0.2, "clip_high": 0.28, "off_policy_limit": limit}
    if kl:
        settings |= {"reference_log_p_GT": reference, "kl_weight": 0.05}
    loss, gradient = value_and_gradient(log_p, old, advantages, mask.double(), **settings)
    leaf = log_p.clone().requires_grad_()
    want = loops(leaf, old, advantages, mask, 0.2, 0.28, reference if kl else None, 0.05, limit)
    want_gradient = (
        torch.autograd.grad(want, leaf, allow_unused=True)[0] if want.requires_grad else None
    )
    assert abs(loss - float(want.detach())) <= 1e-12
    assert (gradient - (0 if want_gradient is None else want_gradient)).abs().max() <= 1e-12


@given(
    seed=st.integers(0, 2**31), reward=st.sampled_from([0.0, 1.0, 0.3]), off_policy=st.booleans()
)
def test_a_group_whose_rewards_are_equal_teaches_exactly_nothing(seed, reward, off_policy) -> None:
    """Not a small gradient but none: neither rounding in the mean nor a division may leave one, at
    any group size.
    """
    g = torch.Generator().manual_seed(seed)
    samples = int(torch.randint(2, 17, (), generator=g))
    log_p = -torch.rand(samples, 5, generator=g)
    old = -torch.rand(samples, 5, generator=g) if off_policy else log_p
    advantages = group_advantages(torch.full((1, samples), reward))
    assert not advantages.any()
    loss, gradient = value_and_gradient(
        log_p, old, advantages.flatten(), torch.ones(samples, 5), clip_low=0.2, clip_high=0.28
    )
    assert loss == 0 and not gradient.any()


def test_answers_whose_verifier_failed_enter_no_mean() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    counted = torch.tensor([[True, True, False, True], [False, False, False, False]])
    got = group_advantages(rewards, counted)
    torch.testing.assert_close(got, torch.tensor([[1 / 3, -2 / 3, 0, 1 / 3], [0.0, 0, 0, 0]]))
    as_zero = group_advantages(rewards)
    assert not torch.equal(got[0], as_zero[0]), (
        "counting an error as a wrong answer would give the same here"
    )


@given(rewards=st.lists(st.booleans(), min_size=2, max_size=12), data=st.data())
def test_advantages_of_what_counts_sum_to_zero(rewards, data) -> None:
    counted = data.draw(st.lists(st.booleans(), min_size=len(rewards), max_size=len(rewards)))
    got = group_advantages(torch.tensor([rewards]).float(), torch.tensor([counted]))[0]
    assert abs(float(got.sum())) < 1e-5
    assert all(
        value == 0 for value, counts in zip(got.tolist(), counted, strict=True) if not counts
    )
    assert all(
        (value >= 0) if right else (value <= 0)
        for value, right in zip(got.tolist(), rewards, strict=True)
    )


def test_the_kl_term_has_the_unbiased_gradient() -> None:
    """On-policy, rho k3 and k3 have one value and different gradients: log(p / p_ref), and 1 -
    p_ref / p.
    """
    g = torch.Generator().manual_seed(3)
    log_p, reference = (-torch.rand(1, 6, generator=g, dtype=torch.float64) for _ in range(2))
    loss, gradient = value_and_gradient(
        log_p,
        log_p,
        torch.zeros(1),
        torch.ones(1, 6),
        clip_low=0.2,
        clip_high=0.2,
        reference_log_p_GT=reference,
        kl_weight=1.0,
    )
    inverse = (reference - log_p).exp()
    assert loss == pytest.approx(float((inverse - inverse.log() - 1).mean()), rel=1e-12)
    torch.testing.assert_close(gradient, (log_p - reference) / 6, rtol=1e-12, atol=1e-15)
    assert (gradient - (1 - inverse) / 6).abs().max() > 1e-3, (
        "k3's own gradient would pass for it here"
    )


@pytest.mark.parametrize(
    "ratio, advantage, flows",
    [
        (1.3, 1.0, False),
        (1.27, 1.0, True),
        (0.7, 1.0, True),
        (0.79, -1.0, False),
        (0.81, -1.0, True),
        (1.5, -1.0, True),
    ],
)
def test_what_is_clipped(ratio: float, advantage: float, flows: bool) -> None:
    """The gain of a good answer is capped at 1.28, the loss of a bad one at 0.8; nothing else is."""
    old = torch.full((1, 1), -1.0, dtype=torch.float64)
    _, gradient = value_and_gradient(
        old + torch.tensor(ratio, dtype=torch.float64).log(),
        old,
        torch.tensor([advantage]),
        torch.ones(1, 1),
        clip_low=0.2,
        clip_high=0.28,
    )
    assert bool(gradient.any()) == flows
    assert not flows or float(gradient) == pytest.approx(-advantage * ratio)


@given(filler=st.sampled_from([-50.0, 0.0, 5.0]))
def test_what_stands_beyond_an_answer_does_not_matter(filler: float) -> None:
    outside = MASK == 0
    tensors = [
        INPUTS[name].where(~outside, filler) for name in ("logp_new", "logp_old", "logp_ref")
    ]
    loss, gradient = value_and_gradient(
        *tensors[:2], INPUTS["adv_mean"], MASK, reference_log_p_GT=tensors[2], **V32
    )
    assert loss == pytest.approx(golden("v3.2")[0], abs=1e-12) and not gradient[outside].any()


def test_an_answer_weighs_the_same_whatever_its_length() -> None:
    """The mean is over an answer's own tokens first: a long answer has as much to say as a short
    one.
    """
    mask = torch.tensor([[1.0] * 6, [1.0] + [0.0] * 5])
    log_p = torch.full((2, 6), -1.0)
    _, gradient = value_and_gradient(
        log_p, log_p, torch.tensor([1.0, 1.0]), mask, clip_low=0.2, clip_high=0.2
    )
    assert gradient[0].sum() == pytest.approx(-0.5) and gradient[1].sum() == pytest.approx(-0.5)


def test_at_the_limit_an_answer_is_kept() -> None:
    old, log_p = (
        torch.zeros(1, 4, dtype=torch.float64),
        torch.full((1, 4), -0.125, dtype=torch.float64),
    )
    for limit, kept in ((0.125, True), (0.12, False)):
        loss, _ = value_and_gradient(
            log_p,
            old,
            torch.tensor([-1.0]),
            torch.ones(1, 4),
            clip_low=0.2,
            clip_high=0.2,
            off_policy_limit=limit,
        )
        assert (loss != 0) == kept
