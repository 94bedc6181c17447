"""Strict configuration: pydantic models that forbid unknown keys, read from TOML, overridden by
dotted keys.
"""

import difflib
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from xushi.base.errors import BadInput, XushiError


class StrictConfig(BaseModel):
    """Base of every config: unknown keys are errors, numbers are finite, values cannot be changed.

    A bound of one field is declared with it (`Field(ge=1, le=...)`), upper bounds included: a
    number that would hang or crash a later stage is refused when the recipe is read. A rule between
    fields is a validator.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


ConfigT = TypeVar("ConfigT", bound=BaseModel)

# Messages in TOML's terms instead of pydantic's. Braces are filled from the error's context.
_PLAIN = {
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be above {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be below {lt}",
    "finite_number": "must be a finite number",
    "too_short": "must hold {min_length} or more entries",
    "too_long": "must hold at most {max_length} entries",
    "string_too_short": "must have {min_length} or more characters",
    "string_too_long": "must have at most {max_length} characters",
    "literal_error": "must be {expected}",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be a text",
    "list_type": "must be a list",
    "dict_type": "must be a table",
    "model_type": "must be a table",
    "model_attributes_type": "must be a table",
}


def read_toml(
    path: Path,
    kind: str = "recipe",
    example: str = "give the path of a recipe, for example recipes/demo.toml",
) -> dict[str, Any]:
    """The table in a TOML file; a missing or malformed file is a `XushiError`, which calls it
    `kind` and says `example` of what to give.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{kind} {path} does not exist", example) from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"{kind} {path} cannot be read: {error}",
            "check the path, its permissions and its encoding (UTF-8)",
        ) from None
    except (ValueError, RecursionError) as error:  # also an integer of thousands of digits
        raise BadInput(
            f"{kind} {path} is not valid TOML: {error}",
            "correct that line; strings need quotes, lists need brackets",
        ) from None


def override(table: dict[str, Any], assignment: str) -> None:
    """Apply `dotted.key=value` to a nested table in place. The value is read as TOML; what is not
    TOML is a string.
    """
    key, sign, text = assignment.partition("=")
    if not sign or not key.strip():
        raise BadInput(
            f"--set {shorten(assignment)} is not of the form key=value",
            "write for example --set pretrain.steps=200",
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    except (ValueError, RecursionError) as error:
        raise BadInput(
            f"--set {shorten(assignment)} cannot be read: {error}", "give a smaller value"
        ) from None
    *path, last = key.strip().split(".")
    for place, part in enumerate(path, 1):
        inner = table.setdefault(part, {})
        if not isinstance(inner, dict):
            whole = f"give the whole list: --set '{'.'.join(path[:place])}=[...]'"
            raise BadInput(
                f"--set {shorten(assignment)}: {shorten(part)} is not a table",
                whole if isinstance(inner, list) else "see the keys with xushi run --dry-run",
            )
        table = inner
    table[last] = value


def shorten(value: object) -> str:
    """`value` as it is written, cut to 80 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write an integer of thousands of digits
        text = "a very long number"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text):,} characters)"


def _shown(part: int | str) -> str:
    """One part of a dotted key. Keys that need quotes in TOML are quoted."""
    text = str(part)
    return text if re.fullmatch(r"[\w-]{1,80}", text) else shorten(text)


def parse(
    model: type[ConfigT], table: dict[str, Any], where: str, remedy: str | None = None
) -> ConfigT:
    """Validate `table` as `model`. The first fault is a `BadInput` that names `where` and the
    dotted key. `remedy` says what to do where `table` does not come from a recipe.
    """
    try:
        return model.model_validate(table)
    except ValidationError as error:
        raise _as_xushi_error(error, model, where, remedy) from None


def _as_xushi_error(
    error: ValidationError, model: type[BaseModel], where: str, remedy: str | None
) -> XushiError:
    fault = error.errors()[0]
    key = ".".join(_shown(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        known = _fields_at(model, [str(part) for part in fault["loc"][:-1]])
        close = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1)
        known_keys = (
            f"did you mean {close[0]}?"
            if close
            else f"known keys there: {', '.join(sorted(known))}"
        )
        return BadInput(f"{where}: unknown key {key}", known_keys)
    if fault["type"] == "missing":
        return BadInput(
            f"{where}: key {key} is missing",
            remedy or "add it to the recipe, or give it with --set",
        )
    given = fault.get("input")
    shown = f" (got {shorten(given)})" if isinstance(given, str | int | float | bool) else ""
    plain = _PLAIN.get(fault["type"], fault["msg"].removeprefix("Value error, "))
    message = plain.format_map(_words(fault)) if fault["type"] in _PLAIN else plain
    return BadInput(
        f"{where}: {f'{key}: ' if key else ''}{message}{shown}",
        remedy or "correct that value in the recipe or with --set",
    )


def _words(fault: Mapping[str, Any]) -> dict[str, Any]:
    """The bounds in an error's context, as a person writes them: 0 for 0.0."""
    return {
        name: f"{value:g}" if isinstance(value, float) else value
        for name, value in fault.get("ctx", {}).items()
    }


def _fields_at(model: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        field = model.model_fields.get(part)
        if field is None:
            continue  # a list index or a union's tag
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        nested = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if nested:
            model = nested[0]
    return list(model.model_fields)
