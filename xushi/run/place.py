"""A run directory: where each stage's files are, and the records of the stages that are done.

A stage is done when `stages/<name>.json` holds the key of its inputs: the hash of what it reads of
the recipe, of the keys of the stages before it and of the files outside of the run directory that
those have read. The file is written last, so a kill leaves the stage undone.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from xushi.base.errors import BadInput
from xushi.base.files import read_json, sha256_json, write_json
from xushi.base.tracking import Tracking
from xushi.tokenizer import Tokenizer
from xushi.train import Layout

RUN_FORMAT = 3  # raised when the meaning of a run directory's files changes


@dataclass(frozen=True)
class RunPlace:
    """A run directory with its tracking store, and the processes that work in it."""

    directory: Path
    tracking: Tracking
    layout: Layout = field(default_factory=Layout)

    def path(self, *parts: str) -> Path:
        """A path inside the run directory."""
        return self.directory.joinpath(*parts)

    @property
    def corpus(self) -> Path:
        """The corpus: documents with their verdicts."""
        return self.path("data", "corpus")

    @property
    def read_files(self) -> Path:
        """The files that the corpus was made from, as they were."""
        return self.path("data", "read-files.json")

    @property
    def tokens(self) -> Path:
        """The corpus as token shards."""
        return self.path("data", "tokens")

    def checkpoints(self, stage: str) -> Path:
        """The checkpoints of a training stage."""
        return self.path("checkpoints", stage)

    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer."""
        return Tokenizer.load(self.path("tokenizer"))


@dataclass(frozen=True)
class StageRecord:
    """What a finished stage left: its key, the seconds it took, its numbers for results.json, and
    the hash of the files outside of the run directory that it has read; empty for none.
    """

    key: str
    seconds: float
    results: dict[str, Any]
    files: str = ""

    @property
    def after(self) -> str:
        """What the key of the next stage is chained with."""
        return sha256_json([self.key, self.files]) if self.files else self.key


def stage_key(name: str, reads: Mapping[str, Any], before: str) -> str:
    """The hash of a stage's inputs; `before` is `after` of the stage before it."""
    inputs = {"format": RUN_FORMAT, "stage": name, "reads": reads, "before": before}
    try:
        return sha256_json(inputs)
    except TypeError as error:
        raise BadInput(
            f"stage {name} keeps an attribute that cannot be hashed: {error}",
            "keep only values of the recipe as attributes, and make the rest in run",
        ) from None


def read_record(place: RunPlace, name: str) -> StageRecord | None:
    """The record of stage `name`; None if it was never finished here."""
    file = place.path("stages", f"{name}.json")
    if not file.exists():
        return None
    remedy = "remove it and run the same command again"
    table = read_json(file, remedy)
    types = {"key": str, "seconds": int | float, "results": dict, "files": str}
    if set(table) != set(types) or not all(isinstance(table[key], types[key]) for key in types):
        raise BadInput(f"{file} is not the record of a stage", remedy)
    return StageRecord(**table)


def write_record(place: RunPlace, name: str, record: StageRecord) -> None:
    """Mark stage `name` as done."""
    write_json(
        place.path("stages", f"{name}.json"),
        asdict(record),
    )
