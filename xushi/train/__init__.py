"""The training loop, its steps on text, the optimizer, checkpoints, and layouts of processes."""

from xushi.train.checkpoint import latest_checkpoint
from xushi.train.config import (
    LayoutConfig,
    ObjectiveConfig,
    OptimizationConfig,
    PretrainConfig,
    SFTConfig,
)
from xushi.train.examples import PackedExamples, pack_examples
from xushi.train.fitting import check_layout
from xushi.train.joining import join, processes_on_this_machine
from xushi.train.language import Data, LanguageModelStep, training_step
from xushi.train.layout import Layout
from xushi.train.pipeline import MICROBATCHES_PER_STAGE, run_stage
from xushi.train.state import TrainingState, chosen_dtype
from xushi.train.step import Step, StepLoss, StepResult, guarded_update
from xushi.train.team import Team
from xushi.train.training import Evaluation, Replayed, Training

__all__ = [
    "MICROBATCHES_PER_STAGE",
    "Data",
    "Evaluation",
    "LanguageModelStep",
    "Layout",
    "LayoutConfig",
    "ObjectiveConfig",
    "OptimizationConfig",
    "PackedExamples",
    "PretrainConfig",
    "Replayed",
    "SFTConfig",
    "Step",
    "StepLoss",
    "StepResult",
    "Team",
    "Training",
    "TrainingState",
    "check_layout",
    "chosen_dtype",
    "guarded_update",
    "join",
    "latest_checkpoint",
    "pack_examples",
    "processes_on_this_machine",
    "run_stage",
    "training_step",
]
