"""The typed description of a whole run, composed of the packages' own configs.

A recipe may name classes of files: an environment as `kind = "game.py:Counting"`, a stage as an
entry "file.py:Class" of `stages`. Their tables then belong to the recipe like all others.
"""

import re
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import tomli_w
from pydantic import ConfigDict, Field, PrivateAttr, ValidationError, create_model, model_validator

from xushi.base.config import StrictConfig, override, parse, read_toml
from xushi.base.errors import BadInput
from xushi.base.files import sha256_json
from xushi.base.plugins import code_of, is_file_spec, load_class
from xushi.data.config import DataConfig
from xushi.envs import ENVIRONMENTS, Environment, environment_class
from xushi.evaluate.config import EvaluateConfig
from xushi.model.config import ModelConfig
from xushi.rl.config import RLConfig
from xushi.run.recipe_files import collect_files, file_specs
from xushi.run.stages import RECIPE_STAGES, STAGES, Stage, in_order
from xushi.run.stages.tokenizer import TrainTokenizer
from xushi.tokenizer.config import TokenizerConfig
from xushi.train.config import LayoutConfig, PretrainConfig, SFTConfig

# Names in results.json, the tracking store or among processes that no stage may have.
_RESERVED = {"run", "end", "total", "this_start", "machine", "memory"}

# A model's config has these and a recipe's does not: they follow from the tokenizer.
_OF_THE_TOKENIZER = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")


class EnvironmentTable(StrictConfig):
    """The environment of a run: these keys and, beside them, those of the environment's
    `Config`.
    """

    # The class that `kind` names. Each class has a subclass of this one, made by `_table_of`.
    environment: ClassVar[type[Environment]]

    kind: str = Field(max_length=1000)  # a name, or "file.py:Class"
    # Episodes as plain text beside the pretraining text.
    transcripts: int = Field(0, ge=0, le=100_000_000)
    # How often the transcripts' tokens are seen, relative to a source of weight 1.
    transcript_weight: float = Field(1.0, ge=1e-6, le=1e6)
    # The class's version or its file's hash. It is set when the recipe is read.
    code: str = ""

    def make(self, changes: Mapping[str, Any] | None = None) -> Environment:
        """The environment, with other values of its own keys where `changes` has them."""
        config = self.environment.Config
        own = {name: getattr(self, name) for name in config.model_fields}
        return self.environment(config.model_validate(own | dict(changes or {})))


@cache
def _table_of(environment: type[Environment]) -> type[EnvironmentTable]:
    """The type of the table [environment] for one environment: the common keys and its own."""
    name = f"{environment.__name__}Table"
    return type(
        name,
        (EnvironmentTable, environment.Config),
        {"environment": environment, "__module__": __name__, "__doc__": environment.__doc__},
    )


