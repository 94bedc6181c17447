"""Stages as the recipe, the runner and the report see them."""

from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from xushi.base.errors import BadInput
from xushi.base.files import write_json
from xushi.base.tracking import Tracking
from xushi.run.place import RunPlace, StageRecord, read_record, stage_key, write_record
from xushi.run.recipe import Recipe, load_recipe
from xushi.run.stages import RECIPE_STAGES, STAGES, Results, Stage
from xushi.run.stages import keys_of as chained_keys
from xushi.run.stages.base import Unit

from .conftest import MINIATURE


def keys_of(recipe: Recipe) -> dict[str, str]:
    """The key of each stage, each alone: not chained with those before it."""
    return {stage.name: stage_key(stage.name, stage.reads(), "") for stage in recipe.run_stages()}


def changed_stages(*assignments: str) -> set[str]:
    before, after = (
        keys_of(load_recipe(MINIATURE, [])),
        keys_of(load_recipe(MINIATURE, list(assignments))),
    )
    return {name for name in before if before[name] != after.get(name)}


@pytest.mark.parametrize(
    "changes",
    [{"seconds": "x"}, {"results": []}, {"key": 3}, {"more": 1}, {"seconds": None}],
)
def test_a_damaged_record_is_told(tmp_path: Path, changes: dict[str, Any]) -> None:
    place = RunPlace(tmp_path, Tracking(None))
    assert read_record(place, "data") is None
    record = StageRecord("k", 1.5, {"data.bytes": 3})
    write_record(place, "data", record)
    assert read_record(place, "data") == record
    write_json(place.path("stages", "data.json"), vars(record) | changes)
    with pytest.raises(BadInput, match=r"data\.json is not the record of a stage"):
        read_record(place, "data")


MODEL_STAGES = {"pretrain", "sft", "rl", "control", "evaluate", "export"}


@pytest.mark.parametrize(
    ("assignment", "stages"),
    [
        ("data.salt='other'", {"data"}),
        ("data.sequence_length=32", {"data", "tokenizer", "pretrain"}),
        ("tokenizer.vocab_size=400", {"tokenizer"}),
        ("seed=1", MODEL_STAGES),
        ("model.num_hidden_layers=3", MODEL_STAGES),
        ("pretrain.steps=10", {"pretrain"}),
        ("pretrain.learning_rate=0.5", {"pretrain"}),
        ("sft.steps=10", {"sft", "control"}),
        ("rl.steps=2", {"rl"}),
        ("environment.transcripts=5", {"data", "sft", "rl", "control", "evaluate", "export"}),
        ("evaluate.tasks=7", {"evaluate"}),
        ("name=other", {"export"}),
        ("threads=2", set()),
        ("layout.expert=2", set()),
        ("device=cpu", set()),
    ],
)
def test_a_key_of_the_recipe_is_part_of_the_stages_that_read_it(
    assignment: str, stages: set[str]
) -> None:
    assert changed_stages(assignment) == stages


def test_a_later_stage_notices_that_an_earlier_one_is_left_out() -> None:
    whole = keys_of(load_recipe(MINIATURE, []))
    for left_out in RECIPE_STAGES:
        control = keys_of(load_recipe(MINIATURE, [], without=left_out))
        changed = {name for name in control if control[name] != whole[name]}
        assert changed, left_out


def test_a_stage_that_does_something_else_has_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = keys_of(load_recipe(MINIATURE, []))
    monkeypatch.setattr(STAGES[2], "version", 2)
    after = keys_of(load_recipe(MINIATURE, []))
    assert {name for name in before if before[name] != after[name]} == {STAGES[2].name}


def test_where_and_with_how_many_a_run_goes_on_is_not_what_it_is() -> None:
    recipe = load_recipe(MINIATURE, [])
    for assignment in ("device=cpu", "layout.expert=2", "layout.fewest=1"):
        assert load_recipe(MINIATURE, [assignment]).hash == recipe.hash
    assert load_recipe(MINIATURE, ["threads=2"]).hash != recipe.hash


def test_keys_are_chained() -> None:
    """What one stage reads is in the keys of all that follow, and of none before it."""
    assert stage_key("sft", {"steps": 1}, "a") != stage_key("sft", {"steps": 1}, "b")
    keys = chained_keys(load_recipe(MINIATURE, []).run_stages(), {})
    others = chained_keys(load_recipe(MINIATURE, ["pretrain.warmup_steps=7"]).run_stages(), {})
    names = list(keys)
    assert list(others) == names
    assert [keys[name] == others[name] for name in names] == [True, True] + [False] * 6


