"""Ideas about recipes: their commands, what decides their results, and the arm that trains one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from xushi.base.config import override
from xushi.base.errors import BadInput
from xushi.ladder import Ledger, jobs, try_idea
from xushi.ladder.arm import arm_recipe, code_hash, measure, recipe_files
from xushi.ladder.facts import facts
from xushi.ladder.idea import ARM, ARMS, Idea
from xushi.ladder.trial import _all_files
from xushi.plan import train_flops_per_token

from ..miniature import MINIATURE, ROOT, read_results, xushi, xushi_here

KEYS: dict[str, Any] = {
    "question": "?",
    "recipe": "tiny.toml",
    "variant": {"pretrain": {"optimizer": "adamw"}},
    "metric": "bits_per_byte",
    "smallest_effect": 0.01,
    "pairs": 2,
}
STEPS = "pretrain.steps"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with the miniature's recipe in it, cut to twenty steps."""
    monkeypatch.setattr(jobs, "_SECONDS_BETWEEN_LOOKS", 0.01)
    monkeypatch.chdir(tmp_path)
    text = MINIATURE.read_text().partition("[environment]")[0]
    (tmp_path / "tiny.toml").write_text(text.replace("steps = 200", "steps = 20"))
    return tmp_path


def idea(**changes: Any) -> Idea:
    return Idea.model_validate({**KEYS, **changes})


def write(place: Path, **changes: Any) -> Path:
    (place / "idea.toml").write_text(tomli_w.dumps({**KEYS, **changes}))
    return place / "idea.toml"


def test_the_words_of_an_arm():
    """Nested and dotted keys are the same; the rungs' and the seed come with the arm's own."""
    asked = idea(
        baseline={"model.tie_word_embeddings": True},
        variant={"pretrain": {"optimizer": "adamw", "learning_rate": 0.01}},
        rungs=[{STEPS: 20}, {"pretrain": {"steps": 40}}],
    )
    assert asked.command("baseline", 1, 7) == [
        ARM, "tiny.toml", "model.tie_word_embeddings=true", "pretrain.steps=40", "seed=7",
    ]  # fmt: skip
    assert asked.command("variant", 0, 7) == [
        ARM, "tiny.toml", "pretrain.learning_rate=0.01", 'pretrain.optimizer="adamw"',
        "pretrain.steps=20", "seed=7",
    ]  # fmt: skip
    assert asked.shown("variant") == (
        'tiny.toml with pretrain.optimizer = "adamw", pretrain.learning_rate = 0.01'
    )
    assert idea().shown("baseline") == "tiny.toml as it is"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"variant": "train {seed}"}, "variant is a command, but recipe is given"),
        ({"variant": {}}, "set the same: the idea changes nothing"),
        ({"variant": {"seed": 3}}, "variant cannot set seed"),
        ({"sizes": [1, 2]}, r"a recipe has no \{size\}"),
        ({"rungs": [{"pretrain": {"optimizer": "muon"}}]}, "which the rungs set"),
        ({"rungs": [{"seed": 1}]}, "rungs cannot set seed"),
        ({"recipe": None}, "baseline is missing; give a command"),
        ({"recipe": None, "baseline": "train {seed}"}, "variant is a table; give a command"),
        (
            {"recipe": None, "baseline": "a {seed} {x}", "variant": "b {seed} {x}",
             "rungs": [{"x": True}]},
            "rungs: x must be a text or a number",
        ),
    ],
)  # fmt: skip
def test_ideas_about_recipes_that_cannot_be_asked(changes, problem):
    with pytest.raises(ValueError, match=problem):
        idea(**changes)


