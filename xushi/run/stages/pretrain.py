"""Pretraining: from random weights, on the corpus."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from xushi.base.seeds import derive
from xushi.base.tracking import BatchRecord
from xushi.data import TokenDataset, find_documents, heldout_batches, load_summary
from xushi.evaluate import total_bits
from xushi.model import Batch, Deepseek
from xushi.run.place import RunPlace
from xushi.run.stages.base import Costs, Fact, Results
from xushi.run.stages.checks import check_batch, check_model_training
from xushi.run.stages.data import TRANSCRIPTS
from xushi.run.stages.training import TrainingStage, end_mean, training_seconds
from xushi.train import Data, Evaluation, LanguageModelStep, Layout, Step, run_stage

if TYPE_CHECKING:
    from xushi.run.recipe import Recipe

ROWS_AT_ONCE = 8  # in a measurement on held-out text


class PretrainFigures(Results):
    """Losses are means over the last tenth of the steps, in nats per token."""

    steps: int
    tokens: int
    epochs: float
    loss: float | None
    mtp_loss: float | None
    tokens_per_second: float | None


class PretrainResults(Results):
    """What pretraining returns."""

    pretrain: PretrainFigures


class Pretrain(TrainingStage):
    """Reads data/tokens; writes checkpoints/pretrain."""

    name = "pretrain"
    title = "Pretraining"
    section = "pretrain"
    required = True
    facts = (
        Fact("pretrain.tokens", "{} tokens"),
        Fact("pretrain.steps", "{} steps"),
        Fact("pretrain.tokens_per_second", "{} tokens a second"),
        Fact("pretrain.loss", "last loss {} nats a token", "digits"),
    )

    def __init__(self, recipe: "Recipe") -> None:
        super().__init__(recipe)
        self.config = recipe.pretrain
        self.sequence_length = recipe.data.sequence_length
        self.sources = None if recipe.runs("data") else [TRANSCRIPTS]

    @classmethod
    def check(cls, recipe: "Recipe") -> None:
        """Batches are whole sequences, and the model can be trained as asked."""
        check_batch(recipe.pretrain, recipe.data.sequence_length)
        check_model_training(cls.name, recipe.pretrain, recipe.model)

    def seconds(self, costs: Costs) -> float:
        """All tokens of all steps, and the measurements on held-out text between them."""
        measured = min(self.config.evaluate_tokens, costs.heldout_tokens)
        measured *= -(-self.config.steps // self.config.evaluate_every)  # the last step is one
        trained = self.config.tokens(self.sequence_length)
        return trained * costs.training_token + measured * costs.forward_token

    def dataset(self, place: RunPlace) -> TokenDataset:
        """The training sequences; without the data stage those of the transcripts alone."""
        return TokenDataset.open(place.tokens, derive(self.seed, "data") >> 1, self.sources)

    def data(self, place: RunPlace) -> Data:
        """The batches: one item is one row."""
        dataset = self.dataset(place)
        return Data(
            dataset.batch,
            lambda step: self.config.rows_at(step, self.sequence_length),
            row_per_item=True,
        )

    def step(self, place: RunPlace) -> Step:
        """Next-token prediction on the corpus."""
        return LanguageModelStep(self.config, self.data(place))

    def evaluation(self, place: RunPlace, model: Deepseek) -> Evaluation:
        """Bits per byte of a part of the held-out text."""
        rows = max(1, self.config.evaluate_tokens // self.sequence_length)
        batches, share = heldout_part(place.tokens, rows)
        size = load_summary(place.corpus).heldout_bytes * share
        return HeldOut(model, place.layout, batches, size, self.config.evaluate_every)

    def batch(self, place: RunPlace, record: BatchRecord) -> Batch:
        """The rows of a step."""
        return self.data(place).batches(record.cursor, record.items)

    def results(self, place: RunPlace) -> PretrainResults:
        """Losses, tokens and speed."""
        tokens = self.config.tokens(self.sequence_length)
        seconds = training_seconds(place.tracking, self.name)
        return PretrainResults(
            pretrain=PretrainFigures(
                steps=self.config.steps,
                tokens=tokens,
                epochs=tokens / self.dataset(place).tokens_per_epoch,
                loss=end_mean(place.tracking, self.name, "loss"),
                mtp_loss=end_mean(place.tracking, self.name, "mtp_loss"),
                tokens_per_second=tokens / seconds if seconds else None,
            )
        )

    def spans(self, place: RunPlace, record: BatchRecord) -> list[dict[str, Any]]:
        """Every part of a document in the batch, in order, with its text."""
        dataset = self.dataset(place)
        numbers = range(record.cursor, record.cursor + record.items)
        found = [(number, span) for number in numbers for span in dataset.byte_spans(number)]
        documents = find_documents(place.corpus, "train", [uid for _, (uid, _, _) in found])
        spans = []
        for number, (uid, first, end) in found:
            document = documents[uid]
            # A token may end inside a character.
            text = document.text.encode()[first:end].decode("utf-8", "replace")
            spans.append(
                {
                    "sequence": number,
                    "uid": uid.hex(),
                    "source": document.source,
                    "meta": dict(document.meta),
                    "first_byte": first,
                    "end_byte": end,
                    "text": text,
                }
            )
        return spans


@dataclass(frozen=True)
class HeldOut:
    """Bits per byte of `batches`, which stand for `size` bytes of held-out text."""

    model: Deepseek
    layout: Layout
    batches: Sequence[Batch]
    size: float
    every: int

    def measure(self) -> dict[str, float]:
        """Each process measures its rows; the bits are summed over all of them."""
        layout = self.layout
        run = partial(run_stage, self.model, layout) if layout.pipeline > 1 else None
        bits = total_bits(self.model, [layout.rows(batch) for batch in self.batches], run)
        total = layout.grand_total(torch.tensor(bits, dtype=torch.float64))
        return {"heldout_bits_per_byte": float(total) / self.size}


def heldout_part(tokens: Path, rows: int) -> tuple[list[Batch], float]:
    """About `rows` rows of the held-out stream, spread over it, and their share of its tokens."""
    batches = list(heldout_batches(tokens, ROWS_AT_ONCE))
    chosen = batches[:: max(1, len(batches) * ROWS_AT_ONCE // rows)]
    wanted = sum(int(batch.loss_mask.sum()) for batch in chosen)
    return chosen, wanted / sum(int(batch.loss_mask.sum()) for batch in batches)
