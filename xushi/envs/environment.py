"""What an environment is: tasks, an episode in text, and a verdict that anybody can repeat from the
record.

After DeepSeek-V3.2 (arXiv:2512.02556): <environment, tools, task, verifier>. Not here: models,
tokens and rewards as numbers; a transcript is what somebody said, wherever it came from.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from xushi.base.errors import BadInput
from xushi.base.messages import Message
from xushi.base.seeds import derive

SPLITS = ("train", "validation", "test")
# Of a hundred instances: the first go to validation, the next to test, the rest to training.
_VALIDATION, _TEST = 10, 10


@dataclass(frozen=True)
class Task:
    """One instance. `answer` and `details` are the verifier's and must not be shown to whoever
    solves it.
    """

    environment: str
    version: int
    split: str
    index: int
    prompt: str
    answer: str
    details: Mapping[str, str | int]


@dataclass(frozen=True)
class Step:
    """What an action brings: the next observation, and whether the episode is over."""

    observation: str
    terminated: bool


@dataclass(frozen=True)
class Score:
    """A verdict and its reason in a few words.

    "error" is the record's or the program's fault, never the solver's: it earns nothing and is
    counted apart.
    """

    verdict: Literal["right", "wrong", "error"]
    reason: str


class Environment(ABC):
    """The contract. `version` rises whenever a task or a verdict can change.

    For every task the score of `solve` must be right and that of each of `exploits` must not be.
    """

    name: str
    version: int

    @abstractmethod
    def task(self, split: str, index: int) -> Task:
        """Instance `index` >= 0 of a split: a pure function, equal in every process; splits share
        no instance.
        """

    @abstractmethod
    def reset(self, task: Task) -> str:
        """Begin the episode: the first observation."""

    @abstractmethod
    def step(self, task: Task, action: str) -> Step:
        """What the solver's action brings."""

    @abstractmethod
    def score(self, task: Task, transcript: Sequence[Message]) -> Score:
        """The verdict on a whole episode, a pure function of its record."""

    @abstractmethod
    def solve(self, task: Task) -> Sequence[Message]:
        """A reference episode."""

    @abstractmethod
    def exploits(self, task: Task) -> list[Sequence[Message]]:
        """Known ways to look right without being right."""

    @abstractmethod
    def demonstration(self, split: str, index: int, thinking_share: float) -> Sequence[Message]:
        """An episode to learn from, on `task(split, index)`: with this probability worked, else the
        bare answer.
        """


def split_of(name: str, version: int, instance: str) -> str:
    """The one split that an instance belongs to, by its own hash: no instance can lie in two,
    whoever draws it.
    """
    place = derive(0, name, version, "split", instance) % 100
    if place < _VALIDATION:
        return "validation"
    return "test" if place < _VALIDATION + _TEST else "train"


def check_split(split: str, index: int) -> None:
    """A `XushiError` for a split that is not or an index below 0."""
    if split not in SPLITS:
        raise BadInput(f"there is no split {split!r}", f"use one of {', '.join(SPLITS)}")
    if index < 0:
        raise BadInput(f"task index {index} is below 0", "count tasks from 0")
