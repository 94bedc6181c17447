"""A second environment with a tool, an extra stage and an extra training step, from their own files
only: the miniature run goes through with each, and no file of xushi names them.
"""

import json
import re
import shutil
from pathlib import Path

import pytest

from xushi.base.errors import BadInput
from xushi.base.tracking import Tracking
from xushi.report import write_report
from xushi.run import describe, replay, replay_sentences, run
from xushi.run.recipe import Recipe, load_recipe
from xushi.tokenizer import Tokenizer

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
MINIATURE = ROOT / "tests" / "miniature.toml"
SHORT = [
    "pretrain.steps=12",
    "pretrain.checkpoint_every=4",
    "pretrain.evaluate_every=50",
    "sft.steps=6",
    "rl.steps=2",
    "rl.prompts=4",
    "evaluate.tasks=6",
    "evaluate.xz_primed=false",
]
STAGES = ["data", "tokenizer", "pretrain", "stages.py:Denoise", "sft", "rl", "stages.py:WordCount"]
TABLES = ["denoise.steps=6", "denoise.learning_rate=0.001", "denoise.checkpoint_every=3",
          "denoise.optimizer=adamw", "word_count.most=3"]  # fmt: skip


OWN = """
class Own(Stage):
    name = 'own'

    def __init__(self, recipe):
        pass

    def run(self, place):
        return Results()
"""


