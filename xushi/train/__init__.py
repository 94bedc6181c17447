"""Floor 5: pretraining, supervised fine-tuning, their optimizer, and checkpoints."""

from xushi.train.config import ObjectiveConfig, OptimizationConfig, PretrainConfig, SFTConfig
from xushi.train.examples import PackedExamples, pack_examples
from xushi.train.loop import (
    chosen_dtype,
    new_optimizer,
    optimizer_step,
    resume_training,
    save_training,
    set_compute,
    train,
)

__all__ = ["ObjectiveConfig", "OptimizationConfig", "PackedExamples", "PretrainConfig", "SFTConfig", "chosen_dtype",
           "new_optimizer", "optimizer_step", "pack_examples", "resume_training", "save_training", "set_compute",
           "train"]
