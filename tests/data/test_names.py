"""File names as text: printable in any locale, and read back exactly."""

import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xushi import data
from xushi.data.names import path_of, written


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("notes/诗.md".encode(), "notes/诗.md"),
        (b"\xd6\xd0.txt", r"\xd6\xd0.txt"),
        (rb"\xd6.txt", r"\\xd6.txt"),
        (b"a\nb\x7f", r"a\x0ab\x7f"),
        ("a\x9b\x85".encode(), r"a\xc2\x9b\xc2\x85"),  # C1: begins a command, ends a line
        ("\u2028\u202e.md".encode(), r"\xe2\x80\xa8\xe2\x80\xae.md"),  # line end, direction
        (b"\xe8\xaf", r"\xe8\xaf"),  # half a character
    ],
)
def test_how_names_are_written(name: bytes, text: str) -> None:
    assert written(os.fsdecode(name)) == text
    assert os.fsencode(path_of(text)) == name


@given(st.binary(max_size=12) | st.text("\\x0dab诗\n", max_size=8).map(str.encode))
def test_every_name_is_read_back(name: bytes) -> None:
    text = written(os.fsdecode(name))
    text.encode()  # no lone surrogates
    assert "\n" not in text and os.fsencode(path_of(text)) == name


def test_what_a_terminal_obeys_is_escaped_and_read_back() -> None:
    """By Unicode's own tables: control characters, line ends, and marks of direction."""
    marks = {"LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI"}
    for character in map(chr, [*range(1, 0xD800), *range(0xE000, 0x10000)]):
        obeyed = unicodedata.category(character) in ("Cc", "Zl", "Zp")
        if obeyed or unicodedata.bidirectional(character) in marks or character in "\u200e\u200f":
            assert written(character).isascii() and written(character).startswith("\\x")
            assert path_of(written(character)) == character
        elif character != "\\" and character != "\u061c":
            assert written(character) == character


def test_a_backslash_that_begins_no_escape_is_itself() -> None:
    assert path_of(r"a\b\x9") == r"a\b\x9"


def test_a_name_is_the_same_in_a_locale_without_utf8() -> None:
    script = (
        "import os, runpy, sys\n"
        f"names = runpy.run_path({str(Path(data.__file__).parent / 'names.py')!r})\n"
        "name = os.fsdecode(b'\\xe8\\xaf\\x97')\n"
        "assert len(name) == 3, 'each byte is a lone surrogate'\n"
        "text = names['written'](name)\n"
        "assert names['path_of'](text) == name\n"
        "sys.stdout.buffer.write(text.encode())"
    )
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=ascii_only, capture_output=True, check=True
    )
    assert done.stdout.decode() == "诗"
