"""A recipe for somebody's own text: fitted to what the text allows, and kept once a run has read it."""

import random
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xushi.base.errors import BadInput, XushiError
from xushi.base.tracking import Tracking
from xushi.data import DataConfig, ExtraSource, corpus, shared
from xushi.data.left_out import LeftOut
from xushi.run import own_text
from xushi.run.costs import measure_text
from xushi.run.directory import claim
from xushi.run.own_text import (
    MOST_EPOCHS,
    OwnText,
    allowed_vocabulary,
    fit_to_text,
    own_text_recipe,
)
from xushi.run.place import RunPlace, StageRecord, write_record
from xushi.run.recipe import Recipe, load_recipe
from xushi.run.stages import finished_stages, keys_of, records_of
from xushi.run.stages.data import Data, tell_left_out
from xushi.tokenizer import TooFewMerges

from .conftest import MINIATURE


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XUSHI_CACHE", str(tmp_path / "cache"))


def words(size: int, seed: int = 0) -> str:
    """Text with enough different words for any vocabulary of these tests."""
    draw = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    text = "".join(
        "".join(draw.choices(letters, k=draw.randint(2, 7))) * 2 + " " for _ in range(size // 6)
    )
    return text[:size]


def text_of(directory: Path, size: int) -> str:
    directory.mkdir(exist_ok=True)
    (directory / "note.txt").write_text(words(size))
    return str(directory)


def recipe_for(*paths: str, sets: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> Recipe:
    asked = OwnText(list(paths), MINIATURE, list(exclude), list(sets))
    recipe, update = own_text_recipe(asked, Path("no such run"), update=False)
    assert not update
    return recipe


def test_a_small_text_gets_a_vocabulary_and_steps_that_fit_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_for(text_of(tmp_path / "notes", 10_000))
    assert recipe.tokenizer.vocab_size == 263 + 100
    assert 1 <= recipe.pretrain.steps <= MOST_EPOCHS * 10_000 // recipe.pretrain.batch_tokens
    assert recipe.pretrain.warmup_steps <= recipe.pretrain.steps // 10
    assert [(source.name, source.kind) for source in recipe.data.sources] == [("text", "text")]
    said = capsys.readouterr().err
    assert (
        "tokenizer.vocab_size 512 -> 363" in said
        and f"pretrain.steps 200 -> {recipe.pretrain.steps}" in said
        and "--set" in said
    )


def test_nothing_but_text_is_trained_on(tmp_path: Path) -> None:
    recipe = recipe_for(text_of(tmp_path / "notes", 10_000))
    assert recipe.name == "text" and recipe.stages == ["data", "tokenizer", "pretrain"]
    assert recipe.environment is None and recipe.sft is None and recipe.rl is None
    names = [stage.name for stage in recipe.run_stages()]
    assert names == ["data", "tokenizer", "pretrain", "evaluate", "export"]


def test_a_recipe_that_leaves_a_stage_out_trains_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "control.toml").write_text(f'without = "rl"\n{MINIATURE.read_text()}')
    notes = text_of(tmp_path / "notes", 10_000)
    assert OwnText([notes], tmp_path / "control.toml", [], []).recipe_with({}).without is None


@pytest.mark.parametrize(
    ("paths", "exclude", "said"),
    [(["a.md", " "], [], "a PATH is empty"), (["a.md"], ["b", "x" * 5000], "too long a name")],
)
def test_every_path_and_pattern_is_looked_at(
    paths: list[str], exclude: list[str], said: str
) -> None:
    with pytest.raises(BadInput, match=said):
        OwnText(paths, MINIATURE, exclude, []).table()


@given(st.integers(1, 4_000_000), st.integers(1, 4_000_000))
def test_more_text_never_fits_less_and_never_more_than_the_recipe_says(
    one: int, other: int
) -> None:
    fitted = []
    for size in sorted((one, other)):
        asked = {"steps": 200, "batch_tokens": 1024, "warmup_steps": 5}
        table = {"tokenizer": {"vocab_size": 512}, "pretrain": asked}
        found = fit_to_text(table, size)
        fitted.append((found.get("tokenizer.vocab_size", 512), found.get("pretrain.steps", 200)))
    assert fitted[0] <= fitted[1] <= (512, 200)
    assert fitted[0][0] >= 263 and fitted[0][1] >= 1


@pytest.mark.parametrize(("every", "warmup", "count"), [(5, 0, 1), (5000, 5000, 3)])
def test_what_is_fitted_is_lowered(every: int, warmup: int, count: int) -> None:
    asked = {"steps": 10_000, "batch_tokens": 1024, "evaluate_every": every, "warmup_steps": warmup}
    fitted = fit_to_text({"tokenizer": {}, "pretrain": asked}, 100_000)
    assert len(fitted) == count and "pretrain.steps" in fitted
    assert all(value < asked[key.removeprefix("pretrain.")] for key, value in fitted.items())


def test_a_default_is_lowered_too() -> None:
    table = {"tokenizer": {}, "pretrain": {"steps": 10_000, "batch_tokens": 1024}}
    fitted = fit_to_text(table, 20_000)
    assert fitted["pretrain.evaluate_every"] == fitted["pretrain.steps"] // 10


def test_the_text_is_not_copied_beside_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory for temporary files may be in memory, and keeps what a kill leaves."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "there is none"))
    recipe = recipe_for(text_of(tmp_path / "notes", 10_000))
    assert measure_text(recipe).summary.bytes == 10_000


def test_a_large_text_changes_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_for(text_of(tmp_path / "book", 60_000))
    asked = load_recipe(MINIATURE, [])
    assert (recipe.tokenizer, recipe.pretrain) == (asked.tokenizer, asked.pretrain)
    assert "->" not in capsys.readouterr().err


def test_set_has_the_last_word_and_is_fitted_around(tmp_path: Path) -> None:
    notes = text_of(tmp_path / "notes", 10_000)
    sets = ("pretrain.steps=77", "tokenizer.vocab_size=300", "name=mine")
    recipe = recipe_for(notes, sets=sets)
    assert (recipe.pretrain.steps, recipe.tokenizer.vocab_size, recipe.name) == (77, 300, "mine")
    table = recipe_for(notes, sets=("tokenizer={vocab_size=400}",))
    assert table.tokenizer.vocab_size == 400
    smaller = recipe_for(notes, sets=("pretrain.batch_tokens=512",))
    assert smaller.pretrain.steps == MOST_EPOCHS * 10_000 // (2 * 512)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a PATH is empty"),
        ("a" * 5000, "too long a name"),
        ("nowhere/*.md", "no file matches"),
        ("nothing", "no file matches"),
    ],
)
def test_a_text_that_is_none(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nothing").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(XushiError, match=said):
        recipe_for(text)


def test_repetitive_text_lowers_the_vocabulary_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "same.txt").write_text("the same words again and again\n" * 2000)
    recipe = recipe_for(str(tmp_path / "same.txt"))
    allowed = recipe.tokenizer.vocab_size
    assert 263 < allowed < 300
    assert f"tokenizer.vocab_size 512 -> {allowed}" in capsys.readouterr().err
    with pytest.raises(TooFewMerges, match=f"it gives {allowed}"):
        recipe_for(str(tmp_path / "same.txt"), sets=("tokenizer.vocab_size=400",))