def test_what_decides_the_results(place, monkeypatch):
    found = recipe_files(idea(), place)
    assert set(found) == {"(the code of xushi)", "(the text)"}
    assert found["(the code of xushi)"] == code_hash() == code_hash.__wrapped__()
    assert set(_all_files(idea(), place, ARMS)) == {*found, "tiny.toml"}
    more = recipe_files(idea(rungs=[{STEPS: 20}, {STEPS: 40}]), place)
    assert more == found  # the same text at each rung
    other = {"data": {"sources": [{"name": "p", "kind": "packages", "packages": ["idna"]}]}}
    only = recipe_files(idea(variant=other), place, ["variant"])["(the text)"]
    assert (
        only
        != found["(the text)"]
        == recipe_files(idea(variant=other), place, ["baseline"])["(the text)"]
    )
    package = place / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr("xushi.ladder.arm.xushi.__file__", str(package / "__init__.py"))
    first = code_hash.__wrapped__()
    (package / "kernel.cpp").write_text("")
    assert first != code_hash.__wrapped__() != found["(the code of xushi)"]


def test_a_file_that_a_recipe_names_decides_too(place):
    game = ROOT / "tests" / "contracts" / "game.py"
    (place / "game.py").write_text(game.read_text())
    with open(place / "tiny.toml", "a") as recipe:
        recipe.write('\n[environment]\nkind = "game.py:Counting"\n')
    before = recipe_files(idea(), place)
    assert len(before) == 3
    with open(place / "game.py", "a") as file:
        file.write("# changed\n")
    after = recipe_files(idea(), place)
    assert [name for name in before if before[name] != after[name]] == ["(game.py)"]


def test_what_another_recipe_showed_is_no_run_variance(place):
    """Without a table of its own a baseline is the recipe as it is, which says nothing of which."""
    ledger = Ledger(place / "ladder")
    first = ledger.register("a", "a", idea(), {})
    for seed, value in ((1, 2.0), (2, 3.0)):
        ledger.start(f"job {seed}", ["x"], 1, "")
        ledger.end(f"job {seed}", 5.0, {"bits_per_byte": value}, None)
        ledger.use(first.number, 0, "judge", "variant", seed, f"job {seed}")
    other = idea(variant={"pretrain": {"learning_rate": 0.1}})
    assert ledger.register("b", "b", other, {}).known[0].degrees == 1
    another = other.model_copy(update={"recipe": "other.toml"})
    assert ledger.register("c", "c", another, {}).known[0].degrees == 0
    assert ledger.seconds_per_run(other, 0) == 5.0 and ledger.seconds_per_run(another, 0) is None
    ledger.close()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"variant": {"pretrain": {"optimiser": "adamw"}}}, "unknown key pretrain.optimiser"),
        ({"variant": {"pretrain": {"optimizer": "muon"}}}, "are the same recipe"),
        ({"recipe": "gone.toml"}, "gone.toml does not exist"),
    ],
)
def test_a_wrong_recipe_is_told_before_anything_runs(changes, problem, place):
    with pytest.raises(BadInput) as caught:
        try_idea(write(place, **changes), place / "ladder", 2, place)
    assert problem in caught.value.problem
    ledger = Ledger(place / "ladder")
    assert ledger.entries() == []
    ledger.close()


@pytest.mark.parametrize(
    "value",
    [
        True,
        3,
        -0.5,
        "a = b",
        '"\n',
        "诗",
        [],
        [1, 2],
        [{"name": "a b", "exclude": ["x"]}],
        {"k": [1]},
    ],
)
def test_values_are_what_a_recipe_reads(value):
    (word,) = [
        each for each in idea(variant={"a": {"b": value}}).command("variant", 0, 1) if "a.b" in each
    ]
    if not isinstance(value, dict):
        table: dict[str, Any] = {}
        override(table, word)
        assert table == {"a": {"b": value}}


def test_an_arm_measures_every_document(place):
    found = measure(place / "tiny.toml", ["pretrain.steps=2", "seed=4"], place / "run")
    sizes = [size for size, _ in found["documents"]]
    assert len(sizes) > 1
    assert sum(bits for _, bits in found["documents"]) / sum(sizes) == pytest.approx(
        found["bits_per_byte"], rel=1e-4
    )
    assert not (place / "run" / "results.json").exists()
    assert found["tokens"] == 2 * 1024
    assert arm_recipe(ROOT / "recipes" / "demo.toml", []).threads == 1
    recipe = arm_recipe(place / "tiny.toml", [])
    assert recipe.stages == ["data", "tokenizer", "pretrain"]
    config = recipe.sized_model
    assert found["flops"] == 2048 * train_flops_per_token(config, 64, True)


