"""A tiny model that answers one digit at random, and an environment that likes even ones."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from xushi.base.config import StrictConfig
from xushi.base.messages import Message
from xushi.base.tracking import Tracking
from xushi.envs import Card, Environment, Score, Task
from xushi.model import Batch, Deepseek
from xushi.rl import RLConfig
from xushi.rl.rollout import Rollout, Sampler
from xushi.tokenizer import Tokenizer, chat_examples
from xushi.tokenizer.config import SMALLEST_VOCABULARY
from xushi.train import Data, LanguageModelStep, ObjectiveConfig, Training, pack_examples

from ..tiny import TINY

SHAPE = TINY.model_copy(
    update={
        "vocab_size": SMALLEST_VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "initializer_range": 0.05,
    }
)

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


class EvenDigit(Environment):
    """Right is any even digit but 0, which the verifier cannot judge."""

    name = "even_digit"
    version = 1
    Config = StrictConfig

    def task(self, split: str, index: int) -> Task:
        return Task(self.name, self.version, split, index, str(index % 10), "", {})

    def reply(self, task: Task, transcript: Sequence[Message]) -> Message | None:
        return None if transcript else Message("user", task.prompt)

    def score(self, task: Task, transcript: Sequence[Message]) -> Score:
        content = transcript[-1].content
        if content == "0":
            return Score("error", "cannot judge 0")
        return Score("right" if content in ("2", "4", "6", "8") else "wrong", "even or not")

    def solve(self, task: Task) -> Sequence[Message]:
        return [Message("user", task.prompt), Message("assistant", "2")]

    def exploits(self, task: Task) -> list[Sequence[Message]]:
        return []

    def demonstration(self, split: str, index: int, thinking_share: float) -> Sequence[Message]:
        return [Message("user", str(index % 10)), Message("assistant", str(index * 7 // 10 % 10))]

    def text(self, transcript: Sequence[Message]) -> str:
        return "=".join(message.content for message in transcript)

    def longest_transcript(self) -> Sequence[Message]:
        return self.solve(self.task("test", 0))

    def card(self) -> Card:
        return Card("even digits", "It says an even digit.", "", "4", "digits")


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["0123456789"], SMALLEST_VOCABULARY)


@pytest.fixture(scope="session")
def environment() -> Environment:
    return EvenDigit()


def tune(directory: Path, tokenizer: Tokenizer, environment: Environment) -> Deepseek:
    """A model that answers each question with some digit and ends: about four in ten are right."""

    def batch(cursor: int, count: int) -> Batch:
        examples = []
        for index in range(cursor, cursor + count):
            examples += chat_examples(tokenizer, environment.demonstration("train", index, 0.0))
        return pack_examples(examples, 32, tokenizer.pad_id).batch

    model = Deepseek(SHAPE).initialise(1)
    config = ObjectiveConfig(steps=50, learning_rate=0.02, decay_fraction=0.5, dtype="fp32")
    step = LanguageModelStep(config, Data(batch, lambda _: 40))
    Training("sft", model, step, directory, Tracking(None)).run()
    return model


@pytest.fixture(scope="session")
def fine_tuned(tokenizer, environment, tmp_path_factory) -> Callable[[], Deepseek]:
    """A fresh copy of the model that `tune` makes."""
    model = tune(tmp_path_factory.mktemp("sft"), tokenizer, environment)

    def copy() -> Deepseek:
        other = Deepseek(SHAPE)
        other.load_state_dict(model.state_dict())
        return other

    return copy


@pytest.fixture
def rollout(fine_tuned, tokenizer, environment) -> Rollout:
    return Sampler(tokenizer, environment, CONFIG, 7).rollout(fine_tuned(), 0, range(6))
