"""The training loop that pretraining and supervised fine-tuning share: a pure batch per step,
checkpoints, health.

Killed anywhere and started again it ends with the same bits: everything that a step depends on is
in the checkpoint or is a function of the step's number.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from xushi.base.errors import Failed
from xushi.base.files import write_atomic
from xushi.base.interrupt import StopRequest, finish_step_first
from xushi.base.machine import best_training_dtype, measure_matrix_gflops, peak_memory_bytes
from xushi.base.progress import StepProgress, say
from xushi.base.tracking import Tracking
from xushi.data import joined_hash, row_hashes
from xushi.model import Batch, Deepseek, LossCounts, LossParts, pretraining_loss
from xushi.plan import train_flops_per_token
from xushi.train.balance import router_health, update_router_biases
from xushi.train.checkpoint import Checkpoint, CheckpointWriter, SavedCheckpoint, latest_checkpoint
from xushi.train.config import ObjectiveConfig, OptimizationConfig, PretrainConfig
from xushi.train.guards import LIMIT_IN_A_ROW, LIMIT_OF_ROLLBACKS, Guard, Problem
from xushi.train.heartbeat import Heartbeat
from xushi.train.layout import Box, Layout, local
from xushi.train.optimizer import Norms, Optimizer, clip_gradients
from xushi.train.pipeline import run_pipeline
from xushi.train.qk_clip import clip_scores, watch_scores


def chosen_dtype(dtype: str, device: str = "cpu") -> str:
    """ "bf16" or "fp32": `dtype` itself, or for "auto" what the device multiplies fastest."""
    if dtype != "auto":
        return dtype
    return "bf16" if device == "cuda" else best_training_dtype()[0]


def set_compute(model: Deepseek, config: OptimizationConfig) -> None:
    """Make the model compute in the dtype that `config` asks for, and keep or recompute activations
    as it says.
    """
    model.compute_dtype = (
        torch.bfloat16 if chosen_dtype(config.dtype, model.device.type) == "bf16" else None
    )
    model.recompute = config.activations == "recompute"


def new_optimizer(
    model: Deepseek, config: OptimizationConfig, layout: Layout | None = None
) -> Optimizer:
    """The optimizer that `config` asks for; Newton-Schulz runs in bfloat16 if model and device
    multiply it.
    """
    dtype = model.compute_dtype if chosen_dtype("auto", model.device.type) == "bf16" else None
    return Optimizer(
        model,
        config.optimizer,
        (config.beta1, config.beta2),
        config.weight_decay,
        dtype,
        layout,
        form=config.newton_schulz,
        per_head=config.muon_per_head,
        epsilon=config.epsilon,
    )


@dataclass
class TrainingState:
    """Everything that the next step depends on, but for its number: `cursor` is how much data was
    used before it.
    """

    model: Deepseek
    optimizer: Optimizer
    layout: Layout
    guard: Guard = field(default_factory=Guard)
    cursor: int = 0

    @classmethod
    def begin(
        cls, model: Deepseek, config: OptimizationConfig, layout: Layout | None = None
    ) -> "TrainingState":
        """The state before the first step; spreads the model and makes it compute as `config` says."""
        layout = layout or Layout()
        set_compute(model, config)
        guard = Guard(config.on_spike) if isinstance(config, ObjectiveConfig) else Guard()
        return cls(model, new_optimizer(layout.spread(model), config, layout), layout, guard)

    @property
    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What is here of weights, buffers and moments, by group and name, sharing their memory."""
        return {
            "model": {name: local(tensor) for name, tensor in self.model.state_dict().items()},
            "optimizer": self.optimizer.state,
        }

    @property
    def saved(self) -> dict[str, dict[str, Tensor]]:
        """Those of them that this process is to save: parts, and of what several have whole one of
        them.
        """
        layout, boxes = self.layout, self.boxes
        twice = "model.embed_tokens.weight" if layout.shared is not None and layout.stage else ""
        return {
            group: {
                name: tensor
                for name, tensor in tensors.items()
                if (name in boxes or layout.rank == 0) and not (twice and name.endswith(twice))
            }
            for group, tensors in self.tensors.items()
        }

    @property
    def boxes(self) -> dict[str, Box]:
        """Of which part of which whole these are, where not of all."""
        if self.layout.data == 1:
            return {}
        boxes = {name: self.layout.box(name) for name in self.optimizer.parameters}
        return boxes | {name: boxes[name.partition(".")[2]] for name in self.optimizer.state}

    def checkpoint(self, step: int) -> Checkpoint:
        """The state after `step` steps, what this process saves of it; its tensors are this state's
        own.
        """
        return Checkpoint(
            step,
            self.saved,
            {
                "optimizer_steps": self.optimizer.steps,
                "cursor": self.cursor,
                "guard": self.guard.state,
            },
            self.boxes,
        )

    @torch.no_grad()
    def restore(self, checkpoint: SavedCheckpoint | None) -> int:
        """Go back to a checkpoint, or stay where there is none; returns the number of steps done.

        It may have been written by any number of processes. One of another model or optimizer is a
        `XushiError`.
        """
        if checkpoint is None:
            return 0
        boxes, layout = self.boxes, self.layout
        for group, tensors in self.tensors.items():
            everywhere = (
                set[str]().union(*layout.team.gather(set(tensors)))
                if layout.pipeline > 1
                else set(tensors)
            )
            if different := set(checkpoint.names(group)) ^ everywhere:
                raise Failed(
                    f"checkpoint {checkpoint.path} is of another model or optimizer: "
                    f"{min(different)} is in one of them only",
                    "choose another run directory",
                )
            for name, tensor in tensors.items():
                tensor.copy_(checkpoint.read(group, name, boxes.get(name, Box.whole(tensor.shape))))
        self.optimizer.steps = checkpoint.state["optimizer_steps"]
        self.cursor = checkpoint.state["cursor"]
        self.guard.load(checkpoint.state["guard"])
        return checkpoint.step


