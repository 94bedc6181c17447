"""What an environment is: tasks, episodes told as text, and a verdict that follows from the record.

After DeepSeek-V3.2 (arXiv:2512.02556): <environment, tools, task, verifier>. An environment knows
no model, no token and no reward. All its methods are pure functions: an episode can be checked
again from its record alone, by anybody.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from xushi.base.config import StrictConfig
from xushi.base.errors import BadInput
from xushi.base.messages import Message, Tool
from xushi.base.seeds import derive

SPLITS = ("train", "validation", "test")
# Shares of all instances, in percent; training has the rest.
_VALIDATION = 10
_TEST = 10

Verdict = Literal["right", "wrong", "error"]


@dataclass(frozen=True)
class Task:
    """One instance. `prompt` is its question as text. Tasks with equal prompt, answer and details
    are one instance.

    `answer` and `details` belong to the verifier; whoever solves the task must not see them.
    """

    environment: str
    version: int
    split: str
    index: int
    prompt: str
    answer: str
    details: Mapping[str, str | int]


@dataclass(frozen=True)
class Score:
    """A verdict and its reason in a few words.

    "error" is the fault of the record or of the program, never of the solver: it earns nothing and
    is counted apart.
    """

    verdict: Verdict
    reason: str


@dataclass(frozen=True)
class Card:
    """What the report, the chat page and the model card say of an environment.

    `title` names it; `can` and `cannot` are sentences about a model trained on it; `example` is a
    question to try; `tasks` says which tasks these are, such as "numbers of 8 digits". `chinese` is
    the same in Chinese; the chat page shows the English where there is none.
    """

    title: str
    can: str
    cannot: str
    example: str
    tasks: str
    chinese: "Card | None" = None


class Environment(ABC):
    """The contract; `xushi env check` proves it.

    A transcript is a list of messages: the question, then in turn what the solver writes (role
    "assistant") and what `reply` answers. Answers of `reply` after the question have role "tool"
    (where the environment declares `tools`) or "user". A subclass sets `name`, `version` (raised
    whenever a task or a verdict changes) and `Config`, its own keys in the recipe's table
    [environment].
    """

    name: ClassVar[str]
    version: ClassVar[int]
    Config: ClassVar[type[StrictConfig]]
    tools: Sequence[Tool] = ()

    def __init__(self, config: Any = None) -> None:
        """`config` is an instance of `Config`; left out, it is the default one."""
        self.config: Any = self.Config() if config is None else config

    @abstractmethod
    def task(self, split: str, index: int) -> Task:
        """Instance `index` >= 0 of a split, the same in every process; no instance lies in two
        splits.
        """

    @abstractmethod
    def reply(self, task: Task, transcript: Sequence[Message]) -> Message | None:
        """The next observation, or None where the episode is over.

        () gives the question. Otherwise the transcript ends with what the solver wrote. A solver
        writes anything: whatever it says, the episode must end after some number of turns.
        """

    @abstractmethod
    def score(self, task: Task, transcript: Sequence[Message]) -> Score:
        """The verdict on an episode, finished or cut off."""

    @abstractmethod
    def solve(self, task: Task) -> Sequence[Message]:
        """A whole episode that scores right and whose observations are those of `reply`."""

    @abstractmethod
    def exploits(self, task: Task) -> list[Sequence[Message]]:
        """Transcripts that look right without being right; none may score right."""

    @abstractmethod
    def demonstration(self, split: str, index: int, thinking_share: float) -> Sequence[Message]:
        """An episode on `task(split, index)` to learn from: worked out with probability
        `thinking_share`, else answered without reasoning.
        """

    @abstractmethod
    def text(self, transcript: Sequence[Message]) -> str:
        """An episode as plain text for pretraining."""

    @abstractmethod
    def longest_transcript(self) -> Sequence[Message]:
        """An episode at least as long, in characters, as any that `solve` or `demonstration` gives.

        Recipes and estimates measure it to know whether episodes fit the model and what they cost.
        """

    @abstractmethod
    def card(self) -> Card:
        """What people are told of it."""


def split_of(name: str, version: int, instance: str) -> str:
    """The split that an instance belongs to, by a hash of the instance: whoever draws it, and with
    whatever config, none lies in two splits.
    """
    place = derive(0, name, version, "split", instance) % 100
    if place < _VALIDATION:
        return "validation"
    return "test" if place < _VALIDATION + _TEST else "train"


def check_split(split: str, index: int) -> None:
    """Raise `BadInput` if there is no such split or the index is negative."""
    if split not in SPLITS:
        raise BadInput(f"there is no split {split!r}", f"use one of {', '.join(SPLITS)}")
    if index < 0:
        raise BadInput(f"task index {index} is below 0", "count tasks from 0")


def thinks(name: str, version: int, split: str, index: int, thinking_share: float) -> bool:
    """Whether demonstration `index` is worked out: a draw by hash, true with probability
    `thinking_share`. `BadInput` if that is no share.
    """
    if not 0.0 <= thinking_share <= 1.0:
        raise BadInput(
            f"thinking_share={thinking_share} is not a share", "give a number from 0 to 1"
        )
    return derive(0, name, version, "demonstration", split, index) < thinking_share * 2.0**64
