"""How often a model is right: greedy accuracy, avg@k, pass@k, and how long its answers are.

All tasks are of the test split. Not here: how an episode is played (episodes) and how an interval
is computed (statistics).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from xushi.base.seeds import derive
from xushi.engine import SamplingParams
from xushi.envs import Environment, Task
from xushi.evaluate.config import EvaluateConfig
from xushi.evaluate.episodes import Episode, play
from xushi.evaluate.statistics import mean_interval, pass_at_k_interval, wilson
from xushi.model import Deepseek
from xushi.tokenizer import Tokenizer


@dataclass(frozen=True)
class Rate:
    """A share of 1 and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Sampled:
    """k sampled episodes for each task: avg@k, pass@k, mean sampled tokens of an episode, the share
    of episodes whose last answer has reasoning, and the share whose verdict is "error", which the
    rates count as not right.
    """

    average: Rate
    any_right: Rate
    tokens: float
    thinking: float
    verifier_errors: float


def evaluation_tasks(environment: Environment, count: int) -> list[Task]:
    """The first `count` tasks of the test split, none of which is ever trained on."""
    return [environment.task("test", index) for index in range(count)]


def play_greedily(
    model: Deepseek,
    tokenizer: Tokenizer,
    environment: Environment,
    config: EvaluateConfig,
    seed: int,
    *,
    think: bool = False,
    ended: Callable[[], None] = lambda: None,
) -> list[Episode]:
    """One episode for each of `config.tasks`, of the most probable tokens; with `think` every turn
    is made to begin with reasoning. `ended` is called at the end of each episode.
    """
    tasks = evaluation_tasks(environment, config.tasks)
    params = [_params(config, 0.0, seed, task, 0) for task in tasks]
    return play(model, tokenizer, environment, tasks, params, think=think, ended=ended)


def play_sampled(
    model: Deepseek,
    tokenizer: Tokenizer,
    environment: Environment,
    config: EvaluateConfig,
    seed: int,
    ended: Callable[[], None] = lambda: None,
) -> list[list[Episode]]:
    """`config.samples` episodes for each of `config.tasks`, at temperature 1. `ended` is called at
    the end of each.
    """
    tasks = evaluation_tasks(environment, config.tasks)
    each = [(task, sample) for task in tasks for sample in range(config.samples)]
    stream = derive(seed, "evaluate")
    params = [_params(config, 1.0, stream, task, sample) for task, sample in each]
    tasks_each = [task for task, _ in each]
    episodes = play(model, tokenizer, environment, tasks_each, params, ended=ended)
    starts = range(0, len(episodes), config.samples)
    return [episodes[start : start + config.samples] for start in starts]


def accuracy(episodes: Sequence[Episode]) -> Rate:
    """The share that is right, with Wilson's interval."""
    right = sum(episode.right for episode in episodes)
    return Rate(right / len(episodes), *wilson(right, len(episodes)))


def summarise(episodes: Sequence[Sequence[Episode]]) -> Sampled:
    """Rates and lengths over tasks with k episodes each."""
    k = len(episodes[0])
    right = [sum(episode.right for episode in row) for row in episodes]
    total = len(episodes) * k
    return Sampled(
        Rate(*mean_interval([count / k for count in right])),
        Rate(*pass_at_k_interval([(k, count) for count in right], k)),
        sum(episode.tokens for row in episodes for episode in row) / total,
        sum(bool(episode.answer.reasoning) for row in episodes for episode in row) / total,
        sum(episode.score.verdict == "error" for row in episodes for episode in row) / total,
    )


def shown(episode: Episode) -> dict[str, Any]:
    """An episode as a table for samples.json: its question, last answer and verdict, and all its
    messages.
    """
    return {
        "prompt": episode.task.prompt,
        "reasoning": episode.answer.reasoning,
        "content": episode.answer.content,
        "verdict": episode.score.verdict,
        "answer": episode.task.answer,
        "transcript": [message.to_dict() for message in episode.transcript],
    }


def _params(
    config: EvaluateConfig, temperature: float, seed: int, task: Task, sample: int
) -> SamplingParams:
    return SamplingParams(
        max_tokens=config.max_tokens,
        temperature=temperature,
        seed=derive(seed, "answer", task.split, task.index, sample),
    )
