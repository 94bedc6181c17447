"""Whose a run directory is: one process at a time, and one recipe unless it is updated."""

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from xushi import __version__
from xushi.base.errors import BadInput, Failed
from xushi.base.files import disk_errors, read_json, remove_partials, write_atomic, write_json
from xushi.base.tracking import Tracking
from xushi.data.files import OWNER  # the run's format and its recipe's hash
from xushi.data.names import written
from xushi.run.changed import stages_to_run_again
from xushi.run.place import RUN_FORMAT, RunPlace, read_record
from xushi.run.recipe import Recipe, load_recipe
from xushi.run.stages.data import Data

RECIPE = "recipe.toml"  # written after the owner, so that a start without it has made nothing
LOCK = ".lock"


@contextlib.contextmanager
def own(directory: Path) -> Iterator[None]:
    """Hold the run directory against a second process; the lock ends with the process."""
    try:
        str(directory).encode()
    except UnicodeEncodeError:  # pyarrow and safetensors take no such path
        raise BadInput(
            f"the run directory {written(directory)} cannot be used: its name is not UTF-8",
            "choose another --out, or in a locale without UTF-8 set PYTHONUTF8=1",
        ) from None
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Failed(
                f"{directory} is in use by another xushi run",
                "wait for it, or choose another --out",
            ) from None
        yield
    finally:
        os.close(lock)


def kept_recipe(directory: Path, asked: str = "") -> Recipe | None:
    """The recipe that a run directory was made by; None if there is none that can be read, or if
    the run was begun by another command than `asked`.
    """
    file = directory / RECIPE
    if not (directory / OWNER).exists() or not file.exists():
        return None
    try:
        owner = read_json(directory / OWNER, "")
        return load_recipe(file, []) if asked in ("", owner.get("asked")) else None
    except BadInput:
        return None


def is_same_elsewhere(recipe: Recipe, kept: Recipe, directory: Path) -> bool:
    """Whether `recipe` differs from the run's only in where its text lies, which is the same as
    what the run has read, if it has read any.
    """
    place = RunPlace(directory, Tracking(None))
    if recipe.hash_without_places != kept.hash_without_places:
        return False
    if read_record(place, Data.name) is None:
        return True
    try:
        return not Data(recipe).files_changed(place)
    except BadInput:  # it is not there
        return False


def claim(recipe: Recipe, directory: Path, update: bool, asked: str = "") -> None:
    """Make a fresh directory this recipe's, or check that it is. `asked` is kept beside the recipe:
    the hash of the command that it was made for.

    The records of stages whose files changed go before the recipe is written, which may be fitted
    to the new files: a kill in between must not leave it beside what was read before. The owner's
    file is written before the recipe, by one rename: a directory in which a kill left nothing else
    belongs to nobody or to this recipe.
    """
    file = directory / OWNER
    if file.exists():
        _check_owner(file, recipe, update)
    elif any(not _is_leftover(path) for path in directory.iterdir()):
        raise BadInput(
            f"{directory} is not empty and is not a run directory", "choose another --out"
        )
    _remove_partials(directory)
    again = stages_to_run_again(recipe.run_stages(), RunPlace(directory, Tracking(None)), update)
    (directory / "results.json").unlink(missing_ok=True)  # they may be another recipe's
    for name in again:
        (directory / "stages" / f"{name}.json").unlink(missing_ok=True)
    for name in again[:1]:  # a new attempt; the keys of the others tell theirs
        (directory / "stages" / f"{name}.started").unlink(missing_ok=True)
    owner = {"format": RUN_FORMAT, "recipe_hash": recipe.hash, "version": __version__}
    write_json(file, owner | {"asked": asked})
    for name, source in recipe.files.items():
        if source.resolve() != (directory / name).resolve():
            write_atomic(directory / name, source.read_bytes())
    write_atomic(directory / RECIPE, recipe.to_toml())


def start_over(place: RunPlace, stage: str, key: str, later: Sequence[str]) -> None:
    """Remove what an attempt with other inputs left of a stage, and begin a new attempt.

    The records of `later` stages go too: they were made from what this stage had made before.
    """
    for name in (stage, *later):
        place.path("stages", f"{name}.json").unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(place.checkpoints(stage))
    place.tracking.begin(stage, key)
    write_atomic(place.path("stages", f"{stage}.started"), key)


def check_format(directory: Path) -> None:
    """Raise `BadInput` if another version of xushi made this run directory."""
    file = directory / OWNER
    if file.exists():
        _check_format(file, read_json(file, "restore it, or run the recipe again"))


def _remove_partials(directory: Path) -> None:
    """Remove what killed starts left beside a run's files, however young: under the run's lock no
    other start writes them.
    """
    for partial in [*directory.glob(".*.partial"), *directory.glob("stages/.*.partial")]:
        if found := re.fullmatch(r"\.(.+)\.\d+\.partial", partial.name):
            remove_partials(partial.with_name(found[1]), age=0)


def _is_leftover(path: Path) -> bool:
    """Whether a killed start may have left this before the directory had an owner."""
    return path.name == LOCK or path.match(f".{OWNER}.*.partial")


def _check_owner(file: Path, recipe: Recipe, update: bool) -> None:
    directory = file.parent
    table = read_json(file, "choose another --out, or remove the directory")
    _check_format(file, table)
    if update or table.get("recipe_hash") == recipe.hash or not (directory / RECIPE).exists():
        return  # without a recipe, a start was killed before it made anything
    kept = kept_recipe(directory)
    if kept is None or not is_same_elsewhere(recipe, kept, directory):
        raise BadInput(
            f"{directory} was made by another recipe or text (its own is {directory / RECIPE})",
            "choose another --out, or add --update to run the stages that changed again",
        )


def _check_format(file: Path, table: dict[str, Any]) -> None:
    found = table.get("format")
    if found != RUN_FORMAT:
        raise BadInput(
            f"{file.parent} was made by xushi {table.get('version', '?')} (run format {found}; "
            f"this version reads format {RUN_FORMAT})",
            "use that version, or choose another directory",
        )
