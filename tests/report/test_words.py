"""Sentences claim what the numbers show: each turn of a sentence in both directions."""

from typing import Any

import pytest

from xushi.report import words

from .recorded import plain, run_of


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (1.50, "it beats xz -9 by 6.2 % on text it never saw."),
        (1.589, "it beats xz -9 by 0.7 % on text it never saw."),
        (1.591, "it is level with xz -9 (1.59 against 1.60 bits per byte) on text it never saw."),
        (1.609, "it is level with xz -9 (1.61 against 1.60 bits per byte) on text it never saw."),
        (1.611, "it needs 0.7 % more bits than xz -9 on text it never saw."),
        (1.65, "it needs 3.1 % more bits than xz -9 on text it never saw."),
    ],
)
def test_headline_says_who_wins_and_calls_a_hundredth_of_a_bit_level(
    model: float, expected: str
) -> None:
    results = {"evaluate.bits_per_byte": model, "evaluate.bits_per_byte_xz": 1.6}
    run = run_of(results | {"data.heldout_overlap": 0.0099})
    assert plain(words.headline(run)) == f"Raw text became a language model: {expected}"
    shared = "held-out text (1 % of it stands in the training text too)"
    run = run_of(results | {"data.heldout_overlap": 0.01})
    assert plain(words.headline(run)).endswith(expected.replace("text it never saw", shared))
    run = run_of(results)  # nobody measured it
    assert plain(words.headline(run)).endswith(
        expected.replace("text it never saw", "held-out text")
    )


def test_overlap_is_told_if_it_was_measured() -> None:
    assert words.overlap(run_of({})) == ""
    assert plain(words.overlap(run_of({"data.heldout_overlap": 0.806}))) == (
        "80.6 % of the held-out text stands in the training text too, in stretches of at least 50 "
        "characters, whatever their white space."
    )


def test_headline_of_a_run_that_has_only_begun() -> None:
    assert words.headline(run_of({})) == "Raw text became a language model."
    timed = run_of({"seconds.total": 95.0, "machine.threads": 1})
    assert plain(words.headline(timed)) == (
        "In 1 min 35 s on one CPU thread, raw text became a language model."
    )
    measured = run_of({"evaluate.bits_per_byte": 2.0})
    assert words.headline(measured).endswith("it needs 2.00 bits per byte on held-out text.")
    broken = run_of({"evaluate.bits_per_byte": float("nan"), "seconds.total": float("inf")})
    assert words.headline(broken) == "Raw text became a language model."


def test_headline_names_the_gpu_and_not_the_threads_beside_it() -> None:
    results = {"seconds.total": 30.0, "machine.threads": 16, "machine.device": "NVIDIA H100"}
    assert plain(words.headline(run_of(results))).startswith("In 30 s on NVIDIA H100, raw text")
    cpu = plain(words.headline(run_of(results | {"machine.device": "cpu"})))
    assert cpu.startswith("In 30 s on 16 CPU threads, raw text")


def test_headline_gives_the_rate_after_reinforcement_learning_else_the_rate_there_is() -> None:
    assert plain(words.headline(_rl(0.1, 0.9))) == (
        "Raw text became a reasoning model: it answers 90 % of unseen tasks right."
    )
    tuned = run_of(
        {
            "rl.greedy_before": 0.1,
            "evaluate.bits_per_byte": 1.0,
            "evaluate.bits_per_byte_xz": 2.0,
        }
    )
    assert plain(words.headline(tuned)) == (
        "Raw text became a language model: it beats xz -9 by 50 % on held-out text and answers "
        "10 % of unseen tasks right."
    )


def _rl(before: float, after: float, **more: Any) -> Any:
    """Rates with intervals of no width, where no others are given."""
    intervals = {f"greedy_before_{end}": before for end in ("low", "high")}
    intervals |= {f"greedy_after_{end}": after for end in ("low", "high")}
    extra = {f"rl.{key}": value for key, value in (intervals | more).items()}
    return run_of({"rl.greedy_before": before, "rl.greedy_after": after, **extra})


def test_a_change_counts_only_if_the_intervals_lie_apart() -> None:
    assert words.verdict(_rl(0.1, 0.9), "greedy") == "better"
    assert words.verdict(_rl(0.9, 0.1), "greedy") == "worse"
    rates = {"rl.greedy_before": 0.1, "rl.greedy_after": 0.9}
    for end in ({}, {"rl.greedy_after_low": 0.8}, {"rl.greedy_before_high": 0.2}):
        assert words.verdict(run_of(rates | end), "greedy") == "unclear", "no interval was measured"
    assert words.verdict(_rl(0.5, 0.5), "greedy") == "unclear"
    assert words.verdict(run_of({"rl.greedy_after": 0.5}), "greedy") == "unclear"
    overlap = _rl(0.5, 0.6, greedy_before_high=0.58, greedy_after_low=0.52)
    assert words.verdict(overlap, "greedy") == "unclear"
    touch = _rl(0.5, 0.6, greedy_before_high=0.55, greedy_after_low=0.55)
    assert words.verdict(touch, "greedy") == "unclear"
    apart = _rl(0.5, 0.6, greedy_before_high=0.54, greedy_after_low=0.56)
    assert words.verdict(apart, "greedy") == "better"
    down = _rl(0.6, 0.5, greedy_before_low=0.52, greedy_after_high=0.58)
    assert words.verdict(down, "greedy") == "unclear"
    assert words.verdict(down, "longer_greedy") == "unclear"


