"""What a source does not read, counted by reason with two examples; nothing is left out silently.

Not here: how it is decided (`files`, `sources`, `corpus`).
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from pydantic import Field

from xushi.base.config import StrictConfig

EXAMPLES = 2

# Files with these suffixes should be text; those with none of all these are looked into.
TEXT_SUFFIXES = frozenset(
    [
        ".c",
        ".cc",
        ".cpp",
        ".css",
        ".go",
        ".h",
        ".hpp",
        ".java",
        ".js",
        ".md",
        ".org",
        ".py",
        ".rs",
        ".rst",
        ".sh",
        ".tex",
        ".toml",
        ".ts",
        ".txt",
        ".yaml",
        ".yml",
    ]
)
# What only programs read as text, by the reason it is left out for.
_SUFFIXES = {
    "tables": (
        ".jsonl",
        ".ndjson",
        ".json",
        ".csv",
        ".tsv",
        ".parquet",
        ".arrow",
        ".html",
        ".htm",
        ".xhtml",
        ".xml",
        ".svg",
        ".ipynb",
        ".rtf",
        ".sqlite",
        ".db",
    ),
    "packed": (
        ".gz",
        ".tgz",
        ".bz2",
        ".xz",
        ".zst",
        ".lz4",
        ".zip",
        ".7z",
        ".rar",
        ".tar",
        ".jar",
        ".whl",
    ),
    "formatted": (
        ".pdf",
        ".doc",
        ".docx",
        ".odt",
        ".ppt",
        ".pptx",
        ".odp",
        ".xls",
        ".xlsx",
        ".ods",
        ".epub",
        ".mobi",
        ".ps",
        ".djvu",
    ),
}
NOT_TEXT = {suffix: reason for reason, suffixes in _SUFFIXES.items() for suffix in suffixes}


class Reason(NamedTuple):
    """What is left out for one reason, as one and as several, and what a user can do about it."""

    one: str
    several: str
    remedy: str = ""

    def counted(self, count: int) -> str:
        """ "1 binary file", "2 binary files"."""
        return f"{count:,} {self.one if count == 1 else self.several}"


REASONS = {
    "excluded": Reason("file excluded by a pattern", "files excluded by patterns"),
    "hidden": Reason("hidden file or directory", "hidden files and directories"),
    "runs": Reason("run directory of xushi", "run directories of xushi"),
    "special": Reason(
        "broken link, special file or own output", "broken links, special files and own output"
    ),
    "tables": Reason(
        "table or markup file",
        "table and markup files",
        "convert to plain text, or to JSONL or Parquet for a recipe's source of that kind",
    ),
    "packed": Reason("compressed file", "compressed files", "unpack first"),
    "formatted": Reason(
        "PDF or office document", "PDF and office documents", "convert to plain text first"
    ),
    "binary": Reason("binary file", "binary files"),
    "not_utf8": Reason(
        "file that is not UTF-8", "files that are not UTF-8", "convert with iconv -t utf-8"
    ),
    "unreadable": Reason(
        "file that may not be read", "files that may not be read", "change the permissions"
    ),
    "other_kind": Reason("file of another kind", "files of another kind"),
    "empty": Reason("document without text", "documents without text"),
    "duplicates": Reason("document with the text of another", "documents with the text of another"),
}
"""The keys are those of `data.left_out` in results.json."""


class LeftOut(StrictConfig):
    """How many were left out for one reason of `REASONS`, and the first of them by name."""

    reason: str
    count: int = Field(ge=1)
    examples: list[str]


class LeftOutList:
    """Collects names by reason, beginning with what `before` has, and keeps the first ones."""

    def __init__(self, before: Iterable[LeftOut] = ()) -> None:
        listed = list(before)
        self._counts = {each.reason: each.count for each in listed}
        self._examples = {each.reason: list(each.examples) for each in listed}

    def add(self, reason: str, name: str) -> None:
        """Count one more, by its name inside the source."""
        assert reason in REASONS
        self._counts[reason] = self._counts.get(reason, 0) + 1
        examples = self._examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            examples.append(name)

    def listed(self) -> list[LeftOut]:
        """In the order of `REASONS`."""
        return [
            LeftOut(reason=reason, count=self._counts[reason], examples=self._examples[reason])
            for reason in REASONS
            if reason in self._counts
        ]


def counts(lists: Iterable[Iterable[LeftOut]]) -> dict[str, int]:
    """The count of every reason, 0 included, over several sources."""
    totals = dict.fromkeys(REASONS, 0)
    for left_out in (each for one in lists for each in one):
        totals[left_out.reason] += left_out.count
    return totals


def sentence(left_out: LeftOut) -> str:
    """One line: how many of what, examples and what to do."""
    reason = REASONS[left_out.reason]
    such_as = "such as " if left_out.count > len(left_out.examples) else ""
    remedy = f"; {reason.remedy}" if reason.remedy else ""
    names = " and ".join(left_out.examples)
    return f"left out: {reason.counted(left_out.count)} ({such_as}{names}){remedy}"


def in_short(totals: Mapping[str, int]) -> str:
    """All counts in one phrase: "500 binary files, 3 hidden files and directories"."""
    return ", ".join(REASONS[reason].counted(count) for reason, count in totals.items() if count)
