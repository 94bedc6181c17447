"""Environments of several turns, and a random model that ends its answers early enough for them."""

from collections.abc import Sequence

import torch

from xushi.base.config import StrictConfig
from xushi.base.messages import Message, Tool
from xushi.envs import Card, Environment, Score, Task
from xushi.model import Deepseek
from xushi.tokenizer import Tokenizer
from xushi.tokenizer.config import smallest_vocabulary

from .conftest import SHAPE


class Talk(Environment):
    """Asks again, whatever is said, until `turns` answers are given; right if all have content."""

    name = "talk"
    version = 1
    Config = StrictConfig
    role = "user"
    turns = 3

    def task(self, split: str, index: int) -> Task:
        return Task(self.name, self.version, split, index, f"{index}?", "", {})

    def reply(self, task: Task, transcript: Sequence[Message]) -> Message | None:
        turn = len(transcript) // 2
        if turn == 0:
            return Message("user", task.prompt)
        return Message(self.role, f"{turn}") if turn < self.turns else None

    def score(self, task: Task, transcript: Sequence[Message]) -> Score:
        answers = [message for message in transcript if message.role == "assistant"]
        whole = len(answers) == self.turns and all(answer.content for answer in answers)
        return Score("right" if whole else "wrong", f"{len(answers)} answers")

    def solve(self, task: Task) -> Sequence[Message]:
        return []

    def exploits(self, task: Task) -> list[Sequence[Message]]:
        return []

    def demonstration(self, split: str, index: int, thinking_share: float) -> Sequence[Message]:
        return []

    def text(self, transcript: Sequence[Message]) -> str:
        return ""

    def longest_transcript(self) -> Sequence[Message]:
        return []

    def card(self) -> Card:
        return Card("", "", "", "", "")


class Tools(Talk):
    """The same, asked by a tool."""

    role = "tool"
    tools = (Tool("next", "asks again", {}),)


def tokenizer_with_tools() -> Tokenizer:
    return Tokenizer.train(["0123456789"], smallest_vocabulary(tools=True), tools=True)


def talkative_model(tokenizer: Tokenizer) -> Deepseek:
    """A random model with tool tokens and room for the description of a tool, which ends about one
    answer in three before the twelfth token.
    """
    changes = {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 1024}
    model = Deepseek(SHAPE.model_copy(update=changes)).initialise(3)
    with torch.no_grad():
        model.head_VD[tokenizer.eos_id] *= 3.0
    return model
