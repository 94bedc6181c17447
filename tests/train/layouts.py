"""What the processes of the layout tests run: `python -m tests.train.layouts PLACE`, started as
torchrun starts them.

Each process writes what it holds at the end to PLACE; the test puts the parts together. Not a test
by itself.
"""

import atexit
import contextlib
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from xushi.base.tracking import Tracking
from xushi.cli import guarded
from xushi.model import (
    Batch,
    Deepseek,
    LossCounts,
    LossParts,
    LossWeights,
    ModelConfig,
    pretraining_loss,
)
from xushi.model.moe import Router
from xushi.train import (
    Data,
    Layout,
    LayoutConfig,
    ObjectiveConfig,
    TrainingState,
    heartbeat,
    join,
    language,
    latest_checkpoint,
    training_step,
)
from xushi.train.layout import local
from xushi.train.pipeline import run_pipeline
from xushi.train.sharding import shard

from ..tiny import TINY
from .conftest import train

THIRD = TINY.model_copy(update={"q_lora_rank": 6})
MODELS = {
    "v2": THIRD.model_copy(
        update={
            "model_type": "deepseek_v2",
            "topk_method": "greedy",
            "norm_topk_prob": False,
            "num_nextn_predict_layers": 0,
        }
    ),
    "v3": THIRD,
    "v3.2": THIRD.model_copy(
        update={
            "model_type": "deepseek_v32",
            "index_topk": 4,
            "index_n_heads": 2,
            "index_head_dim": 6,
        }
    ),
    "v4": ModelConfig(
        model_type="deepseek_v4",
        vocab_size=40,
        hidden_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        q_lora_rank=6,
        qk_rope_head_dim=4,
        head_dim=8,
        o_groups=2,
        o_lora_rank=4,
        sliding_window=4,
        compress_ratios=[0, 2, 3, 2],
        compress_rate_csa=2,
        compress_rate_hca=3,
        index_topk=2,
        index_n_heads=2,
        index_head_dim=6,
        hc_mult=2,
        num_hash_layers=1,
        max_position_embeddings=32,
        num_nextn_predict_layers=1,
        initializer_range=0.1,
    ),
}
# As many layers as four stages need; the others are quicker with fewer.
MODELS |= {
    f"{kind} deep": model.model_copy(
        update={"num_hidden_layers": 4}
        | ({"compress_ratios": [0, 2, 3, 2, 2]} if kind == "v4" else {})
    )
    for kind, model in MODELS.items()
}
STEPS = 20
COMPARED = 8  # steps whose figures are compared: warm-up, full rate and decay
ROWS = 6  # which four processes cannot share evenly
CONFIG = ObjectiveConfig(
    steps=STEPS,
    learning_rate=0.01,
    warmup_steps=2,
    decay_fraction=0.5,
    bias_speed=0.01,
    balance_weight=0.01,
    checkpoint_every=6,
    dtype="fp32",
    muon_per_head=True,
)


def config_of(kind: str) -> ObjectiveConfig:
    """With QK-clip where it is for, at a limit that some heads reach."""
    clip = None if kind.startswith("v4") else 0.03
    return CONFIG.model_copy(update={"steps": COMPARED, "qk_clip": clip})


def model_of(kind: str) -> Deepseek:
    return Deepseek(MODELS[kind]).initialise(5)


def batch(cursor: int, count: int) -> Batch:
    """Rows of two documents and some padding, each a function of its number alone."""
    rows = []
    for number in range(cursor, cursor + count):
        tokens = torch.randint(0, 40, (25,), generator=torch.Generator().manual_seed(number))
        cut, end = 7 + number % 9, 24 - number % 4
        segments = torch.tensor([0] * cut + [1] * (end - cut) + [-1] * (24 - end))
        positions = torch.tensor([*range(cut), *range(end - cut), *([0] * (24 - end))])
        rows.append(
            Batch(
                tokens=tokens[:-1],
                targets=tokens[1:],
                segments=segments,
                positions=positions,
                loss_mask=segments >= 0,
            )
        )
    return Batch(*map(torch.stack, zip(*rows, strict=True)))


