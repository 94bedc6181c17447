"""What a stage of a run is: one class that declares what it reads, runs, costs and returns.

The runner, replay, estimate and report ask the stages; only `xushi.run.stages` lists them. A stage
from somebody's own file is named in a recipe's `stages` as "file.py:Class".
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel

from xushi.base.config import StrictConfig
from xushi.base.plugins import code_of
from xushi.run.place import RunPlace
from xushi.train import Layout

if TYPE_CHECKING:
    from xushi.run.recipe import Recipe

Unit = Literal["count", "size", "percent", "digits"]


class Fact(NamedTuple):
    """One number of results.json as part of a sentence: "{} documents" for the key
    data.documents.
    """

    key: str
    pattern: str
    unit: Unit = "count"


@dataclass(frozen=True)
class Costs:
    """What was measured here and now before a run, for the estimates of its stages. In seconds,
    `weights_bytes` and `heldout_tokens` apart.
    """

    training_token: float  # one token in a training step
    forward_token: float  # one token in evaluation
    data: float  # the corpus as it is made or found in the cache, and its overlap
    tokenizer: float  # the vocabulary, and the whole corpus in tokens
    compressors: float  # the corpus, as evaluation compresses it
    heldout_tokens: int
    weights_bytes: int


class Results(StrictConfig):
    """What a stage measured, in groups: field `steps` of group `rl` is key "rl.steps".

    A field that is None was not measured and has no key. A group may define its own `flat`.
    """

    def flat(self) -> dict[str, Any]:
        """The numbers under the dotted keys of results.json."""
        keys: dict[str, Any] = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Results):
                keys |= {f"{name}.{key}": inner for key, inner in value.flat().items()}
            elif value is not None:
                keys[name] = value
        return keys


class Stage(ABC):
    """One stage. A subclass takes from the recipe what it needs in `__init__` and keeps only that.

    name: the stage's name, and the name of its table in the recipe if it has one.
    title: what the report calls a built-in stage; one from a file it calls by its name.
    section: the id of the report's section about it.
    Config: the type of its table, for stages from a file.
    in_recipe: whether a recipe's `stages` names it and `without` may leave it out.
    required: whether a recipe's `stages` must name it.
    needs_environment: whether it needs the recipe's table [environment].
    follows: the stage that it directly follows, for one that no recipe names; "" for the end.
    facts: a built-in stage's numbers in one sentence, for the report.
    version: raised when the stage makes something else of the same inputs.
    """

    name: ClassVar[str]
    title: ClassVar[str] = ""
    section: ClassVar[str] = "numbers"
    Config: ClassVar[type[StrictConfig] | None] = None
    in_recipe: ClassVar[bool] = True
    required: ClassVar[bool] = False
    needs_environment: ClassVar[bool] = False
    follows: ClassVar[str] = ""
    facts: ClassVar[tuple[Fact, ...]] = ()
    version: ClassVar[int] = 1

    @abstractmethod
    def __init__(self, recipe: "Recipe") -> None:
        """Keep what `run` reads of the recipe, and nothing else, as attributes."""

    @classmethod
    def wanted(cls, recipe: "Recipe") -> bool:
        """Whether this run has the stage."""
        return recipe.runs(cls.name)

    @classmethod
    def check(cls, recipe: "Recipe") -> None:
        """Raise ValueError if the recipe names this stage and contradicts itself about it."""
        return

    def reads(self) -> dict[str, Any]:
        """What is hashed into the stage's key: every attribute, so that none can be forgotten, and
        the file's hash of a stage from a file.
        """
        kept = {name: _plain(value) for name, value in vars(self).items()}
        return {"version": self.version, "code": code_of(type(self)), **kept}

    @abstractmethod
    def run(self, place: RunPlace) -> Results:
        """Do the work. Where `together` holds, all processes call this alike."""

    def files_read(self, place: RunPlace) -> str:
        """The hash of the files outside of the run directory that `run` has read; "" for none."""
        return ""

    def files_changed(self, place: RunPlace) -> str:
        """How those files differ from what a finished `run` has read, in a phrase; "" if they do
        not.
        """
        return ""

    def prepare_again(self, place: RunPlace) -> None:
        """Called before what a finished `run` made is removed since its files changed: raise if it
        could not be made again.
        """
        return

    def check_layout(self, layout: Layout) -> None:
        """Raise `BadInput` if the stage cannot run on these processes. Asked before all stages."""
        return

    def together(self, layout: Layout) -> bool:
        """Whether all processes of `layout` run the stage; else the first one does alone."""
        return False

    def seconds(self, costs: Costs) -> float:
        """The estimated time; 0: not estimated."""
        return 0.0


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value
