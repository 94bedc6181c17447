"""The typed description of a whole run, composed of the rooms' own configs."""

from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ConfigDict, Field, model_validator

from xushi.base.config import StrictConfig, override, parse, read_toml
from xushi.base.errors import XushiError
from xushi.base.files import sha256_json
from xushi.data.config import DataConfig
from xushi.model.config import ModelConfig
from xushi.rl.config import RLConfig
from xushi.tokenizer.config import TokenizerConfig
from xushi.train.config import PretrainConfig, SFTConfig

# What a recipe may train, in order. Evaluation, export and report follow whatever was trained.
TRAINING_STAGES = ("data", "tokenizer", "pretrain", "sft", "rl")


def _check_digits(least: int, most: int) -> None:
    if not 2 <= least <= most:
        raise ValueError(f"digits go from min_digits={least} to max_digits={most}; give 2 or more, and no fewer at the "
                         "top than at the bottom")


class EnvironmentConfig(StrictConfig):
    """The reasoning environment: the digit sum modulo 10, instances of `min_digits` to `max_digits` digits."""

    min_digits: int = 4
    max_digits: int = 8
    transcripts: int = 0  # worked examples as plain text beside the pretraining text
    transcript_weight: float = 1.0  # how often their tokens are seen, relative to a source of weight 1

    @model_validator(mode="after")
    def _sound(self) -> "EnvironmentConfig":
        _check_digits(self.min_digits, self.max_digits)
        if self.transcripts < 0 or not self.transcript_weight > 0:
            raise ValueError("transcripts must not be negative and transcript_weight must be above 0")
        return self


class EvaluateConfig(StrictConfig):
    """What is measured at the end."""

    tasks: int = 200  # per measurement, none of them ever trained on
    samples: int = 8
    min_digits: int = 6  # the length of the tasks that are scored
    max_digits: int = 8
    longer_digits: int = 10  # tasks of one digit more than were trained up to this are scored apart
    max_tokens: int = 32
    xz_primed: bool = True  # xz given the training text first: about a second per MB of it

    @model_validator(mode="after")
    def _sound(self) -> "EvaluateConfig":
        _check_digits(self.min_digits, self.max_digits)
        if min(self.tasks, self.samples, self.max_tokens) < 1:
            raise ValueError("tasks, samples and max_tokens must be at least 1")
        return self


class Recipe(StrictConfig):
    """A whole run. `model` has no vocab_size and no token ids: those are the tokenizer's."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())

    name: str
    seed: int = 0
    threads: int | None = None  # None: as many as the machine has cores for us, at the first start
    stages: list[str] = Field(default_factory=lambda: list(TRAINING_STAGES))
    without: str | None = None  # the stage that this run leaves out, as a control
    data: DataConfig
    tokenizer: TokenizerConfig
    model: ModelConfig
    pretrain: PretrainConfig
    sft: SFTConfig | None = None
    rl: RLConfig | None = None
    environment: EnvironmentConfig | None = None
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _whole(self) -> "Recipe":
        for stage in self.stages:
            if stage not in TRAINING_STAGES:
                raise ValueError(f"there is no stage {stage!r}; the stages are {', '.join(TRAINING_STAGES)}")
        if not {"data", "tokenizer", "pretrain"} <= set(self.stages):
            raise ValueError("stages must hold data, tokenizer and pretrain; a control run leaves one out by without")
        if "rl" in self.stages and "sft" not in self.stages:
            raise ValueError("stage rl needs stage sft before it; a control run leaves it out by without = \"sft\"")
        for stage in ("sft", "rl"):
            if stage in self.stages and (getattr(self, stage) is None or self.environment is None):
                raise ValueError(f"stage {stage} needs the tables [{stage}] and [environment]")
        if self.without is not None and self.without not in self.stages:
            raise ValueError(f"without = {self.without!r} is not one of this run's stages ({', '.join(self.stages)})")
        if self.pretrain.batch_tokens % self.data.sequence_length:
            raise ValueError(f"pretrain.batch_tokens={self.pretrain.batch_tokens} is not a multiple of "
                             f"data.sequence_length={self.data.sequence_length}")
        longest = max([self.data.sequence_length, *(part.sequence_length for part in (self.sft, self.rl) if part)])
        if longest > self.model.max_position_embeddings:
            raise ValueError(f"a sequence of {longest} tokens exceeds model.max_position_embeddings="
                             f"{self.model.max_position_embeddings}")
        return self

    def runs(self, stage: str) -> bool:
        """Whether this run trains `stage`."""
        return stage in self.stages and stage != self.without

    def to_toml(self) -> str:
        """The resolved recipe, every default spelled out; keys that are None are left out."""
        table = _without_none(self.model_dump(mode="json"))
        table["model"].setdefault("q_lora_rank", 0)
        return tomli_w.dumps(table)

    @property
    def hash(self) -> str:
        """SHA-256 of the resolved recipe."""
        return sha256_json(self.model_dump(mode="json"))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_none(inner) for inner in value]
    return value


def load_recipe(path: Path, assignments: list[str], text: str | None = None, stages: list[str] | None = None,
                without: str | None = None) -> Recipe:
    """Read a recipe and apply `--set`, `--text`, `--stages` and `--without` to it.

    `text` replaces the sources by one of kind text and leaves out the environment's transcripts unless they are
    needed by a later stage.
    """
    table = read_toml(path)
    if text is not None:
        _use_text(table, text, stages)
    if stages is not None:
        table["stages"] = stages
    if without is not None:
        table["without"] = without
    for assignment in assignments:
        override(table, assignment)
    return parse(Recipe, table, str(path))


def _use_text(table: dict[str, Any], text: str, stages: list[str] | None) -> None:
    if not text.strip():
        raise XushiError("--text is empty", "give a file, a directory or a pattern such as '~/notes/**/*.md'")
    data = table.setdefault("data", {})
    if not isinstance(data, dict):
        raise XushiError("data is not a table", "write it as [data]")
    data["sources"] = [{"name": "text", "kind": "text", "glob": text}]
    table["name"] = "text"
    if stages is not None and "sft" not in stages:
        table.pop("environment", None)