def test_a_vocabulary_is_tried_on_all_of_the_text_where_its_beginning_allows_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (own_text, corpus):
        monkeypatch.setattr(module, "training_texts", lambda _: iter(texts))
    monkeypatch.setattr("xushi.run.own_text.SAMPLE", 1000)
    texts = ["a" * 1000, words(20_000)]
    assert allowed_vocabulary(tmp_path, 300) == 300
    texts = [words(1000), "b" * 1000]
    assert allowed_vocabulary(tmp_path, 270) == 270
    texts = ["a" * 3000]
    assert 263 < allowed_vocabulary(tmp_path, 400) < 280


def test_several_paths_and_what_they_exclude(tmp_path: Path) -> None:
    notes, book = text_of(tmp_path / "notes", 4000), tmp_path / "book.txt"
    book.write_text(words(3000, seed=1))
    (tmp_path / "notes" / "drafts").mkdir()
    (tmp_path / "notes" / "drafts" / "d.txt").write_text(words(100_000, seed=2))
    recipe = recipe_for(notes, str(book), exclude=("notes/drafts",))
    assert recipe.data.sources[0].globs == [notes, str(book)]
    assert recipe.tokenizer.vocab_size == 263 + 70  # of 7,000 bytes: the draft is not read


# A run that has begun


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    directory = tmp_path / "notes"
    directory.mkdir()
    for number in range(4):
        (directory / f"{number}.md").write_text(words(2000, number))
    return directory


