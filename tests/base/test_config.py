"""Wrong recipes: each error names the key and says what to do."""

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from xushi.base.config import StrictConfig, override, parse, read_toml
from xushi.base.errors import XushiError


class Inner(StrictConfig):
    steps: int = 10
    rate: float = 0.5


class Outer(StrictConfig):
    name: str
    train: Inner = Inner()
    choices: list[Inner] = Field(default_factory=list)


def fault(table, model=Outer) -> XushiError:
    with pytest.raises(XushiError) as error:
        parse(model, table, "recipe.toml")
    assert "\n" not in error.value.problem and "\n" not in error.value.remedy
    return error.value


def test_a_whole_recipe():
    recipe = parse(
        Outer,
        {"name": "a", "train": {"steps": 3, "rate": 1}, "choices": [{"steps": 1}]},
        "recipe.toml",
    )
    assert recipe.train == Inner(steps=3, rate=1.0) and recipe.choices[0].rate == 0.5


def test_configs_are_fixed():
    with pytest.raises(ValueError, match="frozen"):
        Inner().steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(("table", "key", "remedy"), [
    ({"name": "a", "train": {"stepps": 3}}, "train.stepps", "did you mean steps?"),
    ({"name": "a", "zzz": 3}, "zzz", "choices, name, train"),
    ({"name": "a", "choices": [{"steps": 1}, {"rat": 2}]}, "choices.1.rat", "did you mean rate?"),
    ({}, "name is missing", "--set"),
    ({"name": "a", "train": {"steps": "many"}}, "train.steps", "correct"),
    ({"name": "a", "train": {"steps": 1.5}}, "train.steps", "correct"),
    ({"name": 7}, "name", "correct"),
    ({"name": "a", "train": 3}, "train", "correct"),
])  # fmt: skip
def test_faults_name_the_key(table, key, remedy):
    error = fault(table)
    assert "recipe.toml" in error.problem and key in error.problem and remedy in error.remedy


@pytest.mark.parametrize(("assignment", "expected"), [
    ("train.steps=3", {"train": {"steps": 3}}), ("train.rate=1e-3", {"train": {"rate": 0.001}}),
    ("name=demo", {"name": "demo"}), ("name='3'", {"name": "3"}), ("name=a=b", {"name": "a=b"}),
    ("sizes=[1, 2]", {"sizes": [1, 2]}), ("on=true", {"on": True}), (" a.b.c =4", {"a": {"b": {"c": 4}}}),
])  # fmt: skip
def test_override(assignment, expected):
    table = {}
    override(table, assignment)
    assert table == expected


def test_override_keeps_what_stands_beside():
    table = {"train": {"steps": 1, "rate": 2}, "name": "x"}
    override(table, "train.steps=9")
    assert table == {"train": {"steps": 9, "rate": 2}, "name": "x"}


@pytest.mark.parametrize(
    "assignment",
    ["train.steps", "=3", "name.inner=3", "a=" + "9" * 5000, "a=" + "[" * 5000 + "]" * 5000],
)
def test_bad_overrides(assignment):
    with pytest.raises(XushiError) as error:
        override({"name": "x"}, assignment)
    assert len(error.value.problem) < 400


def test_a_list_is_given_as_a_whole():
    with pytest.raises(XushiError, match="sources' is not a table") as error:
        override({"data": {"sources": [{"weight": 1.0}]}}, "data.sources.0.weight=2")
    assert error.value.remedy == "give the whole list: --set 'data.sources=[...]'"


class Bounded(StrictConfig):
    count: int = Field(3, ge=1, lt=10)
    rate: float = Field(1.0, gt=0, le=2.5)
    names: list[str] = Field(["a"], min_length=1, max_length=2)
    word: str = Field("a", min_length=1, max_length=3)
    way: Literal["in", "out"] = "in"


@pytest.mark.parametrize(("table", "message"), [
    ({"count": 0}, "count: must be at least 1 (got 0)"),
    ({"count": 10}, "count: must be below 10 (got 10)"),
    ({"count": 16**5000}, "count: must be below 10 (got a very long number)"),
    ({"rate": 0}, "rate: must be above 0 (got 0)"),
    ({"rate": 3.0}, "rate: must be at most 2.5 (got 3.0)"),
    ({"rate": float("inf")}, "rate: must be a finite number (got inf)"),
    ({"rate": float("nan")}, "rate: must be a finite number (got nan)"),
    ({"rate": 10**400}, "rate: must be a number (got 1" + "0" * 59 + "... (401 characters))"),
    ({"names": []}, "names: must hold 1 or more entries"),
    ({"names": ["a", "b", "c"]}, "names: must hold at most 2 entries"),
    ({"word": ""}, "word: must have 1 or more characters (got '')"),
    ({"word": "long"}, "word: must have at most 3 characters (got 'long')"),
    ({"way": "up"}, "way: must be 'in' or 'out' (got 'up')"),
])  # fmt: skip
def test_bounds_are_told_in_words(table, message):
    assert fault(table, Bounded).problem == f"recipe.toml: {message}"


def test_a_key_with_a_line_end_stays_on_one_line():
    assert fault({"name": "a", "x\ny": 3}).problem == "recipe.toml: unknown key 'x\\ny'"


def test_a_deep_table_is_an_unknown_key():
    table = {"name": "a"}
    override(table, ".".join(["a"] * 5000) + "=1")
    assert "unknown key a" in fault(table).problem


@given(st.integers(-(10**9), 10**9))
def test_override_reads_integers(value):
    table = {}
    override(table, f"a={value}")
    assert table == {"a": value}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist"),
        (b"a = ", "not valid TOML"),
        (b"a = '\xff'", "cannot be read"),
        (b"a = 1\na = 2", "not valid TOML"),
        (b"a = " + b"9" * 5000, "not valid TOML"),
        (b"a = " + b"[" * 5000 + b"]" * 5000, "not valid TOML"),
    ],
)
def test_unreadable_recipes(tmp_path, content, words):
    path = tmp_path / "recipe.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(XushiError) as error:
        read_toml(path)
    assert words in error.value.problem and str(path) in error.value.problem


def test_a_directory_is_no_recipe(tmp_path):
    with pytest.raises(XushiError, match="cannot be read"):
        read_toml(tmp_path)
