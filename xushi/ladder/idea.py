"""An idea: a question about two commands, stated before anything runs.

Not here: running them (`jobs`), what the runs say (`verdict`).
"""

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from xushi.base.config import StrictConfig, parse, read_toml
from xushi.base.errors import BadInput
from xushi.base.files import sha256_file, sha256_json

BASELINE, VARIANT = "baseline", "variant"
ARMS = (BASELINE, VARIANT)
MOST_PAIRS = 64
_PLACEHOLDER = re.compile(r"\{([A-Za-z_][A-Za-z_0-9]*)\}")

Text = Annotated[str, Field(min_length=1, max_length=10_000)]
Value = Annotated[str, Field(max_length=1000)] | int | float


class Idea(StrictConfig):
    """`baseline` and `variant` are commands with {seed} and the keys of the rungs in braces. They
    print a JSON object as their last line of standard output, and `metric` is a key of it. Smaller
    is better, unless `higher_is_better`.

    `smallest_effect`: in units of the metric, what would not interest anybody. `sizes`: what {size}
    is at each rung, the smallest first; `rungs` gives keys of any other name. `pairs`: the most
    pairs of runs at a rung. `reads`: patterns of further files that the commands read, so that a
    change of one makes a new entry. `deadline_seconds`: of one run.
    """

    question: Text
    baseline: Text
    variant: Text
    metric: Text
    smallest_effect: float = Field(gt=0, le=1e12)
    higher_is_better: bool = False
    sizes: list[Value] = Field(default=[], max_length=8)
    rungs: list[dict[str, Value]] = Field(default=[], max_length=8)
    pairs: int = Field(default=8, ge=2, le=MOST_PAIRS)
    reads: list[Text] = Field(default=[], max_length=100)
    deadline_seconds: float = Field(default=86_400, gt=0, le=1e8)

    @model_validator(mode="after")
    def check_commands(self) -> "Idea":
        if self.sizes and self.rungs:
            raise ValueError("give sizes or rungs, not both")
        if self.baseline.split() == self.variant.split():
            raise ValueError("baseline and variant are the same command: the idea changes nothing")
        keys = {frozenset(rung) for rung in self.all_rungs()}
        if len(keys) > 1:
            raise ValueError("every rung must have the same keys")
        known = {"seed", *next(iter(keys))}
        if len(known) == len(next(iter(keys))):
            raise ValueError("rungs cannot set seed: the tool chooses the seeds")
        for arm in ARMS:
            command = getattr(self, arm)
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
            if unknown := sorted(used - known):
                raise ValueError(
                    f"{arm} has {{{unknown[0]}}}, which is no key of sizes or rungs; it can have "
                    "{seed} and the keys of the rungs"
                )
            if unused := sorted(known - used):
                raise ValueError(f"{arm} has no {{{unused[0]}}}, which the rungs give")
        return self

    def all_rungs(self) -> list[dict[str, Value]]:
        """The keys of each rung, the smallest first. Without sizes there is one rung without
        keys.
        """
        if self.sizes:
            return [{"size": size} for size in self.sizes]
        return self.rungs or [{}]

    def command(self, arm: str, rung: int, seed: int | str) -> list[str]:
        """The words of an arm's command. What a value has in it is never split or read by a
        shell.
        """
        values = self.all_rungs()[rung] | {"seed": seed}
        template = getattr(self, arm)
        return [
            _PLACEHOLDER.sub(lambda found: str(values[found[1]]), word)
            for word in shlex.split(template)
        ]


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