class Choices:
    """Records the routers' choices of each step, or replays recorded ones: `steps[step][router]` is
    [rows, T, k].
    """

    def __init__(
        self, model: Deepseek, layout: Layout, steps: list[dict[str, Tensor]] | None = None
    ) -> None:
        self.steps, self.layout, self.step, self.seen = steps, layout, 0, [dict[str, Tensor]()]
        for name, router in model.routers().items():
            router.forward = self._watched(name, router)

    def next_step(self) -> None:
        self.step += 1
        self.seen.append({})

    def _watched(self, name: str, router: Router):
        def forward(x_ND: Tensor, tokens_N: Tensor | None, pinned_Nk: Tensor | None = None):
            before = self.seen[-1].get(name)  # of earlier pieces of this step
            if self.steps is not None:
                chosen = self.steps[self.step][name]
                missing = -len(chosen) % self.layout.data  # as in Batch.shard
                filled = torch.cat([chosen, chosen.new_zeros((missing, *chosen.shape[1:]))])
                mine = filled.chunk(self.layout.data)[self.layout.rank]
                first = 0 if before is None else len(before)
                pinned_Nk = mine[first : first + len(x_ND) // 24].flatten(0, 1)
            choice = Router.forward(router, x_ND, tokens_N, pinned_Nk)
            found = choice.indices_Nk.view(-1, 24, choice.indices_Nk.shape[1])
            self.seen[-1][name] = found if before is None else torch.cat([before, found])
            return choice

        return forward


def biases(model: Deepseek) -> dict[str, Tensor]:
    return {
        name: router.e_score_correction_bias
        for name, router in model.routers().items()
        if router.e_score_correction_bias is not None
    }


def gradients(model: Deepseek, layout: Layout) -> dict[str, Tensor]:
    """Of the first batch's loss with everything in it: this process's parts."""
    rows = layout.rows(batch(0, ROWS))
    counts = LossCounts.of(rows, model.config.num_nextn_predict_layers)
    counts = LossCounts(*layout.total(torch.stack([counts.targets, counts.fed])))

    def loss(piece: Batch, residual: Tensor | None = None) -> LossParts:
        return pretraining_loss(
            model, piece, LossWeights(0.3, 0.01), counts=counts, residual=residual
        )

    if layout.pipeline > 1:
        run_pipeline(model, rows, layout, loss)
        layout.add_shared_gradients()
    else:
        loss(rows).total.backward()
    found = {
        name: local(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None
    }
    for parameter in model.parameters():
        parameter.grad = None
    return found


def losses(kind: str, state: TrainingState, choices: Choices | None) -> list[dict[str, float]]:
    """The figures of a short training."""
    figures = []
    for step in range(COMPARED):
        rows = state.layout.rows(batch(step * ROWS, ROWS))
        found, problem = training_step(state, config_of(kind), step, rows)
        assert problem is None
        figures.append(found)
        if choices is not None:
            choices.next_step()
    return figures


def examine(kind: str, layout: Layout, recorded: list[dict[str, Tensor]]) -> dict[str, object]:
    result: dict[str, object] = {
        "gradients": gradients(shard(model_of(kind), layout), layout),
        "exact": gradients(shard(model_of(kind).double(), layout), layout),
        "boxes": {name: vars(layout.box(name)) for name in layout.shapes},
    }
    for name, steps in (("replayed", recorded), ("free", None)):
        state = TrainingState.begin(model_of(kind), config_of(kind), layout)
        choices = Choices(state.model, layout, steps)
        result[name] = losses(kind, state, choices)
        result[f"{name}_biases"] = biases(state.model)
        result[f"{name}_choices"] = choices.seen
    return result


def resumed(kind: str, layout: Layout, directory: Path, steps: int, total: int = STEPS) -> None:
    """Train to step `steps` of `total` from whatever is in `directory`."""
    config = CONFIG.model_copy(update={"steps": total})

    def batches(cursor: int, count: int) -> Batch:
        if cursor // ROWS >= steps:
            raise KeyboardInterrupt
        return batch(cursor, count)

    with contextlib.suppress(KeyboardInterrupt):
        train(
            "test",
            model_of(kind),
            config,
            Data(batches, lambda _: ROWS),
            directory,
            Tracking(None),
            layout=layout,
        )


def poisoned(layout: Layout, directory: Path) -> list[dict[str, float]]:
    """Six steps, in the third of which the last process alone has a loss that is not a number."""
    real, steps, tracked = language.pretraining_loss, [0], []

    def loss(*arguments: object, **settings: object):
        parts = real(*arguments, **settings)
        steps[0] += 1
        pieces = ROWS if layout.pipeline > 1 else 1
        broken = (steps[0] - 1) // pieces == 2 and (layout.rank, layout.stage) == (
            layout.data - 1,
            layout.pipeline - 1,
        )
        return replace(parts, total=parts.total * float("nan")) if broken else parts

    class Remembering(Tracking):
        def metrics(self, stage, step, values):
            tracked.append(dict(values))

    language.pretraining_loss = loss
    config = CONFIG.model_copy(update={"steps": 6, "activations": "recompute"})
    train(
        "test",
        model_of("v3"),
        config,
        Data(batch, lambda _: ROWS),
        directory,
        Remembering(None),
        layout=layout,
    )
    language.pretraining_loss = real
    return tracked


def endless(layout: Layout, directory: Path, stands_still: int | None) -> None:
    """Training that ends by what happens to a process; one may stop at the fifth step's batch by
    itself.
    """
    heartbeat.SHORTEST_LIMIT, heartbeat.SECONDS_BETWEEN, heartbeat.SECONDS_TO_TELL = 3.0, 0.1, 1.0

    def batches(cursor: int, count: int) -> Batch:
        if cursor == 4 * ROWS and layout.rank == stands_still:
            time.sleep(600)
        return batch(cursor, count)

    config = CONFIG.model_copy(update={"steps": 100_000, "checkpoint_every": 2})
    data = Data(batches, lambda _: ROWS)
    sys.exit(
        guarded(
            lambda: train(
                "test", model_of("v3"), config, data, directory, Tracking(None), layout=layout
            )
        )
    )


def fail_if_joined() -> None:
    """At the very end of a process: its groups must be gone, or Python may abort it."""
    if dist.is_initialized():
        os._exit(3)


def main(place: Path) -> None:
    atexit.register(fail_if_joined)  # called after what `join` registers
    torch.set_num_threads(1)
    task = torch.load(place / "task.pt", weights_only=True)
    results: dict[str, object] = {}
    if (
        "kill" in task
    ):  # small steps, each with a checkpoint: a kill is likely to fall into the writing of one
        config = CONFIG.model_copy(
            update={"steps": task["kill"], "checkpoint_every": 1, "keep_checkpoints": 3}
        )
        layout = join(LayoutConfig(expert=min(2, int(os.environ["WORLD_SIZE"]))), THIRD)
        train(
            "test",
            model_of("v3"),
            config,
            Data(batch, lambda _: ROWS),
            place / "run",
            Tracking(None),
            layout=layout,
        )
        return
    if "endless" in task:
        endless(join(LayoutConfig(), THIRD), place / "run", task["endless"])
    for pipeline, expert in task["layouts"]:
        layout = join(LayoutConfig(pipeline=pipeline, expert=expert), MODELS["v3 deep"])
        for kind, recorded in task.get("recorded", {}).items():
            if kind.endswith("deep") != (pipeline == 4):
                continue
            results[f"{kind} {pipeline} {expert}"] = examine(kind, layout, recorded)
        if "poison" in task:
            results["poisoned"] = poisoned(layout, place / "poisoned")
            backends = [
                team.group._get_backend(torch.device("cpu"))
                for team in (layout.team, layout.writers)
            ]
            results["seconds_to_wait"] = min(
                backend.options._timeout.total_seconds() for backend in backends
            )
        for kind, directory, steps in task.get("resume", []):
            resumed(kind, layout, place / directory, steps)
            checkpoint = latest_checkpoint(place / directory)
            results[directory] = checkpoint.step if checkpoint else 0
    torch.save(results, place / f"found-{layout.team.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
