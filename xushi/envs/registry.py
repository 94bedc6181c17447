"""Environments by the name or the file that a recipe gives as `[environment] kind`."""

from pathlib import Path

from xushi.base.errors import BadInput
from xushi.base.plugins import is_file_spec, load_class
from xushi.envs.digit_sum import DigitSum
from xushi.envs.environment import Environment

ENVIRONMENTS: dict[str, type[Environment]] = {DigitSum.name: DigitSum}


def environment_class(kind: str, folder: Path) -> type[Environment]:
    """The environment of this name, or the class of "game.py:Counting", a file below `folder`.

    `BadInput` if there is none, and as `load_class`.
    """
    if is_file_spec(kind):
        return load_class(kind, Environment, folder)  # type: ignore[type-abstract]
    if kind not in ENVIRONMENTS:
        raise BadInput(
            f"there is no environment {kind!r}",
            f"use one of {', '.join(ENVIRONMENTS)}, or name a class of a file, such as "
            "game.py:Counting",
        )
    return ENVIRONMENTS[kind]
