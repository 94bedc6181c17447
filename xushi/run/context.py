"""What every stage of a run is given, and the record of which stages are done.

A stage is done when `stages/<name>.json` holds the key of its inputs: the hash of the parts of the
recipe that it reads and of the keys of the stages before it. The file is written last, so a kill
leaves the stage undone.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xushi.base.errors import Failed
from xushi.base.files import sha256_json, write_json
from xushi.base.tracking import Tracking
from xushi.envs import DigitSum, DigitSumConfig, Environment
from xushi.model import Deepseek, ModelConfig
from xushi.ops import native
from xushi.recipe import Recipe
from xushi.tokenizer import Tokenizer
from xushi.train import Layout, chosen_dtype, latest_checkpoint

RUN_FORMAT = 1  # raised when the meaning of a run directory's files changes


@dataclass(frozen=True)
class RunContext:
    """A run directory with its recipe and tracking store, and the processes that train in it."""

    directory: Path
    recipe: Recipe
    tracking: Tracking
    layout: Layout = field(default_factory=Layout)

    @property
    def dtype(self) -> str:
        """What pretraining computes in: "bf16" or "fp32"."""
        return chosen_dtype(self.recipe.pretrain.dtype, self.layout.device)

    @property
    def op_forms(self) -> str:
        """Which forms of the ops run."""
        return (
            native.form(self.dtype)
            if self.layout.device == "cpu"
            else f"pytorch on {self.layout.device}"
        )

    def path(self, *parts: str) -> Path:
        """A place inside the run directory."""
        return self.directory.joinpath(*parts)

    def checkpoints(self, stage: str) -> Path:
        """Where a training stage keeps its checkpoints."""
        return self.path("checkpoints", stage)

    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer."""
        return Tokenizer.load(self.path("tokenizer"))

    def model_config(self, tokenizer: Tokenizer) -> ModelConfig:
        """The recipe's model with the tokenizer's vocabulary and special tokens."""
        return self.recipe.model.model_copy(
            update={
                "vocab_size": tokenizer.vocab_size,
                "bos_token_id": tokenizer.bos_id,
                "eos_token_id": tokenizer.eos_id,
                "pad_token_id": tokenizer.pad_id,
            }
        )

    def environment(
        self, min_digits: int | None = None, max_digits: int | None = None
    ) -> Environment:
        """The recipe's environment, with other lengths on request."""
        config = self.recipe.environment
        assert config is not None, (
            "the recipe's validation asks for an environment where a stage needs one"
        )
        return DigitSum(
            DigitSumConfig(
                min_digits=min_digits or config.min_digits,
                max_digits=max_digits or config.max_digits,
            )
        )

    def trained_model(self, stage: str | None) -> Deepseek:
        """The model at the end of a training stage; freshly initialised for None."""
        model = (
            Deepseek(self.model_config(self.tokenizer()))
            .initialise(self.recipe.seed)
            .to(self.layout.device)
        )
        if stage is not None:
            checkpoint = latest_checkpoint(self.checkpoints(stage))
            if checkpoint is None:
                raise Failed(
                    f"{self.checkpoints(stage)} holds no checkpoint",
                    f"remove {self.path('stages', stage + '.json')} and run the same command again",
                )
            model.load_state_dict(
                {name: checkpoint.read("model", name) for name in checkpoint.names("model")}
            )
        return model

    def last_stage(self, *stages: str) -> str | None:
        """The last of `stages` that this run trains, or None."""
        trained = [stage for stage in stages if self.recipe.runs(stage)]
        return trained[-1] if trained else None


@dataclass(frozen=True)
class StageRecord:
    """What a finished stage left behind: seconds it took and the numbers for results.json."""

    key: str
    seconds: float
    results: dict[str, Any]


def stage_key(name: str, inputs: Mapping[str, Any]) -> str:
    """The hash that says whether a stage's inputs are the same."""
    return sha256_json({"format": RUN_FORMAT, "stage": name, **inputs})


def read_record(context: RunContext, name: str) -> StageRecord | None:
    """The record of stage `name`, None if it was never finished here."""
    file = context.path("stages", f"{name}.json")
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        return StageRecord(table["key"], table["seconds"], table["results"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Failed(
            f"{file} cannot be read: {error!r}", "remove it and run the same command again"
        ) from None


def write_record(context: RunContext, name: str, record: StageRecord) -> None:
    """Mark stage `name` as done."""
    write_json(
        context.path("stages", f"{name}.json"),
        {"key": record.key, "seconds": record.seconds, "results": record.results},
    )