def optimizer_step(
    state: TrainingState,
    config: OptimizationConfig,
    step: int,
    loads: dict[str, Tensor],
    norms: Norms,
    move_biases: bool = True,
) -> dict[str, float]:
    """Step with the clipped gradients and move the router biases; returns what to track."""
    factor = config.rate_at(step)
    rate = config.learning_rate * factor
    state.optimizer.step(rate, (config.adamw_learning_rate or config.learning_rate) * factor)
    if (speed := config.bias_speed_at(step)) and move_biases:
        update_router_biases(state.model, loads, speed)
    return {
        "gradient_norm": norms.whole,
        **{f"gradient_norm.{part}": norm for part, norm in norms.parts.items()},
        "learning_rate": rate,
        **router_health(state.model, loads),
    }


def guarded_update(
    state: TrainingState,
    config: OptimizationConfig,
    step: int,
    loss: float,
    value: float,
    total: Tensor | None,
    loads: dict[str, Tensor],
    move_biases: bool = True,
) -> tuple[dict[str, float], Problem | None]:
    """Differentiate `total` and step, unless the guard withholds it: what to track, and what was
    wrong if anything.

    `loss` is what the guard compares with earlier steps. `value` is that of `total` over all
    processes. None for `total` says that the gradients are there.
    """
    guard, figures = state.guard, dict[str, float]()
    problem = guard.judge(loss, value)
    if not guard.withholds(problem):
        if total is not None:
            total.backward()  # type: ignore[no-untyped-call]
        norms = clip_gradients(state.model.named_parameters(), config.gradient_clip, state.layout)
        problem = guard.judge_gradient(norms.whole) or problem
        if not guard.withholds(problem):
            figures = optimizer_step(state, config, step, loads, norms, move_biases)
    state.optimizer.zero_grad()
    guard.count(loss, problem)
    return figures | {"withheld_steps": float(guard.withheld)}, problem


