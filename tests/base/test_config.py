"""Wrong recipes: each error names the key and says what to do."""

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


@pytest.mark.parametrize("assignment", ["train.steps", "=3", "name.inner=3"])
def test_bad_overrides(assignment):
    with pytest.raises(XushiError):
        override({"name": "x"}, assignment)


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