def test_one_sentence_says_what_changed_and_what_was_there_before() -> None:
    elicited = plain(words.reinforcement(_rl(0.1, 0.99, forced_before=0.95)))
    assert elicited == (
        "Reinforcement learning took the model from 10 % to 99 % of unseen tasks right; made to "
        "think, the model before it was already right on 95 % of them, so it learnt mostly to "
        "think first, and little that is new."
    )
    new = plain(words.reinforcement(_rl(0.1, 0.99, forced_before=0.2)))
    assert new.endswith(
        "the model before it was right on 20 % of them, so most of the gain is new."
    )
    # Half of the gain decides between the two.
    assert "already" in words.reinforcement(_rl(0.0, 0.8, forced_before=0.4))
    assert "already" not in words.reinforcement(_rl(0.0, 0.8, forced_before=0.39))
    # The gain counts, not the rate.
    assert "already" not in words.reinforcement(_rl(0.3, 0.9, forced_before=0.4))
    alone = plain(words.reinforcement(_rl(0.1, 0.99)))
    assert alone == (
        "Reinforcement learning took the model from 10 % to 99 % of unseen tasks right."
    )
    assert words.reinforcement(run_of({"rl.greedy_before": 0.1, "rl.forced_before": 0.9})) == ""


def test_no_gain_is_claimed_where_there_is_none() -> None:
    unclear = plain(words.reinforcement(_rl(0.1, 0.1, forced_before=0.95)))
    assert unclear == (
        "Reinforcement learning changed nothing that can be told from chance (10 % of unseen tasks "
        "right before, 10 % after); made to think, the model before it was right on 95 % of them."
    )
    worse = plain(words.reinforcement(_rl(0.9, 0.1)))
    assert worse == (
        "Reinforcement learning did harm: it took the model from 90 % to 10 % of unseen tasks "
        "right."
    )


def test_the_control_of_equal_flops_in_both_directions() -> None:
    assert "gained nothing" in words.equal_flops(_rl(0.1, 0.8, sft_equal_flops=0.85))
    assert "gained nothing" in words.equal_flops(_rl(0.1, 0.8, sft_equal_flops=0.8))
    assert plain(words.equal_flops(_rl(0.1, 0.8, sft_equal_flops=0.2))) == (
        "As many FLOPs spent on more fine-tuning end at 20 %, against 80 % with the reward."
    )
    assert words.equal_flops(_rl(0.1, 0.8)) == ""


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (1.5, "The model does not reach it; it needs 20 % more."),
        (1.0, "The model needs 20 % fewer."),
        (1.259, "The model is level with it."),
        (1.241, "The model is level with it."),
        (1.261, "The model does not reach it; it needs 0.9 % more."),
    ],
)
def test_the_yardstick_in_both_directions(model: float, expected: str) -> None:
    run = run_of({"evaluate.bits_per_byte": model, "evaluate.bits_per_byte_xz_primed": 1.25})
    assert plain(words.yardstick(run)) == (
        "The fair baseline is xz -9 that was given the training text first: 1.25 bits per byte. "
        + expected
    )
    assert words.yardstick(run_of({"evaluate.bits_per_byte": 1.25})) == ""


def test_longer_tasks_with_and_without_a_difference() -> None:
    results = {
        "rl.longer_greedy_before": 0.1,
        "rl.longer_greedy_before_high": 0.2,
        "rl.longer_greedy_after": 0.5,
        "rl.longer_greedy_after_low": 0.4,
    }
    clear = plain(words.longer(run_of(results)))
    assert clear == "On tasks longer than those it was trained on, it went from 10 % to 50 %."
    chance = plain(words.longer(run_of(results | {"rl.longer_greedy_after_low": 0.15})))
    assert chance.endswith("from 10 % to 50 %, a difference that may be chance.")
    assert words.longer(run_of({"rl.longer_greedy_before": 0.1})) == ""


def test_answers_with_and_without_reinforcement_learning() -> None:
    before = {"rl.length_before": 5.0, "rl.thinking_before": 0.25}
    assert plain(words.answers(run_of(before))) == (
        "A sampled answer has 5.00 tokens on average. The model thinks in 25 % of its answers."
    )
    after = before | {"rl.length_after": 12.0, "rl.thinking_after": 1.0}
    assert plain(words.answers(run_of(after))) == (
        "A sampled answer has 5.00 tokens on average before and 12.0 after. The model thinks in "
        "25 % of its answers before and 100 % after."
    )
    assert words.answers(run_of({})) == ""


def test_a_control_run_says_what_it_leaves_out() -> None:
    assert words.control_run(run_of({"run.without": ""})) == ""
    assert words.control_run(run_of({"run.without": "sft"})).endswith("leaves out the stage sft.")
