"""What users and contributors read is plain English in the field's own terms.

Checked are docstrings, comments (Python and C++), error and progress messages, the command line's
help, and the pages. Words that only this project's authors would understand are refused; the table
says what to write instead. Names in code are not checked, only sentences.
"""

import ast
import functools
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent

# Records of what was decided and measured at some time. They keep their words.
RECORDS = ("lab-log.md", "decisions.md")

# A regular expression for a word or phrase, and what to write instead.
WORDS = {
    # The project is not a house.
    r"houses?": "project, package",
    r"rooms?(?! (?:for|to|left|in|on)\b)": "package; of memory: space",
    r"floors? \d": "leave it out",
    r"(?:its|own|this|each|every|lower|higher) floors?(?! (?:division|of))": "package, layer",
    r"floors": "package, layer",
    r"doors?": "command line, entry point",
    r"tenants?": "user, task",
    # The field has words for these.
    r"everyones": "gather, all-gather",
    r"firsts": "broadcast",
    r"pieces?(?! of )": "microbatch, item, chunk, part",
    r"piecewise": "say that an item is a row",
    r"(?:its|the|each|several|all|of|by) ways(?! (?:to|of|in)\b)": "ranks, groups",
    # Riddles.
    r"the way to step": "the records of steps 1 to",
    r"of which whole": "the full tensor that a shard is a part of",
    r"what (?:a|the) \w+ has not": "the fields that do not apply to",
    r"all else": "everything else",
    r"by the hour of": "the time changes from hour to hour",
    r"so many (?:tokens|steps|rows|bytes|items|processes)": "give the number a name",
    r"by number only": "say which constant is copied and why",
    r"(?<!there\s)is no (?:run|directory|file|number|stage|recipe|table|text)": "is not a",
    r"(?:is|are) whole(?= or| counts|[.,:;])|that is whole|appears? whole": "complete, not sharded",
    r"unfound|unwanted|to be had": "say it with a verb",
    r"correct these options": "name the options",
    # Words that an engineer does not use.
    r"anew": "again, restart",
    r"mend(?:s|ed|ing)?": "fix, correct",
    r"for want of": "without, too little",
    r"whatever (?:stands|lies|is|was) ": "any, regardless of",
    r"stand(?:s|ing)? (?:beside|there|together|side by side)": "is next to, is printed with",
    r"thrown out": "dropped, removed",
}


# Functions and exceptions whose string arguments a user reads.
SPEAKING = ("BadInput", "Failed", "XushiError", "ApiError", "Failure", "ValueError", "say", "print")


class Sentence(NamedTuple):
    """Text in which words are looked for, and the line that it begins on."""

    line: int
    text: str


def python_sentences(source: str) -> Iterator[Sentence]:
    """Docstrings, comments, messages and help texts of a Python file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield from strings(node.value)  # a docstring
        elif isinstance(node, ast.Call):
            if called(node) in SPEAKING:
                for argument in node.args:
                    yield from strings(argument)
            for keyword in node.keywords:
                if keyword.arg == "help":
                    yield from strings(keyword.value)
    yield from comments(
        (token.start[0], token.string.removeprefix("#"))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    )


def called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def strings(node: ast.AST) -> Iterator[Sentence]:
    """The string constants inside an expression; what an f-string inserts becomes a blank."""
    if isinstance(node, ast.JoinedStr):
        parts = [v.value if isinstance(v, ast.Constant) else " {} " for v in node.values]
        yield Sentence(node.lineno, "".join(map(str, parts)))
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield Sentence(node.lineno, node.value)
    else:
        for child in ast.iter_child_nodes(node):
            yield from strings(child)


def comments(lines: Iterator[tuple[int, str]]) -> Iterator[Sentence]:
    """Comments on neighbouring lines are one sentence, since a phrase may be wrapped."""
    first, text, last = 0, "", -1
    for number, comment in lines:
        if number != last + 1:
            if text:
                yield Sentence(first, text)
            first, text = number, ""
        text += comment + "\n"
        last = number
    if text:
        yield Sentence(first, text)


def cpp_sentences(source: str) -> Iterator[Sentence]:
    lines = enumerate(source.split("\n"), start=1)
    yield from comments((n, line.split("//", 1)[1]) for n, line in lines if "//" in line)


def page_sentences(source: str) -> Iterator[Sentence]:
    """The paragraphs of a page without its blocks of code."""
    prose = re.sub(
        r"^```.*?^```|^    .*?$|`[^`\n]*`",
        lambda block: re.sub(r"[^\n]", " ", block[0]),
        source,
        flags=re.MULTILINE | re.DOTALL,
    )
    line = 1
    for paragraph in re.split(r"(\n\s*\n)", prose):
        if paragraph.strip():
            yield Sentence(line, paragraph)
        line += paragraph.count("\n")


@functools.cache
def whole_words(pattern: str) -> re.Pattern[str]:
    """The pattern between word boundaries; a space in it also matches the end of a line."""
    return re.compile(rf"\b(?:{pattern})(?!\w)".replace(" ", r"\s+"), re.IGNORECASE)


def faults(sentences: Iterator[Sentence]) -> list[str]:
    """ "line: word, instead" of each private word."""
    found = []
    for sentence in sentences:
        for pattern, instead in WORDS.items():
            for match in whole_words(pattern).finditer(sentence.text):
                line = sentence.line + sentence.text.count("\n", 0, match.start())
                found.append(f"{line}: {' '.join(match[0].split())!r}; write: {instead}")
    return found


def checked_files() -> list[Path]:
    files = [path for end in ("py", "cpp", "h") for path in (ROOT / "xushi").rglob(f"*.{end}")]
    files += [
        *(ROOT / "bench").glob("*.py"),
        *(ROOT / "tools").glob("*.py"),
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").glob("*.md"),
    ]
    return [path for path in sorted(files) if path.name not in RECORDS]


def sentences_of(path: Path) -> Iterator[Sentence]:
    read = {".py": python_sentences, ".md": page_sentences}.get(path.suffix, cpp_sentences)
    return read(path.read_text(encoding="utf-8"))


def test_private_words_are_not_used() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{fault}"
        for path in checked_files()
        for fault in faults(sentences_of(path))
    ]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("suffix", "source", "line"),
    [
        (".py", '"""First line.\n\nA room of its own.\n"""\n', 3),
        (".py", "x = 1\n# what a\n# kind has not\n", 2),
        (".py", 'def f(a):\n    raise BadInput(f"{a} is no file", "mend it")\n', 2),
        (".py", 'X = 1\n"""Bytes of all\nelse."""\n', 2),
        (".py", 'f(typer.Option(help="start anew"))\n', 1),
        (".h", "int a;  // the pieces\n", 1),
        (".md", "# Title\n\n```\npieces\n```\n\nthe pieces\n", 7),
    ],
)
def test_a_private_word_is_found_with_its_line(
    tmp_path: Path, suffix: str, source: str, line: int
) -> None:
    path = tmp_path / f"file{suffix}"
    path.write_text(source)
    found = faults(sentences_of(path))
    assert found and all(fault.startswith(f"{line}: ") for fault in found)


def test_honest_uses_pass(tmp_path: Path) -> None:
    path = tmp_path / "file.py"
    path.write_text(
        '"""Pieces of text, by floor division: the cache has room for two. There is no file."""\n'
        "pieces = firsts(rooms)  # of the first rows\n"
        'name = "house"\n'
    )
    assert faults(sentences_of(path)) == []
