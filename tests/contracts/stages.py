"""A stage and a training stage of somebody's own, as a recipe names them: "stages.py:WordCount".

`WordCount` counts the words of the training text. `Denoise` trains the pretrained model on text in
which some tokens are replaced, with a training step of its own.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field

from xushi.base.config import StrictConfig
from xushi.base.files import write_json
from xushi.base.seeds import derive
from xushi.base.tracking import BatchRecord
from xushi.data import TokenDataset, batch_hash, training_texts
from xushi.model import Batch, next_token_loss
from xushi.run.place import RunPlace
from xushi.run.recipe import Recipe
from xushi.run.stages import Costs, Results, Stage, TrainingStage
from xushi.train import (
    OptimizationConfig,
    Step,
    StepLoss,
    StepResult,
    TrainingState,
    guarded_update,
)


class WordCountConfig(StrictConfig):
    """Table [word_count]."""

    most: int = Field(10, ge=1, le=1000)


class WordCountFigures(Results):
    words: int
    different: int


class WordCountResults(Results):
    word_count: WordCountFigures


class WordCount(Stage):
    """Reads data/corpus; writes words.json with the most frequent words."""

    name = "word_count"
    Config = WordCountConfig

    def __init__(self, recipe: Recipe) -> None:
        self.config: WordCountConfig = recipe.word_count  # type: ignore[attr-defined]

    def run(self, place: RunPlace) -> WordCountResults:
        words = Counter(word for text in training_texts(place.corpus) for word in text.split())
        write_json(place.path("words.json"), words.most_common(self.config.most))
        figures = WordCountFigures(words=words.total(), different=len(words))
        return WordCountResults(word_count=figures)


class DenoiseConfig(OptimizationConfig):
    """Table [denoise]: how it is trained, and which share of the input tokens is replaced."""

    rows: int = Field(8, ge=1, le=1024)
    share: float = Field(0.15, ge=0, le=1)


class DenoiseStep(Step):
    """Next-token prediction on inputs with replaced tokens; the targets stay as they are."""

    def __init__(self, config: DenoiseConfig, dataset: TokenDataset, seed: int) -> None:
        self.config: DenoiseConfig = config
        self.dataset = dataset
        self.seed = seed
        self.replaced = 0  # in all steps: kept in the checkpoint

    def take(self, state: TrainingState, number: int, phase: Callable[[str], None]) -> StepResult:
        batch = self.noisy(state.cursor)
        phase("step")
        rows = state.layout.rows(batch)
        hidden = state.model.hidden(rows.tokens, rows.positions, rows.segments).hidden_BTD
        weights = rows.loss_mask.to(torch.float32) / int(batch.loss_mask.sum())
        total = next_token_loss(state.model, hidden, rows.targets, weights)
        value = float(state.layout.total(total.detach()))
        figures, problem = guarded_update(
            state, self.config, number, StepLoss(total, value, value, move_biases=False)
        )
        figures |= {"loss": value, "replaced": float(self.replaced)}
        return StepResult(
            figures, problem, rows, batch_hash(batch), self.config.rows, f"loss {value:.3f}"
        )

    def noisy(self, cursor: int) -> Batch:
        """The rows from `cursor` on, with some input tokens replaced by others of the batch."""
        batch = self.dataset.batch(cursor, self.config.rows)
        generator = torch.Generator().manual_seed(derive(self.seed, "noise", cursor) >> 1)
        noise = torch.rand(batch.tokens.shape, generator=generator) < self.config.share
        self.replaced += int(noise.sum())
        return batch._replace(tokens=torch.where(noise, batch.tokens.flip(1), batch.tokens))

    def saved(self) -> dict[str, Any]:
        return {"replaced": self.replaced}

    def load(self, saved: dict[str, Any]) -> None:
        self.replaced = saved.get("replaced", 0)


class DenoiseFigures(Results):
    steps: int
    replaced: int


class DenoiseResults(Results):
    denoise: DenoiseFigures


class Denoise(TrainingStage):
    """Reads the checkpoint of the stage before; writes checkpoints/denoise."""

    name = "denoise"
    Config = DenoiseConfig

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.config: DenoiseConfig = recipe.denoise  # type: ignore[attr-defined]
        self.sequence_length = recipe.data.sequence_length

    def seconds(self, costs: Costs) -> float:
        tokens = self.config.steps * self.config.rows * self.sequence_length
        return tokens * costs.training_token

    def step(self, place: RunPlace) -> Step:
        dataset = TokenDataset.open(place.tokens, derive(self.seed, self.name) >> 1, None)
        return DenoiseStep(self.config, dataset, self.seed)

    def results(self, place: RunPlace) -> DenoiseResults:
        replaced = place.tracking.series(self.name, "replaced")[-1][1]
        figures = DenoiseFigures(steps=self.config.steps, replaced=int(replaced))
        return DenoiseResults(denoise=figures)

    def batch(self, place: RunPlace, record: BatchRecord) -> Batch:
        step = self.step(place)
        assert isinstance(step, DenoiseStep)
        return step.noisy(record.cursor)