def training_step(
    state: TrainingState, config: ObjectiveConfig, step: int, batch: Batch
) -> tuple[dict[str, float], Problem | None]:
    """Step number `step` (from 0) on this process's rows of a batch: what to track of the whole
    batch, and what was wrong if anything.
    """
    layout, model = state.layout, state.model
    batch = batch.to(model.device)
    warmup = config.indexer_warmup_steps if isinstance(config, PretrainConfig) else 0
    warming = step < warmup
    if warmup and step == warmup:
        state.optimizer.restart()
    counts = LossCounts.of(batch, model.config.num_nextn_predict_layers)
    counts = LossCounts(*layout.total(torch.stack([counts.targets, counts.fed])))

    def loss_of(rows: Batch, residual: Tensor | None = None) -> LossParts:
        return pretraining_loss(
            model,
            rows,
            mtp_weight=config.mtp_weight_at(step),
            balance_weight=config.balance_weight,
            indexer_weight=config.indexer_weight,
            indexer_warmup=warming,
            counts=counts,
            residual=residual,
        )

    piped = layout.pipeline > 1
    if config.qk_clip is not None:
        watch_scores(model)
    parts = run_pipeline(model, batch, layout, loss_of, not warming) if piped else loss_of(batch)
    sums = layout.grand_total(
        torch.stack(
            [parts.total.detach(), parts.next_token, parts.mtp, parts.balance, parts.indexer]
        )
    )
    value, loss, mtp, balance, indexer = sums.tolist()
    loads = (
        dict(zip(parts.loads, layout.total(torch.stack(list(parts.loads.values()))), strict=True))
        if parts.loads
        else {}
    )
    figures, problem = guarded_update(
        state,
        config,
        step,
        loss,
        value,
        None if piped else parts.total,
        loads,
        move_biases=not warming,
    )
    if config.qk_clip is not None and not state.guard.withholds(problem):
        figures |= clip_scores(model, config.qk_clip, layout)
    if piped:  # each stage knows its own routers
        figures = {
            name: number for part in layout.team.gather(figures) for name, number in part.items()
        }
    return {
        "loss": loss,
        "mtp_loss": mtp,
        "balance_loss": balance,
        "indexer_loss": indexer,
        "target_tokens": float(counts.targets[0]),
        **figures,
    }, problem


def report_problem(
    stage: str,
    step: int,
    state: TrainingState,
    problem: Problem,
    batch: Batch,
    directory: Path,
    tracking: Tracking,
) -> None:
    """Tell and record it; too many withheld steps in a row end the run, with the batch in a file,
    as a `XushiError`.
    """
    withheld, layout = state.guard.withholds(problem), state.layout
    if layout.is_first:
        say(
            f"{stage} step {step}: {problem.text}"
            + ("; its update is left out" if withheld else "")
        )
    tracking.event(
        stage, problem.kind.replace(" ", "_"), step=step, text=problem.text, withheld=withheld
    )
    if state.guard.in_a_row >= LIMIT_IN_A_ROW:
        part = "" if layout.data == 1 else f"-rows-of-process-{layout.rank}"
        file = directory.parent / f"refused-{stage}-step-{step:09d}{part}.safetensors"
        if layout.stage == 0:  # the others of its column have the same rows
            write_atomic(
                file,
                safetensors.torch.save(
                    {name: tensor.contiguous() for name, tensor in batch._asdict().items()}
                ),
            )
        raise Failed(
            f"{stage} step {step}: {problem.text}, the {LIMIT_IN_A_ROW}rd step in a row without "
            "an update",
            f"{file} is the batch, {directory} has the checkpoints from before; with a lower "
            "learning_rate or more warmup_steps, and --update, the stage starts over and removes "
            "them",
        )