class Recipe(StrictConfig):
    """A whole run. `model` has no vocab_size and no token ids: those follow from the tokenizer.

    Where a recipe names an environment or stages from files, its type is a subclass that has their
    tables as fields.
    """

    model_config = ConfigDict(protected_namespaces=())

    # Stages from files, by their entry in `stages`.
    file_stages: ClassVar[Mapping[str, type[Stage]]] = {}
    # Where the recipe's files are, by the name that the recipe gives them.
    _files: dict[str, Path] = PrivateAttr(default_factory=dict)

    name: str = Field(max_length=100)
    seed: int = Field(0, ge=-(1 << 63), lt=1 << 63)
    # None: as many as there are cores for this process, at the first start.
    threads: int | None = Field(None, ge=1, le=10_000)
    # Where it trains; auto: on the GPU where there is one.
    device: Literal["auto", "cpu", "cuda"] = "auto"
    stages: list[str] = Field(default_factory=lambda: list(RECIPE_STAGES), max_length=100)
    without: str | None = None  # the stage that this run leaves out, as a control
    data: DataConfig
    tokenizer: TokenizerConfig
    model: ModelConfig
    pretrain: PretrainConfig
    sft: SFTConfig | None = None
    rl: RLConfig | None = None
    environment: EnvironmentTable | None = None
    evaluate: EvaluateConfig = EvaluateConfig()
    # How the run is spread over processes; it does not change what the run is.
    layout: LayoutConfig = LayoutConfig()

    @model_validator(mode="before")
    @classmethod
    def _tokenizer_decides(cls, table: Any) -> Any:
        model = table.get("model") if isinstance(table, dict) else None
        for key in _OF_THE_TOKENIZER:
            if isinstance(model, dict) and key in model:
                raise ValueError(f"model.{key} cannot be set: it follows from the tokenizer")
        return table

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(
                f"name = {self.name!r} cannot name a directory; use letters, digits, '_', '.' and "
                "'-'"
            )
        named = self._named_stages()
        names = [stage.name for stage in named]
        if self.without is not None and self.without not in names:
            raise ValueError(
                f"without = {self.without!r} is not one of this run's stages ({', '.join(names)})"
            )
        self._check_environment()
        in_order(named)
        for stage in named:
            stage.check(self)
            if stage.needs_environment and self.environment is None:
                raise ValueError(f"stage {stage.name} needs the table [environment]")
        return self

    def _named_stages(self) -> list[type[Stage]]:
        known = {stage.name: stage for stage in STAGES if stage.in_recipe} | dict(self.file_stages)
        for name in self.stages:
            if name not in known:
                raise ValueError(
                    f"there is no stage {name!r}; the stages are {', '.join(RECIPE_STAGES)}, and "
                    "classes of files as file.py:Class"
                )
        return [known[name] for name in self.stages]

    def _check_environment(self) -> None:
        """The changes that evaluation makes to the environment's keys are sound."""
        if self.environment is None:
            return
        tables = {"environment": self.evaluate.environment, "longer": self.evaluate.longer}
        known = set(self.environment.environment.Config.model_fields)
        for name, changes in tables.items():
            for key in changes or {}:
                if key not in known:
                    raise ValueError(
                        f"evaluate.{name}.{key} is no key of the environment; its keys are "
                        f"{', '.join(sorted(known))}"
                    )
            try:
                self.environment.make(changes)
            except ValidationError as error:
                fault = error.errors()[0]
                key = ".".join(map(str, ["evaluate", name, *fault["loc"]]))
                message = fault["msg"].removeprefix("Value error, ")
                raise ValueError(f"{key}: {message}") from None

    @property
    def stage_classes(self) -> tuple[type[Stage], ...]:
        """All stages that may be part of this run, in order; `wanted` tells which are."""
        return in_order(self._named_stages())

    def run_stages(self) -> list[Stage]:
        """The stages of this run, in order."""
        return [stage(self) for stage in self.stage_classes if stage.wanted(self)]

    @property
    def sized_model(self) -> ModelConfig:
        """The model with the vocabulary that the run will have."""
        return self.model.model_copy(update={"vocab_size": TrainTokenizer(self).vocab_size})

    @property
    def rows(self) -> int:
        """The rows of a whole batch of pretraining."""
        return self.pretrain.batch_tokens // self.data.sequence_length

    def runs(self, stage: str) -> bool:
        """Whether the recipe names `stage` and does not leave it out."""
        return stage != self.without and any(s.name == stage for s in self._named_stages())

    def environments(self) -> Iterator[Environment]:
        """The environment as it is trained on, and as evaluation changes it."""
        if self.environment is None:
            return
        yield self.environment.make()
        yield self.environment.make(self.evaluate.environment)
        if self.evaluate.longer is not None:
            yield self.environment.make(self.evaluate.longer)

    @property
    def files(self) -> Mapping[str, Path]:
        """The Python files that the recipe names; a copy of each lies in the run directory."""
        return self._files

    def but(self, **changes: Any) -> "Recipe":
        """This recipe with other values, checked again: `recipe.but(**{"pretrain.steps": 10})`."""
        table = tomllib.loads(self.to_toml())
        for key, value in changes.items():
            *path, last = key.split(".")
            inner = table
            for part in path:
                inner = inner.setdefault(part, {})
                if not isinstance(inner, dict):
                    raise BadInput(f"{key}: {part} is not a table", "give a key of the recipe")
            inner[last] = value
        files = collect_files(table, Path.cwd(), self._files)
        return _parse_recipe(table, f"recipe {self.name}", files)

    def to_toml(self) -> str:
        """The resolved recipe with every default; keys that are None are left out."""
        table = _without_none(self.model_dump(mode="json"))
        for key in _OF_THE_TOKENIZER:
            table["model"].pop(key, None)
        table["model"].setdefault("q_lora_rank", 0)
        if "environment" in table:
            del table["environment"]["code"]
        return tomli_w.dumps(table)

    @property
    def hash(self) -> str:
        """SHA-256 of the resolved recipe and of the files that it named when it was read.

        layout and device are left out: any number of processes may continue a run.
        """
        return sha256_json(self._identity())

    @property
    def hash_without_places(self) -> str:
        """`hash` without the places of the text: what the files hold says what a run is."""
        identity = self._identity()
        for source in identity["recipe"]["data"]["sources"]:
            del source["glob"]
        return sha256_json(identity)

    def _identity(self) -> dict[str, Any]:
        table = self.model_dump(mode="json", exclude={"layout", "device"})
        code = {entry: code_of(stage) for entry, stage in self.file_stages.items()}
        return {"recipe": table, "code": code}


