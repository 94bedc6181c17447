"""File names as text: printable in any locale, and read back exactly."""

import os
import subprocess
import sys
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
