"""Rates of episodes: on tasks of the test split, greedy or sampled as they say, each with draws of
its own.
"""

from typing import Any

import pytest

from xushi.base.config import parse
from xushi.base.errors import BadInput
from xushi.base.messages import Message
from xushi.base.seeds import derive
from xushi.envs import DigitSum, DigitSumConfig, Score, Task
from xushi.evaluate import (
    Episode,
    EvaluateConfig,
    Rate,
    accuracy,
    evaluation_tasks,
    mean_interval,
    pass_at_k_interval,
    play,
    play_greedily,
    play_sampled,
    shown,
    summarise,
    wilson,
)
from xushi.evaluate import measure as module

ENVIRONMENT = DigitSum(DigitSumConfig(min_digits=2, max_digits=4))
CONFIG = EvaluateConfig(tasks=4, samples=3, max_tokens=6)


def episode(verdict: str, tokens: int = 1, reasoning: str | None = None) -> Episode:
    task = ENVIRONMENT.task("test", 0)
    answer = Message("assistant", "1", reasoning)
    score = Score(verdict, "")  # type: ignore[arg-type]
    return Episode(task, [Message("user", task.prompt), answer], [], score, "stop", tokens)


@pytest.fixture
def asked(monkeypatch) -> list[tuple[Task, Any, bool]]:
    """What was played, with which parameters, and whether it was made to think."""
    calls: list[tuple[Task, Any, bool]] = []

    def watched(model, tokenizer, environment, tasks, params, *, ended, think=False):
        calls.extend((task, each, think) for task, each in zip(tasks, params, strict=True))
        return play(model, tokenizer, environment, tasks, params, think=think, ended=ended)

    monkeypatch.setattr(module, "play", watched)
    return calls


def test_tasks_are_the_first_of_the_test_split() -> None:
    tasks = evaluation_tasks(ENVIRONMENT, 5)
    assert tasks == [ENVIRONMENT.task("test", index) for index in range(5)]
    assert {task.split for task in tasks} == {"test"}


@pytest.mark.parametrize("think", [False, True])
def test_greedy_is_one_episode_of_each_test_task(think, model, tokenizer, asked) -> None:
    ended: list[None] = []
    episodes = play_greedily(
        model, tokenizer, ENVIRONMENT, CONFIG, 5, think=think, ended=lambda: ended.append(None)
    )
    assert len(ended) == CONFIG.tasks
    assert [each.task for each in episodes] == evaluation_tasks(ENVIRONMENT, 4)
    assert [(task, each.temperature, each.max_tokens) for task, each, _ in asked] == [
        (task, 0.0, 6) for task in evaluation_tasks(ENVIRONMENT, 4)
    ]
    assert {made for _, _, made in asked} == {think}


def test_sampled_is_k_episodes_of_each_test_task(model, tokenizer, asked) -> None:
    """At temperature 1, and no two with the same draws."""
    ended: list[None] = []
    rows = play_sampled(model, tokenizer, ENVIRONMENT, CONFIG, 5, lambda: ended.append(None))
    assert len(ended) == CONFIG.tasks * CONFIG.samples
    tasks = evaluation_tasks(ENVIRONMENT, 4)
    assert [[each.task for each in row] for row in rows] == [[task] * 3 for task in tasks]
    assert {(each.temperature, each.max_tokens, think) for _, each, think in asked} == {
        (1.0, 6, False)
    }
    assert [each.seed for _, each, _ in asked] == [
        derive(derive(5, "evaluate"), "answer", "test", index, sample)
        for index in range(4)
        for sample in range(3)
    ]
    assert len({each.seed for _, each, _ in asked}) == 12
    ids = [str(each.branches[0].ids) for row in rows for each in row]
    assert len(set(ids)) == 12, "every task and sample has its own draws"
    others = play_sampled(model, tokenizer, ENVIRONMENT, CONFIG, 6)
    assert [str(each.branches[0].ids) for row in others for each in row] != ids


def test_accuracy_is_the_share_of_right_verdicts() -> None:
    rate = accuracy([episode(verdict) for verdict in ("right", "wrong", "error", "right")])
    assert rate == Rate(0.5, *wilson(2, 4))


def test_sampled_rates() -> None:
    """avg@k is the mean over all, pass@k the share of tasks with one right at least."""
    rows = [
        [episode("right", 3, "12"), episode("wrong", 4)],
        [episode("wrong", 5, ""), episode("error", 6)],
        [episode("right", 1), episode("right", 5, "3")],
    ]
    sampled = summarise(rows)
    assert sampled.average == Rate(*mean_interval([0.5, 0.0, 1.0]))
    assert sampled.average.value == pytest.approx(0.5)
    assert sampled.any_right == Rate(*pass_at_k_interval([(2, 1), (2, 0), (2, 2)], 2))
    assert sampled.any_right.value == pytest.approx(2 / 3)
    assert sampled.tokens == pytest.approx(24 / 6)
    assert sampled.thinking == pytest.approx(2 / 6), "an empty thought is none"
    assert sampled.verifier_errors == pytest.approx(1 / 6)


def test_what_is_shown_of_an_episode() -> None:
    each = episode("right", reasoning="12")
    assert shown(each) == {
        "prompt": each.task.prompt,
        "reasoning": "12",
        "content": "1",
        "verdict": "right",
        "answer": each.task.answer,
        "transcript": [
            {"role": "user", "content": each.task.prompt},
            {"role": "assistant", "content": "1", "reasoning_content": "12"},
        ],
    }


@pytest.mark.parametrize("key", ["tasks", "samples", "max_tokens"])
def test_bad_config(key: str) -> None:
    with pytest.raises(BadInput, match=f"{key}: must be at least 1"):
        parse(EvaluateConfig, {key: 0}, "recipe")
    assert EvaluateConfig().longer is None and EvaluateConfig().environment == {}
