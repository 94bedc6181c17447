"""The recipe's `data` table: sources of text, their weights, sequence length, held-out share."""

import os
import re
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from xushi.base.config import StrictConfig, shorten
from xushi.base.errors import BadInput
from xushi.data.names import written


def canonical_package(name: str) -> str:
    """A distribution's normalized name, as the Python Packaging Authority defines it."""
    return re.sub(r"[-_.]+", "-", name).lower()


LONGEST_PATTERN = 4096  # Linux's longest path
Pattern = Annotated[str, Field(min_length=1, max_length=LONGEST_PATTERN)]


class SourceConfig(StrictConfig):
    """One source of documents.

    `glob` (text, jsonl, parquet): a pattern with `~` and `**`, a file, or a directory, which means
    all text files under it; relative to the current directory; or a list of these. `packages`:
    names of installed Python distributions. `field`: the text's key (jsonl) or column (parquet).
    `weight`: how often its tokens are seen, relative to a source of weight 1. `exclude`: `fnmatch`
    patterns on the posix path inside the source, or on a directory of it (`*` also matches `/`).
    Paths and patterns are as `names.written` writes them.
    """

    name: str = Field(max_length=100)
    kind: Literal["text", "jsonl", "parquet", "packages"]
    glob: Pattern | list[Pattern] | None = Field(None, max_length=100_000)
    packages: list[str] = Field(default_factory=list, max_length=10_000)
    field: str = Field("text", max_length=1000)
    weight: float = Field(1.0, ge=1e-6, le=1e6)  # a source that should have no weight is left out
    exclude: list[str] = Field(default_factory=list, max_length=10_000)

    @field_validator("name")
    @classmethod
    def _file_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise ValueError(
                "a source's name may have only letters, digits, '_', '.' and '-', since files are "
                "named after it"
            )
        return name

    @property
    def globs(self) -> list[str]:
        """The entries of `glob`."""
        return [self.glob] if isinstance(self.glob, str) else list(self.glob or [])

    @model_validator(mode="after")
    def _one_place(self) -> "SourceConfig":
        if self.kind == "packages":
            if not self.packages or self.glob is not None:
                raise ValueError('kind "packages" needs packages = [...] and no glob')
            if len({canonical_package(name) for name in self.packages}) < len(self.packages):
                raise ValueError("packages names one distribution twice")
        elif not self.glob or self.packages:
            raise ValueError(f'kind "{self.kind}" needs glob = "..." and no packages')
        return self


def text_source(paths: Sequence[str], exclude: Sequence[str] = ()) -> SourceConfig:
    """The source of text files that the PATHs of a command mean, as absolute paths: so they mean
    the same from another directory.
    """
    if not all(path.strip() for path in paths):
        raise BadInput("a PATH is empty", "give a file, a directory or a pattern")
    globs = [written(os.path.abspath(os.path.expanduser(path))) for path in paths]
    patterns = [written(pattern) for pattern in exclude]
    for name in globs + patterns:
        if len(name) > LONGEST_PATTERN:
            raise BadInput(f"{shorten(name)} is too long a name", "give a shorter path")
    return SourceConfig(name="text", kind="text", glob=globs, exclude=patterns)


class DataConfig(StrictConfig):
    """`sequence_length`: in tokens. `heldout`: the share of bytes held out for evaluation. `salt`
    decides which ones.
    """

    sources: list[SourceConfig] = Field(min_length=1, max_length=1000)
    sequence_length: int = Field(ge=2, le=10_000_000)
    heldout: float = Field(0.065, ge=0.05, le=0.08)
    salt: str = Field("xushi", max_length=1000)

    @model_validator(mode="after")
    def _different_names(self) -> "DataConfig":
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two sources have the name {name!r}")
        return self