@cache
def _recipe_type(
    environment: type[Environment] | None, stages: tuple[tuple[str, type[Stage]], ...]
) -> type[Recipe]:
    """The type of recipes with this environment and these stages from files."""
    fields: dict[str, Any] = {}
    if environment is not None:
        fields["environment"] = (_table_of(environment) | None, None)
    for _, stage in stages:
        if stage.Config is not None:
            required = any(key.is_required() for key in stage.Config.model_fields.values())
            default = Field() if required else Field(default_factory=stage.Config)
            fields[stage.name] = (stage.Config, default)
    if not fields and not stages:
        return Recipe
    made = create_model("Recipe", __base__=Recipe, __module__=__name__, **fields)
    made.file_stages = dict(stages)
    return made


def _parse_recipe(table: dict[str, Any], where: str, files: Mapping[str, Path]) -> Recipe:
    """`table` as a recipe; `files` has the Python files that it names."""
    environment = _environment_of(table, where, files)
    stages = [(spec, _file_stage(spec, where, files)) for spec in file_specs(table)]
    recipe = parse(_recipe_type(environment, tuple(stages)), table, where)
    recipe._files = dict(files)
    return recipe


def _file_stage(spec: str, where: str, files: Mapping[str, Path]) -> type[Stage]:
    """The stage that an entry of `stages` names by file."""
    file, _, name = spec.rpartition(":")
    stage: type[Stage] = load_class(f"{files[Path(file).name]}:{name}", Stage, Path())  # type: ignore[type-abstract]
    if missing := getattr(stage, "__abstractmethods__", None):
        raise BadInput(
            f"{where}: stage {spec} does not define {', '.join(sorted(missing))}",
            "define every abstract method of xushi.run.stages.Stage",
        )
    own = getattr(stage, "name", None)
    if not isinstance(own, str) or not own.isidentifier():
        raise BadInput(
            f"{where}: stage {spec} is named {own!r}",
            'set its class attribute name, such as name = "my_stage"',
        )
    if own in {other.name for other in STAGES} | set(Recipe.model_fields) | _RESERVED:
        raise BadInput(
            f"{where}: stage {spec} is named {own!r}, a name that is taken",
            "give the class another name",
        )
    return stage


def _environment_of(
    table: dict[str, Any], where: str, files: Mapping[str, Path]
) -> type[Environment] | None:
    """The class of the recipe's environment; sets `code` in its table."""
    own = table.get("environment")
    if not isinstance(own, dict):
        return None
    if "code" in own:
        raise BadInput(f"{where}: unknown key environment.code", "leave it out")
    kind = own.get("kind")
    if not isinstance(kind, str):
        raise BadInput(
            f"{where}: key environment.kind is missing",
            f"set it to {' or '.join(ENVIRONMENTS)}, or to a class of a file: game.py:Counting",
        )
    if not is_file_spec(kind):
        found = environment_class(kind, Path())
        own["code"] = f"{found.name} {found.version}"
        return found
    file = files[Path(kind.rpartition(":")[0]).name]
    loaded = environment_class(f"{file}:{kind.rpartition(':')[2]}", Path())
    own["code"] = code_of(loaded)
    return loaded


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_none(inner) for inner in value]
    return value


def load_recipe(
    path: Path,
    assignments: list[str],
    stages: list[str] | None = None,
    without: str | None = None,
) -> Recipe:
    """Read a recipe and apply `--stages`, `--without` and last `--set` to it."""
    table = read_toml(path)
    if stages is not None:
        drop_file_stages(table, path, stages)
        table["stages"] = stages
    if without is not None:
        table["without"] = without
    for assignment in assignments:
        override(table, assignment)
    return recipe_of(table, path)


def recipe_of(table: dict[str, Any], path: Path) -> Recipe:
    """The recipe in a table that was read from the file `path`."""
    files = collect_files(table, path.parent)
    return _parse_recipe(table, str(path), files)


def drop_file_stages(table: dict[str, Any], path: Path, stages: list[str]) -> None:
    """Remove the tables of stages from files that the recipe names and `stages` leaves out."""
    named = {"stages": table.get("stages", [])}
    files = collect_files(named, path.parent)
    kept = {
        Path(entry.rpartition(":")[0]).name + ":" + entry.rpartition(":")[2] for entry in stages
    }
    for spec in file_specs(named):
        if spec not in kept:
            table.pop(_file_stage(spec, str(path), files).name, None)