@pytest.mark.slow
def test_an_arm_is_the_run_of_its_recipe(place):
    """The miniature's own bits per byte, from the same training."""
    (place / "same.toml").write_text(MINIATURE.read_text())
    stages = ["data", "tokenizer", "pretrain"]
    done = xushi("run", place / "same.toml", "--stages", ",".join(stages), "--out", place / "whole")
    assert done.returncode == 0, done.stderr
    found = measure(place / "same.toml", [], place / "run")
    results = read_results(place / "whole")
    assert found["bits_per_byte"] == results["evaluate.bits_per_byte"]
    assert found["loss"] == results["pretrain.loss"]
    assert found["parameters"] == results["model.parameters_total"]
    assert found["cache_bytes_per_token"] == results["model.kv_cache_bytes_per_token"]


@pytest.mark.slow
def test_a_recipe_is_tried_killed_and_gone_on_with(place):
    """The kill costs the steps since the last checkpoint, and changes no bit."""
    changes = {"rungs": [{STEPS: 200}], "variant": {"pretrain": {"learning_rate": 0.1}}}
    path = write(place, **changes)
    words = [sys.executable, "-m", "xushi", "try", str(path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen([*words, "--ledger", "killed"], cwd=place, env=env)
    limit = time.monotonic() + 300
    while not list(place.glob("killed/jobs/*/files/run/checkpoints/pretrain/*/manifest.json")):
        assert time.monotonic() < limit and first.poll() is None
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    for name in ("killed", "whole"):
        done = subprocess.run([*words, "--ledger", name], cwd=place, env=env, timeout=600)
        assert done.returncode == 12  # two pairs are few
    for name in ("killed", "whole"):
        jobs_said = [path.read_text() for path in place.glob(f"{name}/jobs/*/stderr.txt")]
        assert len(jobs_said) == 5
        assert any("data: done before" in text for text in jobs_said) == (name == "killed")
    for path in place.glob("killed/jobs/*/files/run/metrics.jsonl"):
        steps = [json.loads(line) for line in path.read_text().splitlines()]
        trained = [each["step"] for each in steps if "loss" in each]
        assert trained.count(1) == 1 and trained[-1] == 200  # no training began twice
    ledgers = [Ledger(place / name) for name in ("killed", "whole")]
    found = [facts(ledger, 1) for ledger in ledgers]
    for ledger in ledgers:
        ledger.close()
    values = [[(pair.baseline, pair.variant) for pair in each.rungs[0].pairs] for each in found]
    assert values[0] == values[1]
    assert found[0].arms["baseline"]["flops"] == found[0].arms["variant"]["flops"] > 0
    assert found[0].result["document_error"] > 0
    page = (place / "killed" / "idea-1.html").read_text()
    assert "training FLOPs" in page and "held-out documents" in page


def test_the_arm_is_no_command_for_people():
    done = xushi_here("arm", "tiny.toml")
    assert done.returncode == 2
    assert "use xushi try" in done.stderr
    assert "arm" not in [
        line.split()[0] for line in xushi_here("--help").stdout.splitlines() if line.split()
    ]


def test_json_of_an_arm_is_one_line(place, monkeypatch, capsys):
    from xushi.cli.ideas import arm

    monkeypatch.setenv(jobs.DIRECTORY, str(place / "job"))
    monkeypatch.setattr("xushi.ladder.arm.measure", lambda *asked: {"asked": list(map(str, asked))})
    arm(Path("tiny.toml"), ["seed=3"])
    assert json.loads(capsys.readouterr().out) == {
        "asked": ["tiny.toml", "['seed=3']", str(place / "job" / "run")]
    }
