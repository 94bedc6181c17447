"""--update: nothing of the old recipe's attempt is taken for the new one's."""

from pathlib import Path

import pytest

from xushi.base.errors import BadInput
from xushi.base.tracking import Tracking
from xushi.run import replay, run
from xushi.run.recipe import Recipe, load_recipe

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