def extended(*more: str, folder: Path = HERE) -> Recipe:
    """The miniature with both stages; the file is found beside the recipe."""
    recipe = folder / "extended.toml"
    if not recipe.exists():
        shutil.copy(MINIATURE, recipe)
    return load_recipe(recipe, [*SHORT, *TABLES, *more], stages=STAGES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where somebody keeps recipes and files."""
    folder = tmp_path_factory.mktemp("own")
    shutil.copy(HERE / "stages.py", folder)
    shutil.copy(MINIATURE, folder / "extended.toml")
    return folder


@pytest.fixture(scope="module")
def done(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    """A run with both stages."""
    directory = tmp_path_factory.mktemp("done") / "run"
    results = run(extended(folder=folder), directory)
    assert results is not None
    return directory, results


def test_both_stages_ran_and_their_numbers_are_results(done) -> None:
    directory, results = done
    assert results["word_count.words"] > 1000 and results["denoise.steps"] == 6
    assert len(json.loads((directory / "words.json").read_text())) == 3
    store = Tracking(directory / "tracking.sqlite")
    losses = [value for _, value in store.series("denoise", "loss")]
    replaced = [value for _, value in store.series("denoise", "replaced")]
    store.close()
    assert len(losses) == 6 and replaced == sorted(replaced) and replaced[-1] > 0
    assert results["seconds.denoise"] > 0 and results["seconds.word_count"] > 0


def test_later_stages_start_from_its_weights(folder: Path) -> None:
    stages = {stage.name: stage for stage in extended(folder=folder).run_stages()}
    names = list(stages)
    assert names.index("denoise") == names.index("sft") - 1
    assert names.index("word_count") < names.index("evaluate")
    assert stages["denoise"].start == "pretrain" and stages["sft"].start == "denoise"  # type: ignore[attr-defined]


def test_its_step_is_replayed_to_the_bit(done) -> None:
    result = replay(done[0], 5, "denoise")
    assert result["batch_hash"] == result["batch_hash_logged"]
    assert result["loss"] == result["loss_logged"] and result["trained_from_step"] == 3
    assert "NOT" not in replay_sentences(result)


def test_a_run_has_its_files_with_it(done, folder: Path, tmp_path: Path) -> None:
    """The run can be moved: nothing of the folder that it was started from is needed."""
    moved = tmp_path / "moved"
    shutil.copytree(done[0], moved)
    assert (moved / "stages.py").read_bytes() == (folder / "stages.py").read_bytes()
    stored = load_recipe(moved / "recipe.toml", [])
    assert stored.hash == extended(folder=folder).hash
    assert run(stored, moved) is not None
    assert replay(moved, 6, "denoise", compute_loss=False)["items"] == 8


def test_a_changed_file_is_another_recipe(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "stages.py", tmp_path)
    before = extended(folder=tmp_path)
    keys = {stage.name: json.dumps(stage.reads()) for stage in before.run_stages()}
    file = tmp_path / "stages.py"
    file.write_text(file.read_text().replace("batch.tokens.flip(1)", "batch.tokens.flip(0)"))
    after = extended(folder=tmp_path)
    assert after.hash != before.hash
    changed = {s.name for s in after.run_stages() if json.dumps(s.reads()) != keys[s.name]}
    assert changed == {"denoise", "word_count"}


def test_its_table_is_checked_like_any_other(folder: Path) -> None:
    for assignment, problem in [
        ("word_count.mots=3", "unknown key word_count.mots"),
        ("word_count.most=0", "word_count.most: must be at least 1"),
        ("denoise.share=2", "denoise.share: must be at most 1"),
        ("stages=['data','tokenizer','pretrain','absent.py:Thing']", "absent.py"),
    ]:
        with pytest.raises(BadInput, match=problem):
            extended(assignment, folder=folder)
    with pytest.raises(BadInput, match="unknown key word_count"):
        load_recipe(MINIATURE, ["word_count.most=3"])


def test_a_table_may_be_left_out_where_every_key_has_a_default(folder: Path) -> None:
    named = ["data", "tokenizer", "pretrain", "stages.py:WordCount"]
    recipe = load_recipe(folder / "extended.toml", [], stages=named)
    assert recipe.word_count.most == 10  # type: ignore[attr-defined]
    with pytest.raises(BadInput, match="key denoise is missing"):
        load_recipe(folder / "extended.toml", [], stages=[*named[:3], "stages.py:Denoise"])


def test_stages_that_are_left_out_take_their_tables_with_them(folder: Path) -> None:
    own = folder / "own.toml"
    own.write_text(extended(folder=folder).to_toml())
    recipe = load_recipe(own, [], stages=["data", "tokenizer", "pretrain"])
    assert not hasattr(recipe, "word_count") and not hasattr(recipe, "denoise")


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("import sys; sys.exit('no')", "SystemExit: no"),
        ("class Own(Stage):\n    def __init__(self, recipe): pass\n", "does not define run"),
        (OWN.replace("name = 'own'", ""), "is named None"),
        (OWN.replace("'own'", "'end'"), "a name that is taken"),
        (OWN.replace("'own'", "'pretrain'"), "a name that is taken"),
        (OWN.replace("pass", "self.made = object()"), "cannot be hashed"),
        ("from xushi.run.stages.export import Export as Own", "is defined in another module"),
    ],
)
def test_a_stage_that_cannot_be_is_told_before_anything_is_made(
    body: str, problem: str, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text(f"from xushi.run.stages import Results, Stage\n{body}")
    shutil.copy(MINIATURE, tmp_path / "recipe.toml")
    stages = ["data", "tokenizer", "pretrain", "own.py:Own"]
    with pytest.raises(BadInput, match=problem):
        run(load_recipe(tmp_path / "recipe.toml", [], stages=stages), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("file", ["~nobody/own.py", "o" * 300 + ".py"])
def test_a_file_that_cannot_be_is_told(file: str) -> None:
    with pytest.raises(BadInput):
        load_recipe(MINIATURE, [], stages=["data", "tokenizer", "pretrain", f"{file}:Own"])


def test_a_dry_run_has_its_cost(folder: Path) -> None:
    plan = describe(extended(folder=folder))
    assert "stages.py:Denoise" in plan["run.stages"]
    each = plan["seconds.step_keep"] / 1024  # a step has 1,024 tokens
    assert plan["seconds.denoise"] == pytest.approx(6 * 8 * 64 * each)
    assert "seconds.word_count" not in plan


def test_an_environment_with_a_tool_goes_through_every_stage(tmp_path: Path) -> None:
    """The game of game.py: its vocabulary has tool tokens, its card is the model's, its run has it."""
    directory = tmp_path / "run"
    results = run(load_recipe(HERE / "game.toml", ["evaluate.control=true"]), directory)
    assert results is not None
    names = [stage.name for stage in load_recipe(directory / "recipe.toml", []).run_stages()]
    assert [f"seconds.{name}" in results for name in names] == [True] * 8
    assert results["rl.answers"] > 0 and "hidden digits" in results["rl.tasks_are"]
    assert Tokenizer.load(directory / "export" / "reasoning").tool_ids is not None
    card = json.loads((directory / "export" / "reasoning" / "model_card.json").read_text())
    assert card["can"] and card["example"]
    assert (directory / "game.py").read_bytes() == (HERE / "game.py").read_bytes()
    result = replay(directory, 2, "rl")
    assert result["loss"] == result["loss_logged"] and result["spans"][0]["source"] == "counting"
    page = write_report(directory).read_text(encoding="utf-8")
    assert "hidden digits" in page


def test_no_file_of_the_package_names_them() -> None:
    words = re.compile(r"WordCount|word_count|[Dd]enois|\bCounting\b|\bgame\b")
    found = [
        f"{path}:{number}"
        for path in sorted((ROOT / "xushi").rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if words.search(line) and "game.py:Counting" not in line
    ]
    assert found == []
