"""An idea: a question about two commands, or about two versions of a recipe, stated before anything
runs.

Not here: running them (`jobs`), what the runs say (`verdict`).
"""

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tomli_w
from pydantic import Field, model_validator

from xushi.base.config import StrictConfig, parse, read_toml
from xushi.base.errors import BadInput
from xushi.base.files import sha256_file, sha256_json

BASELINE, VARIANT = "baseline", "variant"
ARMS = (BASELINE, VARIANT)
ARM = "xushi-arm"  # stands for the program of this Python that trains and measures a recipe
MOST_PAIRS = 64
_PLACEHOLDER = re.compile(r"\{([A-Za-z_][A-Za-z_0-9]*)\}")

Text = Annotated[str, Field(min_length=1, max_length=10_000)]
Value = Annotated[str, Field(max_length=1000)] | int | float


class Idea(StrictConfig):
    """`baseline` and `variant` are commands with {seed} and the keys of the rungs in braces. They
    print a JSON object as their last line of standard output, and `metric` is a key of it. Smaller
    is better, unless `higher_is_better`.

    With `recipe`, a file, they are tables of its keys with other values; the keys of the rungs are
    keys of the recipe too, and what is printed is that of `xushi.ladder.arm`.

    `smallest_effect`: in units of the metric, what would not interest anybody. `sizes`: what {size}
    is at each rung, the smallest first; `rungs` gives keys of any other name. `pairs`: the most
    pairs of runs at a rung. `reads`: patterns of further files that the commands read, so that a
    change of one makes a new entry. `deadline_seconds`: of one run.
    """

    question: Text
    recipe: Text | None = None
    baseline: Text | dict[str, Any] = Field(default={})
    variant: Text | dict[str, Any]
    metric: Text
    smallest_effect: float = Field(gt=0, le=1e12)
    higher_is_better: bool = False
    sizes: list[Value] = Field(default=[], max_length=8)
    rungs: list[dict[str, Any]] = Field(default=[], max_length=8)
    pairs: int = Field(default=8, ge=2, le=MOST_PAIRS)
    reads: list[Text] = Field(default=[], max_length=100)
    deadline_seconds: float = Field(default=86_400, gt=0, le=1e8)

    @model_validator(mode="after")
    def check(self) -> "Idea":
        if self.sizes and self.rungs:
            raise ValueError("give sizes or rungs, not both")
        keys = {frozenset(rung) for rung in self.all_rungs()}
        if len(keys) > 1:
            raise ValueError("every rung must have the same keys")
        if "seed" in next(iter(keys)):
            raise ValueError("rungs cannot set seed: the tool chooses the seeds")
        if self.recipe is None:
            self._check_commands(set(next(iter(keys))))
        else:
            self._check_tables(set(next(iter(keys))))
        return self

    def _check_commands(self, rung_keys: set[str]) -> None:
        for arm in ARMS:
            command = getattr(self, arm)
            if not isinstance(command, str):
                missing = f"{arm} is missing" if not command else f"{arm} is a table"
                raise ValueError(f"{missing}; give a command, or recipe = FILE and tables of keys")
            if "\0" in command:
                raise ValueError(f"{arm} is not a command: it has a zero byte")
            try:
                shlex.split(command)
            except ValueError as error:
                raise ValueError(f"{arm} is not a command: {error}") from None
            used = set(_PLACEHOLDER.findall(command))
            if "seed" not in used:
                raise ValueError(
                    f"{arm} has no {{seed}}: without seeds nothing can be told from chance"
                )
            if unknown := sorted(used - rung_keys - {"seed"}):
                raise ValueError(
                    f"{arm} has {{{unknown[0]}}}, which is no key of sizes or rungs; it can have "
                    "{seed} and the keys of the rungs"
                )
            if unused := sorted(rung_keys - used):
                raise ValueError(f"{arm} has no {{{unused[0]}}}, which the rungs give")
        for rung in self.rungs:
            for key, value in rung.items():
                if isinstance(value, bool) or not isinstance(value, str | int | float):
                    raise ValueError(f"rungs: {key} must be a text or a number")
        if str(self.baseline).split() == str(self.variant).split():
            raise ValueError("baseline and variant are the same command: the idea changes nothing")

    def _check_tables(self, rung_keys: set[str]) -> None:
        if self.sizes:
            raise ValueError("a recipe has no {size}; give rungs, tables of its keys")
        for arm in ARMS:
            table = getattr(self, arm)
            if not isinstance(table, dict):
                raise ValueError(f"{arm} is a command, but recipe is given; give a table of keys")
            keys = _flat(table)
            if both := sorted(set(keys) & rung_keys):
                raise ValueError(f"{arm} sets {both[0]}, which the rungs set")
            if "seed" in keys:
                raise ValueError(f"{arm} cannot set seed: the tool chooses the seeds")
        if self.baseline == self.variant:
            raise ValueError("baseline and variant set the same: the idea changes nothing")

    def all_rungs(self) -> list[dict[str, Any]]:
        """The keys of each rung, the smallest first. Without sizes there is one rung without
        keys.
        """
        if self.sizes:
            return [{"size": size} for size in self.sizes]
        return [_flat(rung) for rung in self.rungs] or [{}]

    def shown(self, arm: str) -> str:
        """An arm for a person: its command, or its recipe and the keys that it sets."""
        given = getattr(self, arm)
        if isinstance(given, str):
            return given
        keys = [f"{key} = {_toml(value)}" for key, value in _flat(given).items()]
        return f"{self.recipe} with {', '.join(keys)}" if keys else f"{self.recipe} as it is"

    def command(self, arm: str, rung: int, seed: int | str) -> list[str]:
        """The words of an arm's command. What a value has in it is never split or read by a
        shell. With a recipe the first word is `ARM`.
        """
        values = self.all_rungs()[rung] | {"seed": seed}
        if self.recipe is not None:
            keys = {**_flat(getattr(self, arm)), **values}
            return [ARM, self.recipe, *(f"{key}={_toml(keys[key])}" for key in sorted(keys))]
        return [
            _PLACEHOLDER.sub(lambda found: str(values[found[1]]), word)
            for word in shlex.split(getattr(self, arm))
        ]


