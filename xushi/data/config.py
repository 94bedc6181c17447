"""The data part of a recipe: which texts, how much of each, how long a sequence, how much is held
out.
"""

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from xushi.base.config import StrictConfig


def canonical_package(name: str) -> str:
    """A distribution's name in its one normal form (PyPA's name normalization)."""
    return re.sub(r"[-_.]+", "-", name).lower()


class SourceConfig(StrictConfig):
    """One source of documents.

    `glob` (text, jsonl, parquet): a pattern with `~` and `**`, a file, or a directory, whose text
    files are then all taken; relative to the current directory. `packages`: names of installed
    Python distributions. `field`: the text's key (jsonl) or column (parquet). `weight`: how often
    its tokens are seen, relative to a source of weight 1. `exclude`: `fnmatch` patterns on the
    posix path inside the source (`*` also matches `/`).
    """

    name: str
    kind: Literal["text", "jsonl", "parquet", "packages"]
    glob: str | None = None
    packages: list[str] = Field(default_factory=list)
    field: str = "text"
    weight: float = 1.0
    exclude: list[str] = Field(default_factory=list)

    @field_validator("name")
    @classmethod
    def _file_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise ValueError(
                "a source's name is made of letters, digits, '_', '.' and '-': files are called "
                "after it"
            )
        return name

    @field_validator("weight")
    @classmethod
    def _positive(cls, weight: float) -> float:
        if not 0 < weight < float("inf"):
            raise ValueError("weight must be above 0; leave the source out to give it none")
        return weight

    @model_validator(mode="after")
    def _one_place(self) -> "SourceConfig":
        if self.kind == "packages":
            if not self.packages or self.glob is not None:
                raise ValueError('kind "packages" needs packages = [...] and no glob')
            if len({canonical_package(name) for name in self.packages}) < len(self.packages):
                raise ValueError("packages names a distribution twice")
        elif not self.glob or self.packages:
            raise ValueError(f'kind "{self.kind}" needs glob = "..." and no packages')
        return self


class DataConfig(StrictConfig):
    """`sequence_length` in tokens; `heldout` the fraction of bytes held out for evaluation; `salt`
    keys which.
    """

    sources: list[SourceConfig]
    sequence_length: int
    heldout: float = 0.065
    salt: str = "xushi"

    @model_validator(mode="after")
    def _sound(self) -> "DataConfig":
        names = [source.name for source in self.sources]
        if not names:
            raise ValueError("data.sources is empty: give at least one source")
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two sources are called {name!r}")
        if self.sequence_length < 2:
            raise ValueError("sequence_length must be at least 2")
        if not 0.05 <= self.heldout <= 0.08:
            raise ValueError("heldout must lie between 0.05 and 0.08")
        return self
