"""Files of model directories that somebody else made: what is read must be a regular file of the
directory, of a bounded size, and JSON without repeated keys.

Not here: what the files mean (model_directory, model, tokenizer); files that xushi writes (files).
"""

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xushi.base.errors import BadInput

LARGEST_JSON = 100_000_000  # bytes; the limit of a safetensors header in the format itself
LARGEST_TEMPLATE = 1 << 20  # bytes; published ones have at most tens of thousands
DAMAGED = "get the file again, it is damaged"
FROM_ELSEWHERE = "the weights do not belong to this config.json; get both from one place"
OTHER_TOKENIZER = "the tokenizer does not belong to this model; get both from one place"
UNTRUSTED = "do not trust this checkpoint; get it from its publisher"


def shown(name: object) -> str:
    """A name from a file in a form that is safe in a message: printable, one line, at most 200
    characters and an ellipsis.
    """
    text = name if isinstance(name, str) and name.isprintable() and name else repr(name)
    return text if len(text) <= 200 else f"{text[:200]}..."


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn an error of the system while `file` is read into a `XushiError` that names it."""
    try:
        yield
    except FileNotFoundError:
        raise BadInput(
            f"{file} does not exist", "get the checkpoint again, a file is missing"
        ) from None
    except OSError as error:
        raise BadInput(f"{file} cannot be read: {error.strerror or error}", DAMAGED) from None


def checked_file(
    directory: Path, name: object, limit: int | None = None, within: str = ""
) -> tuple[Path, int]:
    """The path and size in bytes of a regular file of `directory`, or of its folder `within`, at
    most `limit` bytes large. A link must not lead out of the directory.
    """
    is_plain_name = (
        isinstance(name, str)
        and 0 < len(name) <= 255
        and not set(name) & set("/\\\0")
        and name not in (".", "..")
    )
    if not is_plain_name:
        raise BadInput(
            f"the index of {directory} names {shown(repr(name))}, which is not a file name of "
            "that directory",
            UNTRUSTED,
        )
    file = directory / within / str(name)
    if not Path(os.path.realpath(file)).is_relative_to(_root(directory)):
        raise BadInput(
            f"{shown(str(file))} is a link that leads out of its directory",
            "copy the files themselves into the directory (or download with --local-dir)",
        )
    with reading(file):
        status = os.stat(file)
    if not stat.S_ISREG(status.st_mode):
        raise BadInput(f"{file} cannot be read: it is not a file", DAMAGED)
    if limit is not None and status.st_size > limit:
        raise BadInput(
            f"{file} cannot be read: it has {status.st_size} bytes, the limit is {limit}",
            DAMAGED,
        )
    return file, status.st_size


def _root(directory: Path) -> Path:
    """Where links of `directory` may lead: into it or, from a snapshot in a Hugging Face cache,
    into the cache of the same model, which holds the files (models--NAME/blobs).
    """
    real = Path(os.path.realpath(directory))
    snapshots, model = real.parent, real.parent.parent
    is_cached = snapshots.name == "snapshots" and model.name.startswith("models--")
    return model if is_cached else real


def parse_json(raw: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `raw`. Anything else, or a repeated key, is a `XushiError` that names
    `where`.
    """
    try:
        table = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # decoding errors are ValueErrors
        raise BadInput(f"{where} cannot be read: {shown(str(error))}", DAMAGED) from None
    if not isinstance(table, dict):
        raise BadInput(f"{where} cannot be read: it is not a JSON object", DAMAGED)
    return table


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's table. A repeated key is a ValueError."""
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise ValueError(f"the key {shown(key)} occurs twice")
        table[key] = value
    return table


def read_published_json(directory: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of `directory`."""
    file, _ = checked_file(directory, name, LARGEST_JSON)
    with reading(file):
        raw = file.read_bytes()
    return parse_json(raw, str(file))