def _flat(table: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Dotted keys: {"pretrain": {"steps": 1}} and {"pretrain.steps": 1} are the same."""
    keys: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            keys |= _flat(value, f"{before}{key}.")
        else:
            keys[before + key] = value
    return keys


def _toml(value: Any) -> str:
    """A value as `--set` reads it, on one line."""
    if isinstance(value, dict):
        pairs = (f"{_toml(str(key))} = {_toml(inner)}" for key, inner in value.items())
        return f"{{ {', '.join(pairs)} }}"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return tomli_w.dumps({"value": value}).partition("=")[2].strip()


def read_idea(path: Path) -> Idea:
    """The idea in a TOML file; anything else is a `XushiError`."""
    table = read_toml(path, "idea", "give the path of an idea, such as ideas/muon.toml")
    return parse(Idea, table, str(path), "correct it in the idea; docs/ladder.md has its keys")


def files_read(idea: Idea, directory: Path, arms: Sequence[str] = ARMS) -> dict[str, str]:
    """The SHA-256 of each file that the command of one of `arms` names at a rung, or that a pattern
    in `reads` matches, by its name. A file whose name has the seed in it needs a pattern.
    """
    rungs = range(len(idea.all_rungs()))
    words = {word for arm in arms for rung in rungs for word in idea.command(arm, rung, "{seed}")}
    words |= {word.partition("=")[2] for word in words}  # --config=FILE
    named = [Path(word) for word in words if word and os.path.isfile(directory / word)]
    for pattern in idea.reads:
        found = (
            [path for path in directory.glob(pattern) if path.is_file()]
            if _is_inside(pattern)
            else []
        )
        if not found:
            raise BadInput(
                f"reads has {pattern!r}, which matches no file in {directory}",
                "correct the pattern; it begins at the current directory",
            )
        named += [path.relative_to(directory) for path in found]
    return {str(path): sha256_file(directory / path) for path in sorted(set(named))}


def _is_inside(pattern: str) -> bool:
    return not os.path.isabs(pattern) and ".." not in pattern.split("/")


def entry_hash(idea: Idea, files: dict[str, str]) -> str:
    """What makes a question the same question: everything that it states, and the files that its
    commands read.
    """
    table: dict[str, Any] = idea.model_dump()
    return sha256_json({"idea": table, "files": files})