def asked_for(notes: Path, *sets: str) -> OwnText:
    return OwnText([str(notes)], MINIATURE, [], list(sets))


def begin(asked: OwnText, run: Path, done: int) -> Recipe:
    """A run whose first stages are done, the first of them truly."""
    recipe, _ = own_text_recipe(asked, run, update=False)
    run.mkdir()
    claim(recipe, run, update=False, asked=asked.hash)
    place = RunPlace(run, Tracking(None))
    stages = recipe.run_stages()
    for stage in stages[:done]:
        files = ""
        if isinstance(stage, Data):
            stage.run(place)
            files = stage.files_read(place)
        key = keys_of(stages, records_of(stages, place))[stage.name]
        write_record(place, stage.name, StageRecord(key, 1.0, {}, files))
    return recipe


ALL = 5


@pytest.mark.parametrize(
    ("done", "change", "kept", "update"),
    [
        (0, "line", False, True),  # nothing is read yet: the text as it is now
        (1, "line", True, False),
        (ALL - 1, "line", True, False),
        (ALL, "line", False, True),
        (ALL, "none", True, False),
        (1, "gone", True, False),
        (ALL, "gone", True, False),
        (0, "renamed", True, False),  # nothing that was read is lost
        (1, "renamed", True, False),
        (ALL, "renamed", True, False),
    ],
)
def test_what_the_same_command_does(
    done: int, change: str, kept: bool, update: bool, notes: Path, tmp_path: Path
) -> None:
    begun = begin(asked_for(notes), tmp_path / "run", done)
    place = notes
    if change == "line":
        (notes / "0.md").write_text(words(9000))  # fits a larger vocabulary
    if change in ("gone", "renamed"):
        other = notes.rename(tmp_path / "renamed")
        place = other if change == "renamed" else notes
    recipe, may_update = own_text_recipe(asked_for(place), tmp_path / "run", update=False)
    assert may_update == update
    assert (recipe.tokenizer == begun.tokenizer) == kept
    assert (recipe.hash_without_places == begun.hash_without_places) == kept
    assert recipe.data.sources[0].globs == [str(place)]
    claim(recipe, tmp_path / "run", may_update)


