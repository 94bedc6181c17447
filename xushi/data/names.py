r"""File names as text that can be printed, stored and read back: `\xNN` for a byte that is not
UTF-8 or of a control character, `\\` for a backslash. Not here: which files are read (`files`).
"""

import os
import re
from pathlib import Path

# Control characters, line ends, and marks that change the direction of writing.
_UNPRINTABLE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\\\udc80-\udcff]"
)
_ESCAPED = re.compile(r"\\(\\|x[0-9a-f]{2})")


def written(path: str | Path) -> str:
    """`path` as text without lone surrogates or control characters, whatever the locale is.

    Two paths that differ have different texts.
    """
    return _UNPRINTABLE.sub(_escape, _utf8(os.fsencode(path)))


def path_of(text: str) -> str:
    """The path that `written` gave `text`, as the functions of `os` take it.

    A backslash that begins no escape is itself.
    """
    name = _ESCAPED.sub(_unescape, text)
    return os.fsdecode(name.encode("utf-8", "surrogateescape"))


def _utf8(name: bytes) -> str:
    """Bytes that are not UTF-8 become lone surrogates, as Python has them in a UTF-8 locale."""
    return name.decode("utf-8", "surrogateescape")


def _escape(match: re.Match[str]) -> str:
    character = match.group()
    if character == "\\":
        return r"\\"
    return "".join(rf"\x{byte:02x}" for byte in character.encode("utf-8", "surrogateescape"))


def _unescape(match: re.Match[str]) -> str:
    escape = match.group(1)
    return "\\" if escape == "\\" else _utf8(bytes([int(escape[1:], 16)]))