@dataclass(frozen=True)
class Data:
    """What a stage is trained on: `batches(cursor, count)` makes the batch of so many pieces from
    `cursor` on, and step number i takes `per_step(i)`. `piecewise` says that every piece is a row
    of its own, whatever the others are.
    """

    batches: Callable[[int, int], Batch]
    per_step: Callable[[int], int] = lambda _: 1
    piecewise: bool = False

    def share(self, cursor: int, pieces: int, layout: Layout) -> tuple[Batch, list[bytes]]:
        """This process's rows of the batch of so many pieces, and the hashes of rows that are this
        process's to give: all processes' together are the batch's.
        """
        if self.piecewise and pieces % layout.data == 0:
            each = pieces // layout.data
            rows = self.batches(cursor + layout.rank * each, each)
            return rows, row_hashes(rows) if layout.stage == 0 else []
        whole = self.batches(cursor, pieces)
        return layout.rows(whole), row_hashes(whole) if layout.is_first else []


def train(
    stage: str,
    model: Deepseek,
    config: ObjectiveConfig,
    data: Data,
    directory: Path,
    tracking: Tracking,
    evaluate: tuple[int, Callable[[], dict[str, float]]] | None = None,
    layout: Layout | None = None,
) -> dict[str, float]:
    """Train `model` in place for `config.steps` steps on `data`; checkpoints go to `directory`.

    `evaluate` is (every so many steps, what to measure). With a `layout` all its processes call
    this alike, and leave with their parts of the model. Returns the last step's metrics with the
    tokens trained on per second of this start. Ctrl-C saves after the running step and raises
    KeyboardInterrupt.
    """
    state = TrainingState.begin(model, config, layout)

    def report(text: str) -> None:
        tracking.event(stage, "process_lost", text=text)
        say(f"{stage}: {text}; the run ends, and the same command goes on from the last checkpoint")

    # Signals are kept back until it is known who died: torchrun sends one to those that are left.
    with finish_step_first() as stop, Heartbeat(state.layout.team, report) as heart:
        try:
            return _steps(stage, state, config, data, directory, tracking, evaluate, heart, stop)
        except RuntimeError as error:  # what torch raises when a process does not answer
            if not (lost := heart.who_is_gone()):
                raise
            raise Failed(
                f"{stage}: {lost} died",
                "run the same command again: it goes on from the last "
                "checkpoint, with as many processes as you start",
            ) from error


def _steps(
    stage: str,
    state: TrainingState,
    config: ObjectiveConfig,
    data: Data,
    directory: Path,
    tracking: Tracking,
    evaluate: tuple[int, Callable[[], dict[str, float]]] | None,
    heart: Heartbeat,
    stop: StopRequest,
) -> dict[str, float]:
    layout, model, rollbacks = state.layout, state.model, Counter[int]()
    ceiling = sum(layout.team.gather(_flops_per_second(state)))
    step = first = state.restore(_agreed_checkpoint(directory, layout))
    metrics: dict[str, float] = {}
    began, trained = time.monotonic(), 0.0
    with (
        StepProgress(stage, config.steps, first, layout.is_first) as progress,
        CheckpointWriter(
            directory, config.keep_checkpoints, config.keep_every, layout.writers
        ) as writer,
    ):
        if step == 0 and config.on_spike == "rollback":
            writer.save(state.checkpoint(0))  # so that there is always something to go back to
        while step < config.steps:
            step_began = time.monotonic()
            heart.at(step, "batch")
            cursor, pieces = state.cursor, data.per_step(step)
            batch, hashes = data.share(cursor, pieces, layout)
            heart.at(step, "step")
            digest = joined_hash([row for part in layout.team.gather(hashes) for row in part])
            metrics, problem = training_step(state, config, step, batch)
            stops = any(layout.team.gather(stop.requested))
            flops = train_flops_per_token(
                model.config, batch.tokens.shape[1], bool(config.mtp_weight_at(step))
            )
            state.cursor += pieces
            step += 1
            tracking.batch(stage, step, cursor, pieces, digest, problem.text if problem else "")
            trained += metrics["target_tokens"]
            metrics["tokens_per_second"] = trained / (time.monotonic() - began)
            metrics["seconds"] = time.monotonic() - step_began
            metrics["memory_bytes"] = float(_memory_bytes(layout))
            metrics["mfu"] = metrics["target_tokens"] * flops / metrics["seconds"] / ceiling
            if evaluate is not None and (step % evaluate[0] == 0 or step == config.steps):
                heart.at(step, "evaluate")
                metrics |= evaluate[1]()
            tracking.metrics(stage, step, metrics)
            progress.update(
                step, f"loss {metrics['loss']:.3f}  {metrics['tokens_per_second']:,.0f} tok/s"
            )
            heart.at(step, "save")
            if problem is not None:
                report_problem(stage, step, state, problem, batch, directory, tracking)
            back = problem is not None and problem.kind == "spike" and config.on_spike == "rollback"
            if back:  # nothing to save: what is there leads here again
                step = _roll_back(stage, step, state, writer, rollbacks, tracking)
            elif step % config.checkpoint_every == 0 or step == config.steps or stops:
                writer.save(state.checkpoint(step))
            if stops:
                raise KeyboardInterrupt
    if any(
        layout.team.gather(stop.requested)
    ):  # asked for while the last step was evaluated and saved
        raise KeyboardInterrupt
    return metrics


