"""The typed description of a whole run, composed of the rooms' own configs."""

import re
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import ConfigDict, Field, model_validator

from xushi.base.config import StrictConfig, override, parse, read_toml
from xushi.base.errors import BadInput
from xushi.base.files import sha256_json
from xushi.base.progress import say
from xushi.data.config import DataConfig, SourceConfig
from xushi.data.sources import read_source
from xushi.model.config import ModelConfig
from xushi.rl.config import RLConfig
from xushi.tokenizer.config import SMALLEST_VOCABULARY, TokenizerConfig
from xushi.train.config import LayoutConfig, PretrainConfig, SFTConfig

# What a recipe may train, in order. Evaluation, export and report follow whatever was trained.
TRAINING_STAGES = ("data", "tokenizer", "pretrain", "sft", "rl")

# How --text fits a recipe to a text that may be a thousandth of the recipe's own.
BYTES_PER_VOCABULARY_ENTRY = (
    100  # fewer, and most tokens are too rare to learn; a text allows several times as many
)
BYTES_PER_TOKEN = 2  # about what so small a vocabulary reaches
MOST_EPOCHS = 8  # passes over the text; see docs/run.md

# What a model's config has and a recipe's does not: these follow from the tokenizer.
_OF_THE_TOKENIZER = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")


def _check_digits(least: int, most: int) -> None:
    if not 2 <= least <= most:
        raise ValueError(
            f"digits go from min_digits={least} to max_digits={most}; give 2 or more, and no "
            "fewer at the "
            "top than at the bottom"
        )


class EnvironmentConfig(StrictConfig):
    """The reasoning environment: the digit sum modulo 10, instances of `min_digits` to `max_digits`
    digits.
    """

    min_digits: int = Field(4, ge=2, le=1000)
    max_digits: int = Field(8, ge=2, le=1000)
    # Worked examples as plain text beside the pretraining text.
    transcripts: int = Field(0, ge=0, le=100_000_000)
    # How often their tokens are seen, relative to a source of weight 1.
    transcript_weight: float = Field(1.0, ge=1e-6, le=1e6)

    @model_validator(mode="after")
    def _sound(self) -> "EnvironmentConfig":
        _check_digits(self.min_digits, self.max_digits)
        return self


class EvaluateConfig(StrictConfig):
    """What is measured at the end."""

    # Per measurement; none of them is ever trained on.
    tasks: int = Field(200, ge=1, le=10_000_000)
    samples: int = Field(8, ge=1, le=100_000)
    # The length of the tasks that are scored.
    min_digits: int = Field(6, ge=2, le=1000)
    max_digits: int = Field(8, ge=2, le=1000)
    # Tasks of one digit more than were trained, up to this many, are scored apart.
    longer_digits: int = Field(10, ge=0, le=1000)
    max_tokens: int = Field(32, ge=1, le=10_000_000)
    xz_primed: bool = True  # xz given the training text first: about a second per MB of it

    @model_validator(mode="after")
    def _sound(self) -> "EvaluateConfig":
        _check_digits(self.min_digits, self.max_digits)
        return self


