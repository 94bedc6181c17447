"""Whose a run directory is: killed starts, other recipes, and text that lies elsewhere."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from xushi.base.errors import BadInput
from xushi.base.files import write_json
from xushi.base.tracking import Tracking
from xushi.run import directory as module
from xushi.run import run as run_recipe
from xushi.run.directory import claim, is_same_elsewhere, kept_recipe, own
from xushi.run.place import RunPlace, StageRecord, write_record
from xushi.run.recipe import Recipe, load_recipe
from xushi.run.stages import finished_stages, keys_of, records_of
from xushi.run.stages.data import Data

from .conftest import MINIATURE


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    (tmp_path / "notes").mkdir()
    for name in "abc":
        (tmp_path / "notes" / f"{name}.md").write_text(f"{name} " * 1000)
    return tmp_path / "notes"


def recipe_of(notes: Path, *more: str) -> Recipe:
    source = f"data.sources=[{{name = 'text', kind = 'text', glob = '{notes}'}}]"
    return load_recipe(MINIATURE, [source, *more], stages=["data", "tokenizer", "pretrain"])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


class Killed(BaseException):
    """A start that ends here."""


@pytest.mark.parametrize("where", ["in the owner's file", "after it"])
def test_a_start_that_was_killed_before_it_made_anything(
    where: str, notes: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command goes on, and so does any other: the directory holds nothing yet."""
    (run / ".lock").touch()
    if where == "after it":

        def kill(path: Path, content: object) -> None:
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(module, "write_atomic", kill)
            with pytest.raises(Killed):
                claim(recipe_of(notes), run, update=False)
        assert (run / "run.json").exists() and not (run / "recipe.toml").exists()
    else:
        (run / ".run.json.123.partial").write_text('{"form')
    claim(recipe_of(notes, "seed=1"), run, update=False)
    assert kept_recipe(run) == recipe_of(notes, "seed=1")
    with pytest.raises(BadInput, match="made by another recipe or text"):
        claim(recipe_of(notes), run, update=False)


def test_a_directory_name_that_no_library_takes_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(BadInput, match=r"run\\xff cannot be used: its name is not UTF-8"),
        own(tmp_path / "run\udcff"),
    ):
        raise AssertionError
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def place(notes: Path, run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RunPlace:
    """A run that has read the notes and is not finished."""
    monkeypatch.setenv("XUSHI_CACHE", str(tmp_path / "cache"))
    recipe = recipe_of(notes)
    claim(recipe, run, update=False)
    place = RunPlace(run, Tracking(None))
    stage = Data(recipe)
    results = stage.run(place)
    key = keys_of(recipe.run_stages(), {})["data"]
    write_record(place, "data", StageRecord(key, 1.0, results.flat(), stage.files_read(place)))
    return place


def test_the_same_text_elsewhere_is_the_same_run(notes: Path, place: RunPlace) -> None:
    kept = recipe_of(notes)
    moved = notes.rename(notes.parent / "moved")
    again = recipe_of(moved)
    assert again.hash != kept.hash and is_same_elsewhere(again, kept, place.directory)
    assert not is_same_elsewhere(recipe_of(moved, "seed=1"), kept, place.directory)
    assert not is_same_elsewhere(recipe_of(notes), kept, place.directory)  # not there any more
    claim(again, place.directory, update=False)
    assert kept_recipe(place.directory) == again
    assert finished_stages(again.run_stages(), place) == {"data"}
    (moved / "a.md").write_text("other")
    with pytest.raises(BadInput, match="made by another recipe or text"):
        claim(kept, place.directory, update=False)
    other = moved.rename(notes)
    assert not is_same_elsewhere(recipe_of(other), again, place.directory)


def test_keys_of_later_stages_tell_which_text_was_read(notes: Path, place: RunPlace) -> None:
    stages = recipe_of(notes).run_stages()
    before = keys_of(stages, records_of(stages, place))
    stage = Data(recipe_of(notes))
    assert stage.files_changed(place) == ""
    (notes / "d.md").write_text("new")
    assert stage.files_changed(place) == "1 new (d.md)"
    results = stage.run(place)
    write_record(
        place, "data", StageRecord(before["data"], 1.0, results.flat(), stage.files_read(place))
    )
    after = keys_of(stages, records_of(stages, place))
    assert {name for name in before if before[name] != after[name]} == set(before) - {"data"}
    assert keys_of(stages, {})["tokenizer"] not in (before["tokenizer"], after["tokenizer"])


def test_a_recipe_that_cannot_be_read_is_not_kept(run: Path) -> None:
    assert kept_recipe(run) is None
    write_json(run / "run.json", {})
    assert kept_recipe(run) is None
    (run / "recipe.toml").write_text("name = ")
    assert kept_recipe(run) is None


def test_what_killed_starts_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    """However young: the lock keeps other starts away. A living process's file stays, as that of
    `xushi report`, which takes no lock.
    """
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    recipe = load_recipe(MINIATURE, [])
    with own(tmp_path):
        claim(recipe, tmp_path, update=False)
    (tmp_path / "stages").mkdir()
    left = [f".results.json.{gone.pid}.partial", f"stages/.data.json.{gone.pid}.partial"]
    others = [f".report.html.{os.getpid()}.partial", ".mine.partial", "notes.partial"]
    for name in left + others:
        (tmp_path / name).touch()
    with own(tmp_path):
        claim(recipe, tmp_path, update=False)
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert found == {".lock", "run.json", "recipe.toml", "stages", *others}


def test_a_run_of_another_format_is_refused_as_it_is(notes: Path, run: Path) -> None:
    """Its records have another form, which is not told as damage: nothing is to be removed."""
    (run / "stages").mkdir()
    write_json(run / "run.json", {"format": 2, "recipe_hash": "0"})
    write_json(run / "stages" / "data.json", {"key": "0", "seconds": 1.0, "results": {}})
    with pytest.raises(BadInput, match="format 2"):
        run_recipe(recipe_of(notes), run)
    assert sorted(path.name for path in (run / "stages").iterdir()) == ["data.json"]


def test_text_that_became_too_small_leaves_the_finished_run(notes: Path, run: Path) -> None:
    """Records, results, checkpoints and the rest: nothing is removed for what cannot be made."""
    few = ("tokenizer.vocab_size=263", "pretrain.steps=1", "evaluate.xz_primed=false")
    assert run_recipe(recipe_of(notes, *few), run) is not None
    before = contents(run)
    assert {"results.json", "stages/export.json", "data/read-files.json"} <= before.keys()
    assert any(name.startswith("checkpoints/pretrain/") for name in before)
    for file in notes.iterdir():
        file.write_text("a")
    for update in (False, True):
        with pytest.raises(BadInput, match="bytes of text"):
            run_recipe(recipe_of(notes, *few), run, update)
        assert contents(run) == before


def contents(run: Path) -> dict[str, bytes]:
    files = [path for path in run.rglob("*") if path.is_file()]
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in files}
