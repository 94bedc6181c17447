"""Sentences claim what the numbers show: each turn of a sentence in both directions."""

from pathlib import Path
from typing import Any

import pytest

from xushi.report import words
from xushi.report.read import Run


def _run(**results: Any) -> Run:
    return Run(
        Path("runs/x"),
        {key.replace("__", "."): value for key, value in results.items()},
        {},
        "",
        None,
    )


def _said(text: str) -> str:
    return text.replace("\u202f", " ").replace("\u00a0", " ")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (1.50, "it beats xz -9 by 6.2 %"),
        (1.65, "it does not beat xz -9 on text it never saw, needing 3.1 % more bits"),
        (1.6003, "it is level with xz -9"),
    ],
)
def test_headline_says_who_wins(model: float, expected: str) -> None:
    said = _said(
        words.headline(_run(evaluate__bits_per_byte=model, evaluate__bits_per_byte_xz=1.6))
    )
    assert expected in said
    assert ("beats" in said) == (model < 1.55)


def test_headline_of_a_run_that_has_only_begun() -> None:
    assert words.headline(_run()) == "Raw text became a language model."
    assert _said(words.headline(_run(seconds__total=95.0, machine__threads=1))) == (
        "In 1 min 35 s on one CPU thread, raw text became a language model."
    )
    assert _said(words.headline(_run(evaluate__bits_per_byte=2.0))).endswith(
        "2.00 bits per byte on text it never saw."
    )
    assert (
        "nan"
        not in words.headline(
            _run(evaluate__bits_per_byte=float("nan"), seconds__total=float("inf"))
        ).lower()
    )


def _rl(before: float, after: float, **more: Any) -> Run:
    return _run(rl__greedy_before=before, rl__greedy_after=after, **more)


def test_reward_verdict_needs_intervals_apart() -> None:
    assert words.reward_verdict(_rl(0.1, 0.9)) == "better"
    assert words.reward_verdict(_rl(0.9, 0.1)) == "worse"
    assert words.reward_verdict(_rl(0.5, 0.5)) == "unclear"
    assert (
        words.reward_verdict(_rl(0.5, 0.6, rl__greedy_before_high=0.58, rl__greedy_after_low=0.52))
        == "unclear"
    )
    assert (
        words.reward_verdict(_rl(0.5, 0.6, rl__greedy_before_high=0.54, rl__greedy_after_low=0.56))
        == "better"
    )
    assert (
        words.reward_verdict(_rl(0.6, 0.5, rl__greedy_before_low=0.52, rl__greedy_after_high=0.58))
        == "unclear"
    )
    assert "nothing that can be told from chance" in words.headline(_rl(0.5, 0.5))
    assert "did harm" in words.headline(_rl(0.9, 0.1))


def test_elicitation_follows_the_forced_control() -> None:
    assert "elicited a habit" in words.elicitation(_rl(0.1, 0.99, rl__forced_before=0.95))
    assert "most of the gain came with the reward" in words.elicitation(
        _rl(0.1, 0.99, rl__forced_before=0.2)
    )
    unclear = words.elicitation(_rl(0.1, 0.1, rl__forced_before=0.95))
    assert "95" in unclear and "elicited" not in unclear
    assert words.elicitation(_rl(0.1, 0.99)) == ""


def test_controls_and_yardstick_in_both_directions() -> None:
    assert "earned nothing" in words.equal_time(_rl(0.1, 0.8, rl__sft_equal_time=0.85))
    assert "earned nothing" not in words.equal_time(_rl(0.1, 0.8, rl__sft_equal_time=0.2))
    primed = {"evaluate__bits_per_byte_xz_primed": 1.25}
    worse = _said(words.yardstick(_run(evaluate__bits_per_byte=1.5, **primed)))
    assert "does not reach it; it needs 20 % more" in worse
    assert "needs 20 % fewer" in _said(words.yardstick(_run(evaluate__bits_per_byte=1.0, **primed)))
    assert "level with it" in words.yardstick(_run(evaluate__bits_per_byte=1.25, **primed))
    assert words.yardstick(_run(evaluate__bits_per_byte=1.25)) == ""


def test_stage_sentences_leave_out_what_is_missing() -> None:
    assert words.stage_sentence(_run(), "data") == ""
    assert _said(
        words.stage_sentence(_run(data__documents=12, data__heldout_fraction=0.06), "data")
    ) == ("12 documents, 6 % held out")
