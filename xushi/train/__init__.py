"""Floor 5: pretraining, supervised fine-tuning, their optimizer, and checkpoints."""

from xushi.train.checkpoint import CheckpointWriter, latest_checkpoint
from xushi.train.config import (
    LayoutConfig,
    ObjectiveConfig,
    OptimizationConfig,
    PretrainConfig,
    SFTConfig,
)
from xushi.train.examples import PackedExamples, pack_examples
from xushi.train.layout import Layout, Team, check_layout, join
from xushi.train.loop import (
    Data,
    TrainingState,
    chosen_dtype,
    guarded_update,
    new_optimizer,
    report_problem,
    set_compute,
    train,
    training_step,
)
from xushi.train.pipeline import PIECES_PER_STAGE, run_stage

__all__ = [
    "PIECES_PER_STAGE",
    "CheckpointWriter",
    "Data",
    "Layout",
    "LayoutConfig",
    "ObjectiveConfig",
    "OptimizationConfig",
    "PackedExamples",
    "PretrainConfig",
    "SFTConfig",
    "Team",
    "TrainingState",
    "check_layout",
    "chosen_dtype",
    "guarded_update",
    "join",
    "latest_checkpoint",
    "new_optimizer",
    "pack_examples",
    "report_problem",
    "run_stage",
    "set_compute",
    "train",
    "training_step",
]