@pytest.mark.parametrize(
    ("without", "names"),
    [
        (None, ["data", "tokenizer", "pretrain", "sft", "rl", "control", "evaluate", "export"]),
        ("data", ["data", "tokenizer", "pretrain", "sft", "rl", "control", "evaluate", "export"]),
        ("pretrain", ["data", "tokenizer", "sft", "rl", "control", "evaluate", "export"]),
        ("sft", ["data", "tokenizer", "pretrain", "rl", "evaluate", "export"]),
        ("rl", ["data", "tokenizer", "pretrain", "sft", "evaluate", "export"]),
    ],
)
def test_which_stages_a_run_has(without: str | None, names: list[str]) -> None:
    recipe = load_recipe(MINIATURE, [], without=without)
    assert [stage.name for stage in recipe.run_stages()] == names


@pytest.mark.parametrize(
    ("without", "starts"),
    [
        (None, {"pretrain": None, "sft": "pretrain", "rl": "sft", "control": "sft"}),
        ("pretrain", {"sft": None, "rl": "sft", "control": "sft"}),
        ("sft", {"pretrain": None, "rl": "pretrain"}),
    ],
)
def test_where_training_starts(without: str | None, starts: dict[str, str | None]) -> None:
    stages = load_recipe(MINIATURE, [], without=without).run_stages()
    assert {s.name: s.start for s in stages if hasattr(s, "start")} == starts


@pytest.mark.parametrize(
    ("stages", "problem"),
    [
        (["data", "tokenizer"], "stages must name data, tokenizer, pretrain"),
        (["data", "pretrain", "tokenizer"], "in the order"),
        (["data", "tokenizer", "pretrain", "pretrain"], "one stage twice"),
        (["data", "tokenizer", "pretrain", "evaluate"], "there is no stage 'evaluate'"),
        (["data", "tokenizer", "pretrain", "rl"], "needs stage sft"),
    ],
)
def test_stages_that_a_recipe_cannot_have(stages: list[str], problem: str) -> None:
    with pytest.raises(BadInput, match=problem):
        load_recipe(MINIATURE, [], stages=stages)


def possible_keys(results: type[Results], prefix: str = "") -> set[str]:
    keys = set()
    for name, field in results.model_fields.items():
        kinds = [field.annotation, *get_args(field.annotation)]
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if inner:
            keys |= possible_keys(inner[0], f"{prefix}{name}.")
        else:
            keys.add(prefix + name)
    return keys


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_every_fact_is_one_of_the_stages_own_numbers(stage: type[Stage]) -> None:
    results = stage.run.__annotations__["return"]
    if results is Results:
        results = stage.results.__annotations__["return"]  # type: ignore[attr-defined]
    assert stage.facts
    for fact in stage.facts:
        assert fact.key in possible_keys(results), fact
        assert fact.unit in get_args(Unit) and fact.pattern.count("{}") == 1


def test_results_leave_out_what_was_not_measured() -> None:
    class Inner(Results):
        steps: int
        loss: float | None = None

    class Outer(Results):
        rl: Inner
        sft: Inner | None = None

    assert Outer(rl=Inner(steps=3)).flat() == {"rl.steps": 3}
    whole = Outer(rl=Inner(steps=3, loss=0.0), sft=Inner(steps=1))
    assert whole.flat() == {"rl.steps": 3, "rl.loss": 0.0, "sft.steps": 1}


def test_but_changes_a_recipe_and_checks_it_again(tmp_path: Path) -> None:
    recipe = load_recipe(MINIATURE, [])
    other = recipe.but(**{"pretrain.steps": 7, "environment.max_digits": 4, "seed": 3})
    assert (other.pretrain.steps, other.seed) == (7, 3)
    assert other.environment is not None and other.environment.make().config.max_digits == 4
    assert other.but(**{"pretrain.steps": 200, "environment.max_digits": 3, "seed": 0}) == recipe
    assert recipe.but() == recipe and recipe.but().hash == recipe.hash
    with pytest.raises(BadInput, match=r"unknown key pretrain\.stepz"):
        recipe.but(**{"pretrain.stepz": 7})
    with pytest.raises(BadInput, match="seed is not a table"):
        recipe.but(**{"seed.high": 7})
