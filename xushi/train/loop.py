"""The training loop that pretraining and supervised fine-tuning share: a pure batch per step, checkpoints, health.

Killed anywhere and started again it ends with the same bits: everything that a step depends on is in the checkpoint
or is a function of the step's number.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from xushi.base.errors import XushiError
from xushi.base.interrupt import finish_step_first
from xushi.base.machine import best_training_dtype
from xushi.base.progress import StepProgress
from xushi.base.tracking import Tracking
from xushi.model import Deepseek, pretraining_loss
from xushi.train.balance import router_health, update_router_biases
from xushi.train.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from xushi.train.config import ObjectiveConfig, OptimizationConfig, PretrainConfig
from xushi.train.optimizer import Optimizer, clip_gradients
from xushi.train.schedule import warmup_stable_decay


def chosen_dtype(dtype: str) -> str:
    """"bf16" or "fp32": `dtype` itself, or for "auto" what this machine multiplies fastest."""
    return best_training_dtype()[0] if dtype == "auto" else dtype


def set_compute(model: Deepseek, config: OptimizationConfig) -> None:
    """Make the model compute in the dtype that `config` asks for, and keep or recompute activations as it says."""
    model.compute_dtype = torch.bfloat16 if chosen_dtype(config.dtype) == "bf16" else None
    model.recompute = config.activations == "recompute"


def new_optimizer(model: Deepseek, config: OptimizationConfig) -> Optimizer:
    """The optimizer that `config` asks for; Newton-Schulz runs in bfloat16 if model and processor multiply it."""
    dtype = model.compute_dtype if best_training_dtype()[0] == "bf16" else None
    return Optimizer(model, config.optimizer, (config.beta1, config.beta2), config.weight_decay, dtype)


def save_training(directory: Path, step: int, model: Deepseek, optimizer: Optimizer) -> None:
    """Checkpoint everything that the next step depends on."""
    save_checkpoint(directory, Checkpoint(step, {"model": model.state_dict(), "optimizer": optimizer.state},
                                          {"optimizer_steps": optimizer.steps}))


def resume_training(directory: Path, model: Deepseek, optimizer: Optimizer) -> int:
    """Load the newest checkpoint, if there is one; returns the number of steps done."""
    checkpoint = latest_checkpoint(directory)
    if checkpoint is None:
        return 0
    model.load_state_dict(checkpoint.tensors["model"])
    for name, tensor in optimizer.state.items():
        tensor.copy_(checkpoint.tensors["optimizer"][name])
    optimizer.steps = checkpoint.state["optimizer_steps"]
    return checkpoint.step


def optimizer_step(model: Deepseek, optimizer: Optimizer, config: OptimizationConfig, step: int,
                   loads: dict[str, Tensor], move_biases: bool = True) -> dict[str, float]:
    """Clip, step, move the router biases; returns the gradient norm, the learning rate and the routers' health."""
    norm = clip_gradients(model.parameters(), config.gradient_clip)
    if not math.isfinite(norm):
        raise XushiError(f"step {step + 1}: the gradient is not finite ({norm})",
                         "lower learning_rate or raise warmup_steps; the last checkpoint is untouched", 1)
    factor = warmup_stable_decay(step, config.steps, config.warmup_steps, config.decay_fraction)
    rate = config.learning_rate * factor
    optimizer.step(rate, (config.adamw_learning_rate or config.learning_rate) * factor)
    optimizer.zero_grad()
    if config.bias_speed and move_biases:
        update_router_biases(model, loads, config.bias_speed)
    return {"gradient_norm": norm, "learning_rate": rate, **router_health(model, loads)}


def train(stage: str, model: Deepseek, config: ObjectiveConfig, batches: Callable[[int], dict[str, Tensor]],
          directory: Path, tracking: Tracking, evaluate: tuple[int, Callable[[], dict[str, float]]] | None = None
          ) -> dict[str, float]:
    """Train `model` in place for `config.steps` steps on `batches(step)`; checkpoints go to `directory`.

    `evaluate` is (every so many steps, what to measure). Returns the last step's metrics with the tokens trained on
    per second of this process. Ctrl-C saves after the running step and raises KeyboardInterrupt.
    """
    set_compute(model, config)
    optimizer = new_optimizer(model, config)
    first = resume_training(directory, model, optimizer)
    warmup = config.indexer_warmup_steps if isinstance(config, PretrainConfig) else 0
    metrics: dict[str, float] = {}
    began, trained = time.monotonic(), 0
    with finish_step_first() as stop, StepProgress(stage, config.steps, first) as progress:
        for step in range(first, config.steps):
            step_began = time.monotonic()
            batch = batches(step)
            warming = step < warmup
            if warmup and step == warmup:
                optimizer.restart()
            parts = pretraining_loss(model, batch, mtp_weight=config.mtp_weight, balance_weight=config.balance_weight,
                                     indexer_weight=config.indexer_weight, indexer_warmup=warming)
            parts.total.backward()  # type: ignore[no-untyped-call]
            metrics = {"loss": float(parts.next_token), "mtp_loss": float(parts.mtp),
                       "balance_loss": float(parts.balance), "indexer_loss": float(parts.indexer),
                       **optimizer_step(model, optimizer, config, step, parts.loads, move_biases=not warming)}
            trained += int(batch["loss_mask"].sum())
            metrics["tokens_per_second"] = trained / (time.monotonic() - began)
            metrics["seconds"] = time.monotonic() - step_began
            done = step + 1
            if evaluate is not None and (done % evaluate[0] == 0 or done == config.steps):
                metrics |= evaluate[1]()
            tracking.metrics(stage, done, metrics)
            progress.update(done, f"loss {metrics['loss']:.3f}  {metrics['tokens_per_second']:,.0f} tok/s")
            if done % config.checkpoint_every == 0 or done == config.steps or stop.requested:
                save_training(directory, done, model, optimizer)
            if stop.requested:
                raise KeyboardInterrupt
    return metrics
