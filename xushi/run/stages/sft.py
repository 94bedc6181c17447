"""Supervised fine-tuning on the environment's demonstrations."""

from typing import TYPE_CHECKING, Any

from xushi.base.tracking import BatchRecord
from xushi.model import Batch
from xushi.run.place import RunPlace
from xushi.run.stages.base import Fact, Results
from xushi.run.stages.checks import check_length, check_model_training
from xushi.run.stages.conversations import (
    demonstration_spans,
    demonstrations,
    mean_conversation_tokens,
)
from xushi.run.stages.lengths import check_episode_length, check_tokens
from xushi.run.stages.training import TrainingStage, end_mean
from xushi.train import Data, LanguageModelStep, Step

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

    def seconds(self, per_token: float) -> float:
        """The mean length of some conversations stands for all."""
        tokens = mean_conversation_tokens(self.environment.make(), self.config)
        return self.config.steps * self.config.batch_examples * tokens * per_token

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
        return demonstration_spans(self.environment.make(), place.tokenizer(), self.config, record)