def test_a_run_in_its_own_text_makes_the_corpus_once(
    notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`xushi train .`: the run lies in `runs`, beside what else somebody keeps there."""
    made: list[Path] = []
    build = shared.build_corpus

    def counted(config: DataConfig, extra: Mapping[str, ExtraSource], directory: Path) -> object:
        made.append(directory)
        return build(config, extra, directory)

    monkeypatch.setattr(shared, "build_corpus", counted)
    (notes / "runs").mkdir()
    (notes / "runs" / "monday.md").write_text(words(3000, 9))
    run = notes / "runs" / "text"
    recipe, _ = own_text_recipe(asked_for(notes), run, update=False)
    run.mkdir()
    claim(recipe, run, update=False)
    results = Data(recipe).run(RunPlace(run, Tracking(None))).flat()
    assert results["data.files"] == 5 and results["data.left_out.runs"] == 1
    assert len(made) == 1


def test_what_is_said_of_several_sources(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        text_of(tmp_path / name, 3000)
        (tmp_path / name / f"{name}.pdf").touch()
    (tmp_path / "two" / "drafts.md").touch()
    sources = ", ".join(
        f"{{name = '{name}', kind = 'text', glob = '{tmp_path / name}', exclude = ['drafts*']}}"
        for name in ("one", "two")
    )
    Data(load_recipe(MINIATURE, [f"data.sources=[{sources}]"])).run(
        RunPlace(tmp_path / "run", Tracking(None))
    )
    said = capsys.readouterr().err
    assert "one: left out: 1 PDF or office document (one.pdf)" in said
    assert "two: left out: 1 file excluded by a pattern (drafts.md)" in said
    assert "exclude = 'drafts*' matches nothing in source one" in said
    assert "source two" not in said


def test_the_source_is_named_where_there_are_several(capsys: pytest.CaptureFixture[str]) -> None:
    pdf = [LeftOut(reason="formatted", count=1, examples=["a.pdf"])]
    tell_left_out({"one": pdf})
    tell_left_out({"one": pdf, "two": []})
    line = "left out: 1 PDF or office document (a.pdf); convert to plain text first"
    assert capsys.readouterr().err.splitlines() == [line, f"one: {line}"]


def test_a_kill_before_changed_text_is_read_does_not_bring_the_old_back(
    notes: Path, tmp_path: Path
) -> None:
    """The new recipe is written, the text is not yet read: it is not for what was read before."""
    run = tmp_path / "run"
    begun = begin(asked_for(notes), run, ALL)
    (run / "stages" / "data.started").touch()
    (notes / "0.md").write_text(words(9000))
    recipe, update = own_text_recipe(asked_for(notes), run, update=False)
    claim(recipe, run, update, asked_for(notes).hash)  # a start that ends here
    place, stages = RunPlace(run, Tracking(None)), recipe.run_stages()
    assert finished_stages(stages, place) == set() and not (run / "stages/data.started").exists()
    again, _ = own_text_recipe(asked_for(notes), run, update=False)
    assert again == recipe != begun


def test_update_reads_the_text_as_it_is(notes: Path, tmp_path: Path) -> None:
    begun = begin(asked_for(notes), tmp_path / "run", 1)
    (notes / "0.md").write_text(words(9000))
    recipe, update = own_text_recipe(asked_for(notes), tmp_path / "run", update=True)
    assert update and recipe.tokenizer.vocab_size > begun.tokenizer.vocab_size


def test_another_command_is_another_run(notes: Path, tmp_path: Path) -> None:
    begin(asked_for(notes, "pretrain.steps=3"), tmp_path / "run", 1)
    (other := tmp_path / "other").mkdir()
    (other / "0.md").write_text(words(9000))
    same, fewer = "pretrain.steps=3", "pretrain.steps=2"
    for asked in (
        asked_for(notes, same, "seed=1"),
        asked_for(other, same),
        asked_for(notes, fewer),
        asked_for(notes),
    ):
        recipe, update = own_text_recipe(asked, tmp_path / "run", update=False)
        assert not update
        with pytest.raises(XushiError, match="made by another recipe or text"):
            claim(recipe, tmp_path / "run", update)


@pytest.mark.parametrize("wrong", ["tokenizer=5", "data=5", "data.sources=3", "pretrain.steps='x'"])
def test_a_wrong_setting_is_told_and_nothing_else_happens(
    wrong: str, notes: Path, tmp_path: Path
) -> None:
    begin(asked_for(notes), tmp_path / "run", 1)
    for run in ("run", "new"):
        with pytest.raises(XushiError, match=wrong.partition("=")[0]):
            own_text_recipe(asked_for(notes, wrong), tmp_path / run, update=False)


def test_steps_that_are_given_leave_warm_up_and_measurements(tmp_path: Path) -> None:
    """They follow from the steps: those of the recipe belong to steps of its size."""
    (tmp_path / "a.txt").write_text("some words and more of them\n" * 2000)
    asked = OwnText([str(tmp_path / "a.txt")], MINIATURE, [], ["pretrain.steps=5000"])
    recipe = own_text_recipe(asked, tmp_path / "run", update=False)[0]
    given = load_recipe(MINIATURE, [])
    assert recipe.pretrain.steps == 5000
    assert recipe.pretrain.evaluate_every == given.pretrain.evaluate_every
    assert recipe.pretrain.warmup_steps == given.pretrain.warmup_steps