class Recipe(StrictConfig):
    """A whole run. `model` has no vocab_size and no token ids: those are the tokenizer's."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())

    name: str = Field(max_length=100)
    seed: int = Field(0, ge=-(1 << 63), lt=1 << 63)
    # None: as many as the machine has cores for us at the first start.
    threads: int | None = Field(None, ge=1, le=10_000)
    device: Literal["auto", "cpu", "cuda"] = (
        "auto"  # where it trains; auto: on the GPU where there is one
    )
    stages: list[str] = Field(default_factory=lambda: list(TRAINING_STAGES), max_length=100)
    without: str | None = None  # the stage that this run leaves out, as a control
    data: DataConfig
    tokenizer: TokenizerConfig
    model: ModelConfig
    pretrain: PretrainConfig
    sft: SFTConfig | None = None
    rl: RLConfig | None = None
    environment: EnvironmentConfig | None = None
    evaluate: EvaluateConfig = EvaluateConfig()
    layout: LayoutConfig = (
        LayoutConfig()
    )  # how it is spread over processes; no part of what the run is

    @model_validator(mode="before")
    @classmethod
    def _tokenizer_decides(cls, table: Any) -> Any:
        model = table.get("model") if isinstance(table, dict) else None
        for key in _OF_THE_TOKENIZER:
            if isinstance(model, dict) and key in model:
                raise ValueError(
                    f"model.{key} is not a recipe's to set: it follows from the tokenizer"
                )
        return table

    @model_validator(mode="after")
    def _whole(self) -> "Recipe":
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(
                f"name = {self.name!r} cannot name a directory; use letters, digits, '_', '.' and "
                "'-'"
            )
        self._check_stages()
        self._check_lengths()
        self._check_balance()
        self._check_indexers()
        for stage in ("pretrain", "sft"):
            if self.model.is_v4 and getattr(getattr(self, stage), "qk_clip", None) is not None:
                raise ValueError(
                    f"{stage}.qk_clip is not for deepseek_v4, whose queries and keys are normed"
                )
        return self

    def _check_stages(self) -> None:
        for stage in self.stages:
            if stage not in TRAINING_STAGES:
                raise ValueError(
                    f"there is no stage {stage!r}; the stages are {', '.join(TRAINING_STAGES)}"
                )
        if not {"data", "tokenizer", "pretrain"} <= set(self.stages):
            raise ValueError(
                "stages must hold data, tokenizer and pretrain; a control run leaves one out by "
                "without"
            )
        if "rl" in self.stages and "sft" not in self.stages:
            raise ValueError(
                'stage rl needs stage sft before it; a control run leaves it out by without = "sft"'
            )
        for stage in ("sft", "rl"):
            if stage in self.stages and (getattr(self, stage) is None or self.environment is None):
                raise ValueError(f"stage {stage} needs the tables [{stage}] and [environment]")
        if self.without is not None and self.without not in self.stages:
            raise ValueError(
                f"without = {self.without!r} is not one of this run's stages "
                f"({', '.join(self.stages)})"
            )

    def _check_balance(self) -> None:
        """A router without a bias has the balance loss alone."""
        if self.model.has_router_bias or not any(
            self.model.is_moe(i) for i in range(self.model.num_hidden_layers)
        ):
            return
        for stage in ("pretrain", "sft"):
            config = getattr(self, stage)
            if stage in self.stages and not config.balance_weight and not config.allow_unbalanced:
                raise ValueError(
                    f"{stage} would train the experts of a {self.model.model_type} unbalanced: "
                    "its router "
                    f"has no bias and there is no balance loss; set {stage}.allow_unbalanced = "
                    "true if "
                    "that is wanted"
                )

    def _check_indexers(self) -> None:
        if self.pretrain.indexer_warmup_steps and not (
            self.model.has_indexer and self.pretrain.indexer_weight
        ):
            raise ValueError(
                "pretrain.indexer_warmup_steps needs a model with indexers (deepseek_v32, or "
                "deepseek_v4 "
                "with sparse layers) and an indexer_weight above 0"
            )

    def _check_lengths(self) -> None:
        for name in ("batch_tokens", "batch_tokens_first"):
            if (getattr(self.pretrain, name) or 0) % self.data.sequence_length:
                raise ValueError(
                    f"pretrain.{name}={getattr(self.pretrain, name)} is not a multiple of "
                    f"data.sequence_length={self.data.sequence_length}"
                )
        longest = max(
            [
                self.data.sequence_length,
                *(part.sequence_length for part in (self.sft, self.rl) if part),
            ]
        )
        if longest > self.model.max_position_embeddings:
            raise ValueError(
                f"a sequence of {longest} tokens exceeds model.max_position_embeddings="
                f"{self.model.max_position_embeddings}"
            )
        if self.environment is not None and "sft" in self.stages:
            digits = max(
                self.environment.max_digits, self.evaluate.max_digits, self.evaluate.longer_digits
            )
            worked = (
                2 * digits + 7
            )  # the number, its running sums, the answer and six special tokens
            if worked > self.model.max_position_embeddings:
                raise ValueError(
                    f"a worked answer to a number of {digits} digits takes {worked} tokens, more "
                    "than "
                    f"model.max_position_embeddings={self.model.max_position_embeddings}"
                )

    @property
    def rows(self) -> int:
        """Of pretraining's batch, when it is whole."""
        return self.pretrain.batch_tokens // self.data.sequence_length

    def runs(self, stage: str) -> bool:
        """Whether this run trains `stage`."""
        return stage in self.stages and stage != self.without

    def to_toml(self) -> str:
        """The resolved recipe, every default spelled out; keys that are None are left out."""
        table = _without_none(self.model_dump(mode="json"))
        table["model"] = {
            key: value for key, value in table["model"].items() if key not in _OF_THE_TOKENIZER
        }
        table["model"].setdefault("q_lora_rank", 0)
        return tomli_w.dumps(table)

    @property
    def hash(self) -> str:
        """SHA-256 of the resolved recipe, without layout and device: any number of processes may go
        on with a run.
        """
        return sha256_json(self.model_dump(mode="json", exclude={"layout", "device"}))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_none(inner) for inner in value]
    return value


