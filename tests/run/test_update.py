"""--update: nothing of the old recipe's attempt is taken for the new one's."""

import json
from pathlib import Path

import pytest

from xushi.base.errors import BadInput
from xushi.base.tracking import Tracking
from xushi.report import write_report
from xushi.run import export_metrics, replay, run
from xushi.run.place import RunPlace
from xushi.run.recipe import Recipe, load_recipe
from xushi.run.stages import Results, Stage
from xushi.run.stages.tokenizer import TrainTokenizer

from .conftest import MINIATURE

TEXT_ONLY = ["data", "tokenizer", "pretrain"]
SHORT = ["pretrain.checkpoint_every=4", "pretrain.evaluate_every=50", "evaluate.xz_primed=false"]


def recipe_of(steps: int, *more: str) -> Recipe:
    return load_recipe(MINIATURE, [*SHORT, f"pretrain.steps={steps}", *more], stages=TEXT_ONLY)


@pytest.fixture(scope="module")
def updated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps, updated to a recipe of 6 steps at another rate."""
    directory = tmp_path_factory.mktemp("update") / "run"
    run(recipe_of(12), directory)
    with pytest.raises(BadInput, match="made by another recipe"):
        run(recipe_of(6, "pretrain.learning_rate=0.001"), directory)
    run(recipe_of(6, "pretrain.learning_rate=0.001"), directory, update=True)
    return directory


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    """The second recipe in a directory of its own."""
    directory = tmp_path_factory.mktemp("fresh") / "run"
    results = run(recipe_of(6, "pretrain.learning_rate=0.001"), directory)
    assert results is not None
    return directory, results


def test_its_numbers_are_those_of_a_run_of_its_own(updated: Path, fresh) -> None:
    again = run(recipe_of(6, "pretrain.learning_rate=0.001"), updated)  # everything is done
    assert again is not None
    own = fresh[1]
    for key in ("pretrain.loss", "pretrain.steps", "pretrain.tokens", "evaluate.bits_per_byte"):
        assert again[key] == own[key], key


def test_its_series_batches_and_checkpoints_hold_no_later_step(updated: Path, fresh) -> None:
    stores = [Tracking(directory / "tracking.sqlite") for directory in (updated, fresh[0])]
    losses = [store.series("pretrain", "loss") for store in stores]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    assert all(len(store.series("pretrain", "seconds")) == 6 for store in stores)
    assert all(len(store.series("pretrain", "start_seconds")) == 1 for store in stores)
    assert not stores[0].batches("pretrain", 12) and len(stores[0].batches("pretrain", 6)) == 6
    for store in stores:
        store.close()
    steps = sorted(path.name for path in (updated / "checkpoints" / "pretrain").glob("step-*"))
    assert steps == ["step-000000004", "step-000000006"]


def test_replay_answers_for_the_new_recipe(updated: Path) -> None:
    result = replay(updated, 6)
    assert result["loss"] == result["loss_logged"] and result["trained_from_step"] == 4
    with pytest.raises(BadInput, match="no step 12") as error:
        replay(updated, 12)
    assert "from 1 to 6" in error.value.remedy


def test_a_key_that_a_stage_does_not_read_leaves_it_done(
    updated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    changed = recipe_of(6, "pretrain.learning_rate=0.001", "evaluate.tasks=7")
    run(changed, updated, update=True)
    told = capsys.readouterr().err
    assert told.count("done before") == 3 and "evaluate: started" in told
    assert "pretrain: started" not in told


def test_a_stage_after_a_changed_one_runs_again(
    updated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Keys are chained: the tokenizer reads nothing new, but the text before it changed."""
    capsys.readouterr()
    changed = recipe_of(6, "pretrain.learning_rate=0.001", "data.salt='other'")
    run(changed, updated, update=True)
    told = capsys.readouterr().err
    assert "done before" not in told
    for stage in ("data", "tokenizer", "pretrain", "evaluate", "export"):
        assert f"{stage}: started" in told


def test_checkpoints_of_another_recipe_are_not_continued(tmp_path: Path) -> None:
    """A stage that was interrupted starts over under a recipe that changes it."""
    directory = tmp_path / "run"
    run(recipe_of(8), directory)
    (directory / "stages" / "pretrain.json").unlink()  # as if it had been interrupted at the end
    run(recipe_of(9), directory, update=True)
    store = Tracking(directory / "tracking.sqlite")
    assert [step for step, _ in store.series("pretrain", "loss")] == list(range(1, 10))
    store.close()


def test_without_its_tracking_store_a_finished_stage_has_no_speed(tmp_path: Path) -> None:
    """The advice for a damaged store is to move it away: then times and losses are unknown."""
    directory = tmp_path / "run"
    run(recipe_of(4), directory)
    for name in ("tracking.sqlite", "stages/pretrain.json"):
        (directory / name).unlink()
    results = run(recipe_of(4), directory)
    assert results is not None and results["pretrain.steps"] == 4
    assert "pretrain.tokens_per_second" not in results and "pretrain.loss" not in results


@pytest.fixture
def half_updated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run, updated to another recipe that is interrupted before the tokenizer."""
    directory = tmp_path / "run"
    run(recipe_of(4), directory)
    with monkeypatch.context() as patch:
        patch.setattr(TrainTokenizer, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(recipe_of(4, "data.salt='other'"), directory, update=True)
    return directory


def interrupted(stage: Stage, place: RunPlace) -> Results:
    raise KeyboardInterrupt


def test_back_at_the_first_recipe_all_that_follows_runs_again(
    half_updated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The corpus was made anew, and may be another: nothing made from the old one is kept."""
    capsys.readouterr()
    run(recipe_of(4), half_updated, update=True)
    assert "done before" not in capsys.readouterr().err


def test_between_two_recipes_nothing_is_told_of_the_old_one(half_updated: Path) -> None:
    assert not (half_updated / "results.json").exists()
    with pytest.raises(BadInput, match="has not run again since"):
        replay(half_updated, 3)


def test_threads_of_an_updated_recipe_are_used(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    run(recipe_of(2, "threads=1"), directory)
    results = run(recipe_of(2, "threads=2"), directory, update=True)
    assert results is not None and results["machine.threads"] == 2


def test_a_start_that_was_killed_counts_by_its_steps(tmp_path: Path) -> None:
    """A kill leaves no time of the start, but the seconds of its steps are in the store."""
    directory = tmp_path / "run"
    run(recipe_of(4), directory)
    (directory / "stages" / "pretrain.json").unlink()
    store = Tracking(directory / "tracking.sqlite")
    for step in range(1, 5):
        store.metrics("pretrain", step, {"seconds": 100.0})
    store.close()
    results = run(recipe_of(4), directory)
    assert results is not None and results["seconds.pretrain"] == pytest.approx(400)


def test_a_run_of_another_format_is_told_and_not_touched(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    run(recipe_of(2), directory)
    owner = json.loads((directory / "run.json").read_text())
    (directory / "run.json").write_text(json.dumps(owner | {"format": 1}))
    before = (directory / "tracking.sqlite").read_bytes()
    actions = (
        write_report,
        lambda path: replay(path, 1),
        lambda path: export_metrics(path, "tensorboard"),
    )
    for action in actions:
        with pytest.raises(BadInput, match="run format 1"):
            action(directory)
    assert (directory / "tracking.sqlite").read_bytes() == before
