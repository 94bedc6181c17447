"""What training changes from step to step (model, optimizer, guard, cursor), and how a checkpoint
holds it.

Not here: the loop (training), what one step does (step).
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xushi.base.errors import Failed
from xushi.base.machine import best_training_dtype
from xushi.model import Deepseek
from xushi.train.boxes import Box
from xushi.train.checkpoint import Checkpoint, SavedCheckpoint, latest_checkpoint
from xushi.train.config import OptimizationConfig
from xushi.train.guards import Guard
from xushi.train.layout import Layout, local
from xushi.train.optimizer import Optimizer, OptimizerSettings
from xushi.train.sharding import shard

EMBEDDING = "model.embed_tokens.weight"


def chosen_dtype(dtype: str, device: str = "cpu") -> str:
    """ "bf16" or "fp32": `dtype` itself, or for "auto" what the device multiplies fastest."""
    if dtype != "auto":
        return dtype
    return "bf16" if device == "cuda" else best_training_dtype()[0]


def set_compute(model: Deepseek, config: OptimizationConfig) -> None:
    """Make the model compute in the dtype that `config` asks for, and keep or recompute
    activations.
    """
    bf16 = chosen_dtype(config.dtype, model.device.type) == "bf16"
    model.compute_dtype = torch.bfloat16 if bf16 else None
    model.recompute = config.activations == "recompute"


def new_optimizer(
    model: Deepseek, config: OptimizationConfig, layout: Layout | None = None
) -> Optimizer:
    """The optimizer that `config` asks for.

    Newton-Schulz runs in bfloat16 if the model computes in it and the device multiplies it fastest.
    """
    dtype = model.compute_dtype if chosen_dtype("auto", model.device.type) == "bf16" else None
    settings = OptimizerSettings(
        config.optimizer,
        (config.beta1, config.beta2),
        config.weight_decay,
        config.epsilon,
        config.newton_schulz,
        dtype,
        config.muon_per_head,
    )
    return Optimizer(model, settings, layout)


@dataclass
class TrainingState:
    """Everything that the next step depends on, except its number and what the step itself saves.

    `cursor` counts the items of data used so far. `stopped` says why training ended early, "" while
    it goes on.
    """

    model: Deepseek
    optimizer: Optimizer
    layout: Layout
    guard: Guard = field(default_factory=Guard)
    cursor: int = 0
    stopped: str = ""

    @classmethod
    def begin(
        cls, model: Deepseek, config: OptimizationConfig, layout: Layout | None = None
    ) -> "TrainingState":
        """The state before the first step. Shards the model and makes it compute as `config`
        says.
        """
        layout = layout or Layout()
        set_compute(model, config)
        optimizer = new_optimizer(shard(model, layout), config, layout)
        return cls(model, optimizer, layout, Guard(config.on_spike))

    @property
    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """This process's weights, buffers and moments by group and name, sharing their memory."""
        return {
            "model": {name: local(tensor) for name, tensor in self.model.state_dict().items()},
            "optimizer": self.optimizer.state,
        }

    @property
    def saved(self) -> dict[str, dict[str, Tensor]]:
        """The tensors that this process saves: its shards, and on rank 0 what all ranks hold whole.

        All processes' together are each tensor exactly once.
        """
        layout, boxes = self.layout, self.boxes
        shared = (
            layout.shared_embedding is not None and layout.stage > 0
        )  # the first stage saves it
        return {
            group: {
                name: tensor
                for name, tensor in tensors.items()
                if (name in boxes or layout.rank == 0) and not (shared and name.endswith(EMBEDDING))
            }
            for group, tensors in self.tensors.items()
        }

    @property
    def boxes(self) -> dict[str, Box]:
        """Where each shard lies in its whole tensor; a name without a box is a full tensor."""
        if self.layout.data == 1:
            return {}
        boxes = {name: self.layout.box(name) for name in self.optimizer.parameters}
        return boxes | {name: boxes[name.partition(".")[2]] for name in self.optimizer.state}

    def checkpoint(self, step: int, of_step: dict[str, Any] | None = None) -> Checkpoint:
        """The state after `step` steps, as this process saves it; the tensors share their memory.

        `of_step` is what the step itself saves (`Step.saved`).
        """
        manifest = {
            "optimizer_steps": self.optimizer.steps,
            "cursor": self.cursor,
            "guard": self.guard.state,
            "step": of_step or {},
            "stopped": self.stopped,
        }
        return Checkpoint(step, self.saved, manifest, self.boxes)

    @torch.no_grad()
    def restore(self, checkpoint: SavedCheckpoint | None) -> int:
        """Go back to a checkpoint, or stay as begun for None; returns the number of steps done.

        Any number of processes may have written it. Raises `Failed` if it is of another model or
        optimizer.
        """
        if checkpoint is None:
            return 0
        boxes = self.boxes
        for group, tensors in self.tensors.items():
            self._check_names(checkpoint, group, set(tensors))
            for name, tensor in tensors.items():
                tensor.copy_(checkpoint.read(group, name, boxes.get(name, Box.whole(tensor.shape))))
        self.optimizer.steps = checkpoint.state["optimizer_steps"]
        self.cursor = checkpoint.state["cursor"]
        self.guard.load(checkpoint.state["guard"])
        self.stopped = checkpoint.state["stopped"]
        return checkpoint.step

    def _check_names(self, checkpoint: SavedCheckpoint, group: str, names: set[str]) -> None:
        """Raise `Failed` unless the checkpoint holds these tensors, of all stages together."""
        if self.layout.pipeline > 1:
            names = set[str]().union(*self.layout.team.gather(names))
        if different := set(checkpoint.names(group)) ^ names:
            raise Failed(
                f"checkpoint {checkpoint.path} is of another model or optimizer: "
                f"{min(different)} is in one of them only",
                "choose another run directory",
            )


def agreed_checkpoint(
    directory: Path, layout: Layout, up_to: int | None = None
) -> SavedCheckpoint | None:
    """The newest intact checkpoint that rank 0 sees, of step `up_to` at most; None if there is
    none.

    Raises `Failed` on a rank that cannot open it.
    """
    found = latest_checkpoint(directory, up_to) if layout.is_first else None
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
