"""The stages of a run, in order. No other place lists them."""

from collections.abc import Sequence

from xushi.run.place import stage_key
from xushi.run.stages.base import Fact, Results, Stage
from xushi.run.stages.control import Control
from xushi.run.stages.data import Data
from xushi.run.stages.evaluate import Evaluate
from xushi.run.stages.export import Export
from xushi.run.stages.pretrain import Pretrain
from xushi.run.stages.rl import RL
from xushi.run.stages.sft import SFT
from xushi.run.stages.tokenizer import TrainTokenizer
from xushi.run.stages.training import TrainingStage

STAGES: tuple[type[Stage], ...] = (
    Data,
    TrainTokenizer,
    Pretrain,
    SFT,
    RL,
    Control,
    Evaluate,
    Export,
)
RECIPE_STAGES = tuple(stage.name for stage in STAGES if stage.in_recipe)

__all__ = [
    "RECIPE_STAGES",
    "STAGES",
    "Fact",
    "Results",
    "Stage",
    "TrainingStage",
    "in_order",
    "keys_of",
]


def keys_of(stages: Sequence[Stage]) -> dict[str, str]:
    """The key of each stage, chained with those before it."""
    keys: dict[str, str] = {}
    before = ""
    for stage in stages:
        before = keys[stage.name] = stage_key(stage.name, stage.reads(), before)
    return keys


def in_order(named: Sequence[type[Stage]]) -> tuple[type[Stage], ...]:
    """The stages that a recipe names, with those that follow them or end every run.

    Raises ValueError if a required stage is missing, one is named twice, or the built-in ones are
    not in their order.
    """
    names = [stage.name for stage in named]
    missing = [stage.name for stage in STAGES if stage.required and stage not in named]
    if missing:
        raise ValueError(
            f"stages must name {', '.join(s.name for s in STAGES if s.required)}; "
            "a control run leaves one out by without"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"stages names one stage twice: {', '.join(names)}")
    places = [STAGES.index(stage) for stage in named if stage in STAGES]
    if places != sorted(places):
        raise ValueError(f"stages must be in the order {', '.join(RECIPE_STAGES)}")
    ordered: list[type[Stage]] = []
    for stage in named:
        ordered.append(stage)
        ordered += [other for other in STAGES if other.follows == stage.name]
    ordered += [stage for stage in STAGES if not stage.in_recipe and not stage.follows]
    return tuple(ordered)
