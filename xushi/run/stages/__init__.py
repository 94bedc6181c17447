"""The stages of a run, in order. No other place lists them."""

from collections.abc import Mapping, Sequence

from xushi.run.place import RunPlace, StageRecord, read_record, stage_key
from xushi.run.stages.base import Costs, Fact, Results, Stage
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
    "Costs",
    "Fact",
    "Results",
    "Stage",
    "TrainingStage",
    "finished_stages",
    "in_order",
    "keys_of",
    "records_of",
]


def keys_of(stages: Sequence[Stage], records: Mapping[str, StageRecord]) -> dict[str, str]:
    """The key of each stage, chained with those before it and with the files that they have read,
    as far as `records` tells.
    """
    keys: dict[str, str] = {}
    before = ""
    for stage in stages:
        key = keys[stage.name] = stage_key(stage.name, stage.reads(), before)
        record = records.get(stage.name)
        before = record.after if record is not None and record.key == key else key
    return keys


def records_of(stages: Sequence[Stage], place: RunPlace) -> dict[str, StageRecord]:
    """The records of the stages that were finished in a run directory, by name."""
    read = ((stage.name, read_record(place, stage.name)) for stage in stages)
    return {name: record for name, record in read if record is not None}


def finished_stages(stages: Sequence[Stage], place: RunPlace) -> set[str]:
    """The names of the stages whose records in a run directory are of these very inputs."""
    records = records_of(stages, place)
    keys = keys_of(stages, records)
    return {name for name, record in records.items() if record.key == keys[name]}


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
