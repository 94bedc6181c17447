"""Supervised fine-tuning on the environment's demonstrations."""

from typing import TYPE_CHECKING, Any

from xushi.base.tracking import BatchRecord
from xushi.envs import Environment
from xushi.model import Batch
from xushi.run.place import RunPlace
from xushi.run.stages.base import Costs, Fact, Results
from xushi.run.stages.checks import check_length, check_model_training
from xushi.run.stages.lengths import (
    check_episode_length,
    check_tokens,
    mean_demonstration_tokens,
)
from xushi.run.stages.training import TrainingStage, end_mean
from xushi.tokenizer import Tokenizer, chat_examples
from xushi.train import Data, LanguageModelStep, SFTConfig, Step, pack_examples

if TYPE_CHECKING:
    from xushi.run.recipe import Recipe


class SFTFigures(Results):
    """`loss` is a mean over the last tenth of the steps, in nats per token."""

    steps: int
    examples: int
    loss: float | None


class SFTResults(Results):
    """What fine-tuning returns."""

    sft: SFTFigures


class SFT(TrainingStage):
    """Reads checkpoints/pretrain; writes checkpoints/sft."""

    name = "sft"
    title = "Fine-tuning"
    section = "sft"
    needs_environment = True
    facts = (
        Fact("sft.examples", "{} demonstrations"),
        Fact("sft.steps", "{} steps"),
        Fact("sft.loss", "last loss {} nats a token", "digits"),
    )

    def __init__(self, recipe: "Recipe") -> None:
        super().__init__(recipe)
        assert recipe.sft is not None and recipe.environment is not None, "see check"
        self.config = recipe.sft
        self.environment = recipe.environment

    @classmethod
    def check(cls, recipe: "Recipe") -> None:
        """The tables are there, and demonstrations fit into the model's context."""
        if recipe.sft is None or recipe.environment is None:
            raise ValueError(f"stage {cls.name} needs the tables [{cls.name}] and [environment]")
        check_model_training(cls.name, recipe.sft, recipe.model)
        check_length(f"{cls.name}.sequence_length", recipe.sft.sequence_length, recipe.model)
        check_episode_length(recipe)

    def seconds(self, costs: Costs) -> float:
        """The mean length of some demonstrations stands for all."""
        environment, share = self.environment.make(), self.config.thinking_share
        tokens = mean_demonstration_tokens(environment, share)
        return self.config.steps * self.config.batch_examples * tokens * costs.training_token

    def data(self, place: RunPlace) -> Data:
        """Demonstrations, fresh ones at every step; the cursor counts them."""
        environment = self.environment.make()
        tokenizer = place.tokenizer()
        check_tokens(environment, tokenizer, self.model.max_position_embeddings)
        return demonstrations(environment, tokenizer, self.config)

    def step(self, place: RunPlace) -> Step:
        """Next-token prediction on what an assistant must produce."""
        return LanguageModelStep(self.config, self.data(place))

    def batch(self, place: RunPlace, record: BatchRecord) -> Batch:
        """The packed demonstrations of a step."""
        return self.data(place).batches(record.cursor, record.items)

    def results(self, place: RunPlace) -> SFTResults:
        """Steps, examples and loss."""
        return SFTResults(
            sft=SFTFigures(
                steps=self.config.steps,
                examples=self.config.steps * self.config.batch_examples,
                loss=end_mean(place.tracking, self.name, "loss"),
            )
        )

    def spans(self, place: RunPlace, record: BatchRecord) -> list[dict[str, Any]]:
        """The demonstrations as text."""
        return demonstration_spans(self.environment.make(), self.config, record, 0)


def demonstrations(
    environment: Environment, tokenizer: Tokenizer, config: SFTConfig, first: int = 0
) -> Data:
    """Demonstrations from number `first` on; an item is one demonstration."""

    def batch(cursor: int, count: int) -> Batch:
        examples = [
            example
            for index in range(first + cursor, first + cursor + count)
            for example in chat_examples(
                tokenizer,
                environment.demonstration("train", index, config.thinking_share),
                environment.tools,
            )
        ]
        return pack_examples(examples, config.sequence_length, tokenizer.pad_id).batch

    return Data(batch, lambda _: config.batch_examples)


def demonstration_spans(
    environment: Environment, config: SFTConfig, record: BatchRecord, first: int
) -> list[dict[str, Any]]:
    """The demonstrations of a step as text."""
    spans = []
    for number in range(record.cursor, record.cursor + record.items):
        task = first + number
        messages = environment.demonstration("train", task, config.thinking_share)
        text = "\n".join(
            f"{message.role}: {message.reasoning or ''}{message.content}" for message in messages
        )
        spans.append(
            {
                "sequence": number,
                "source": environment.name,
                "meta": {"task": task},
                "first_byte": 0,
                "end_byte": len(text.encode()),
                "text": text,
            }
        )
    return spans
