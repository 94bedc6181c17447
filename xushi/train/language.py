"""The step of pretraining, fine-tuning and the control: the model's own objective on a batch of
text.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from xushi.data import joined_hash, row_hashes
from xushi.model import Batch, Deepseek, LossCounts, LossParts, LossWeights, pretraining_loss
from xushi.plan import train_flops_per_token
from xushi.train.config import ObjectiveConfig
from xushi.train.guards import Problem
from xushi.train.layout import Layout
from xushi.train.pipeline import run_pipeline
from xushi.train.qk_clip import clip_scores, watch_scores
from xushi.train.state import TrainingState
from xushi.train.step import Step, StepLoss, StepResult, guarded_update


@dataclass(frozen=True)
class Data:
    """What a stage is trained on, as a function of the cursor.

    `batches(cursor, count)` makes a batch of the items cursor to cursor + count - 1; step i takes
    `per_step(i)` items. `row_per_item`: one item is one row whatever the others are (pretraining),
    so each process makes its own rows alone; else items are packed together (fine-tuning).
    """

    batches: Callable[[int, int], Batch]
    per_step: Callable[[int], int] = lambda _: 1
    row_per_item: bool = False

    def share(self, cursor: int, items: int, layout: Layout) -> tuple[Batch, list[bytes]]:
        """This process's rows of a batch, and the hashes of the rows that it answers for.

        The hashes of all processes together, in their order, are those of the whole batch.
        """
        if self.row_per_item and items % layout.data == 0:
            each = items // layout.data
            rows = self.batches(cursor + layout.rank * each, each)
            return rows, row_hashes(rows) if layout.stage == 0 else []
        whole = self.batches(cursor, items)
        return layout.rows(whole), row_hashes(whole) if layout.is_first else []


class LanguageModelStep(Step):
    """Train on text: next token, multi-token prediction, balance and indexer losses."""

    config: ObjectiveConfig

    def __init__(self, config: ObjectiveConfig, data: Data) -> None:
        self.config = config
        self.data = data

    def take(self, state: TrainingState, number: int, phase: Callable[[str], None]) -> StepResult:
        """See `Step`; an item is what `Data` says."""
        items = self.data.per_step(number)
        batch, hashes = self.data.share(state.cursor, items, state.layout)
        phase("step")
        digest = joined_hash([row for part in state.layout.team.gather(hashes) for row in part])
        figures, problem = training_step(state, self.config, number, batch)
        per_token = train_flops_per_token(
            state.model.config, batch.tokens.shape[1], bool(self.config.mtp_weight_at(number))
        )
        return StepResult(
            figures,
            problem,
            batch,
            digest,
            items,
            note=f"loss {figures['loss']:.3f}",
            flops=figures["target_tokens"] * per_token,
        )


def training_step(
    state: TrainingState, config: ObjectiveConfig, number: int, batch: Batch
) -> tuple[dict[str, float], Problem | None]:
    """Step `number` (from 0) on this process's rows: figures of the whole batch, and the
    problem.
    """
    layout, model = state.layout, state.model
    batch = batch.to(model.device)
    warming = config.trains_indexers_alone(number)
    if number and config.trains_indexers_alone(number - 1) and not warming:
        state.optimizer.restart()
    counts = LossCounts.of(batch, model.config.num_nextn_predict_layers)
    counts = LossCounts(*layout.total(torch.stack([counts.targets, counts.fed])))
    if config.qk_clip is not None:
        watch_scores(model)
    loss_of = _objective(model, config, number, counts)
    piped = layout.pipeline > 1
    parts = run_pipeline(model, batch, layout, loss_of, not warming) if piped else loss_of(batch)
    value, figures = _summed(parts, layout)
    loads = _summed_loads(parts.loads, layout)
    total = None if piped else parts.total
    loss = StepLoss(total, value, figures["loss"], loads, move_biases=not warming)
    updated, problem = guarded_update(state, config, number, loss)
    if config.qk_clip is not None and not state.guard.withholds(problem):
        updated |= clip_scores(model, config.qk_clip, layout)
    if piped:  # each stage has the figures of its own routers
        updated = {k: v for part in layout.team.gather(updated) for k, v in part.items()}
    return figures | {"target_tokens": float(counts.targets[0]), **updated}, problem


def _objective(
    model: Deepseek, config: ObjectiveConfig, number: int, counts: LossCounts
) -> Callable[..., LossParts]:
    """The loss of some rows at this step, with the residual of the stage before where there is
    one.
    """

    weights = LossWeights(
        config.mtp_weight_at(number), config.balance_weight, config.indexer_weight
    )

    def loss_of(rows: Batch, residual: Tensor | None = None) -> LossParts:
        return pretraining_loss(
            model,
            rows,
            weights,
            indexer_warmup=config.trains_indexers_alone(number),
            counts=counts,
            residual=residual,
        )

    return loss_of


def _summed(parts: LossParts, layout: Layout) -> tuple[float, dict[str, float]]:
    """The total loss and its parts over all processes."""
    each = [parts.total.detach(), parts.next_token, parts.mtp, parts.balance, parts.indexer]
    value, *sums = layout.grand_total(torch.stack(each)).tolist()
    names = ("loss", "mtp_loss", "balance_loss", "indexer_loss")
    return value, dict(zip(names, sums, strict=True))


def _summed_loads(loads: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The experts' loads over the data processes, by router."""
    if not loads:
        return {}
    return dict(zip(loads, layout.total(torch.stack(list(loads.values()))), strict=True))