def load_recipe(
    path: Path,
    assignments: list[str],
    text: str | None = None,
    stages: list[str] | None = None,
    without: str | None = None,
) -> Recipe:
    """Read a recipe and apply `--text`, `--stages`, `--without` and last `--set` to it.

    `text` replaces the sources by one of kind text, reads it once to fit vocabulary and steps to
    its size (see `_fit_to_text`), and leaves out the environment unless a later stage needs it.
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
        raise BadInput(
            "--text is empty", "give a file, a directory or a pattern such as '~/notes/**/*.md'"
        )
    for name in ("data", "tokenizer", "pretrain"):
        if not isinstance(table.setdefault(name, {}), dict):
            raise BadInput(f"{name} is not a table", f"write it as [{name}]")
    source = {"name": "text", "kind": "text", "glob": text}
    table["data"]["sources"] = [source]
    table["name"] = "text"
    alone = stages is not None and "sft" not in stages
    if alone:
        table.pop("environment", None)
    documents = read_source(SourceConfig.model_validate(source)).documents
    _fit_to_text(
        table["tokenizer"],
        table["pretrain"],
        sum(len(document.text.encode()) for document in documents),
        alone,
    )


def _fit_to_text(
    tokenizer: dict[str, Any], pretrain: dict[str, Any], size: int, alone: bool
) -> None:
    """Lower the vocabulary and, where the text is all that is trained on, the steps to what `size`
    bytes can use.

    Neither is ever raised, and `--set` has the last word. With few enough steps the measurements on
    held-out text come closer together, so that there is a curve to look at.
    """
    vocabulary, steps, batch = (
        tokenizer.get("vocab_size"),
        pretrain.get("steps"),
        pretrain.get("batch_tokens"),
    )
    said = []
    fitting = SMALLEST_VOCABULARY + size // BYTES_PER_VOCABULARY_ENTRY
    if isinstance(vocabulary, int) and vocabulary > fitting:
        tokenizer["vocab_size"] = fitting
        said.append(f"tokenizer.vocab_size {vocabulary} -> {fitting}")
    if alone and isinstance(steps, int) and isinstance(batch, int) and batch > 0:
        enough = max(1, MOST_EPOCHS * size // (BYTES_PER_TOKEN * batch))
        if steps > enough:
            warmup = pretrain.get("warmup_steps")
            pretrain |= {"steps": enough, "evaluate_every": max(1, enough // 10)}
            if isinstance(warmup, int):
                pretrain["warmup_steps"] = min(warmup, enough // 10)
            said.append(f"pretrain.steps {steps} -> {enough}, about {MOST_EPOCHS} passes over it")
    if said:
        say(f"text of {size:,} bytes: {'; '.join(said)} (--set overrides)")
