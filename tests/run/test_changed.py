"""What is said of text that changed since it was read, and which stages run again for it."""

from pathlib import Path

import pytest

from xushi.base.errors import BadInput
from xushi.base.tracking import Tracking
from xushi.data.read_files import look_at
from xushi.run.changed import stages_to_run_again
from xushi.run.directory import claim
from xushi.run.place import RunPlace, StageRecord, write_record
from xushi.run.recipe import Recipe, load_recipe
from xushi.run.stages import keys_of, records_of
from xushi.run.stages.data import Data

from .conftest import MINIATURE

ALL = 5


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "notes").mkdir()
    for name in "abc":
        (tmp_path / "notes" / f"{name}.md").write_text(f"{name} " * 1000)
    source = f"data.sources=[{{name = 'text', kind = 'text', glob = '{tmp_path / 'notes'}'}}]"
    return load_recipe(MINIATURE, [source], stages=["data", "tokenizer", "pretrain"])


def begin(recipe: Recipe, run: Path, done: int) -> RunPlace:
    """A run whose first stages are done, as far as the text is concerned."""
    run.mkdir()
    claim(recipe, run, update=False)
    place, stages = RunPlace(run, Tracking(None)), recipe.run_stages()
    (run / "results.json").write_text("{}")
    look_at(recipe.data).write(place.read_files)
    for stage in stages[:done]:
        files = stage.files_read(place)
        key = keys_of(stages, records_of(stages, place))[stage.name]
        write_record(place, stage.name, StageRecord(key, 1.0, {}, files))
    return place


@pytest.mark.parametrize("done", [1, ALL])
@pytest.mark.parametrize("fault", ["gone", "damaged"])
def test_files_that_cannot_be_compared(
    done: int, fault: str, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was read is used, and --update is refused: it is not offered, and removes nothing."""
    place = begin(recipe, tmp_path / "run", done)
    if fault == "gone":
        (tmp_path / "notes").rename(tmp_path / "elsewhere")
    else:
        place.read_files.write_text("{}")
    capsys.readouterr()
    assert stages_to_run_again(recipe.run_stages(), place, update=False) == []
    said = capsys.readouterr().err
    assert "; what was read before is used" in said and said.count("\n") == 1
    assert ("no file matches" if fault == "gone" else "read-files.json") in said
    assert "--update" not in said and "goes on" not in said
    with pytest.raises(BadInput):
        claim(recipe, place.directory, update=True)
    assert (place.directory / "results.json").exists()
    assert len(records_of(recipe.run_stages(), place)) == done


@pytest.mark.parametrize(
    ("done", "update", "again", "offered"),
    [(1, False, 0, True), (1, True, ALL, False), (ALL, False, ALL, False), (ALL, True, ALL, False)],
)
def test_text_that_changed(
    done: int,
    update: bool,
    again: int,
    offered: bool,
    recipe: Recipe,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[Path] = []
    monkeypatch.setattr(Data, "prepare_again", lambda _, place: tried.append(place.directory))
    place, stages = begin(recipe, tmp_path / "run", done), recipe.run_stages()
    assert stages_to_run_again(stages, place, update) == []
    (tmp_path / "notes" / "d.md").write_text("d " * 1000)
    capsys.readouterr()
    assert len(stages_to_run_again(stages, place, update)) == again
    assert len(tried) == (again > 0)  # what is wrong with the new text is told first
    said = capsys.readouterr().err
    assert "data: the files are not as they were read: 1 new (d.md)" in said
    assert ("goes on with what it has read, and --update reads them again" in said) == offered