def _flops_per_second(state: TrainingState) -> float:
    """What this process's matrix product reaches, while the others' run too: what "mfu" is a share
    of.
    """
    bf16 = (
        state.model.compute_dtype == torch.bfloat16
        and chosen_dtype("auto", state.layout.device) == "bf16"
    )
    size = 8192 if state.layout.device == "cuda" else 512
    return 1e9 * measure_matrix_gflops("bf16" if bf16 else "fp32", size, device=state.layout.device)


def _memory_bytes(layout: Layout) -> int:
    """The most that this process has held so far, on the GPU if it trains there."""
    return torch.cuda.max_memory_allocated() if layout.device == "cuda" else peak_memory_bytes()


def _agreed_checkpoint(directory: Path, layout: Layout) -> SavedCheckpoint | None:
    """The newest whole checkpoint that the first process sees; if another cannot open it, that is a
    `XushiError`.
    """
    found = latest_checkpoint(directory) if layout.is_first else None
    step = layout.team.broadcast(found.step if found else None)
    if layout.is_first or step is None:
        return found
    found = latest_checkpoint(directory, up_to=step)
    if found is None or found.step != step:
        raise Failed(
            f"process {layout.rank} does not see the checkpoint of step {step} in {directory}",
            "all processes need the same file system; run the same command again",
        )
    return found


def _roll_back(
    stage: str,
    step: int,
    state: TrainingState,
    writer: CheckpointWriter,
    rollbacks: Counter[int],
    tracking: Tracking,
) -> int:
    """Go back to the last checkpoint and leave out the data from there to here; returns the number
    of steps done.
    """
    beyond = state.cursor
    writer.finish()
    back = state.restore(_agreed_checkpoint(writer.directory, state.layout))
    rollbacks[back] += 1
    if rollbacks[back] > LIMIT_OF_ROLLBACKS:
        raise Failed(
            f"{stage} step {step}: the loss jumps after {LIMIT_OF_ROLLBACKS} returns to step "
            f"{back}",
            'lower learning_rate, or set on_spike to "warn" if the data itself changes there',
        )
    tracking.event(
        stage,
        "rollback",
        from_step=step,
        to_step=back,
        skipped_from=state.cursor,
        skipped_to=beyond,
    )
    if state.layout.is_first:
        say(f"{stage}: back to step {back}; the data from there to step {step} is left out")
    state.cursor = beyond
    return back
