"""Ideas: their keys, their commands, the files they read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xushi.base.errors import BadInput
from xushi.ladder.idea import ARMS, Idea, entry_hash, files_read, read_idea

KEYS = {
    "question": "?",
    "baseline": "train {seed}",
    "variant": "train {seed} --muon",
    "metric": "loss",
    "smallest_effect": 0.1,
}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"variant": "train  {seed}"}, "are the same command"),
        ({"variant": "train --muon"}, "variant has no {seed}"),
        ({"variant": "train {seed} {size}"}, "variant has {size}, which is no key"),
        ({"sizes": [1, 2]}, "baseline has no {size}, which the rungs give"),
        ({"rungs": [{"a": 1}, {"b": 1}]}, "every rung must have the same keys"),
        ({"rungs": [{"seed": 1}]}, "rungs cannot set seed"),
        ({"sizes": [1], "rungs": [{"a": 1}]}, "give sizes or rungs, not both"),
        ({"variant": "train '{seed}"}, "variant is not a command: No closing quotation"),
        ({"variant": "train {seed} a\0b"}, "variant is not a command: it has a zero byte"),
        ({"smallest_effect": 0}, "smallest_effect"),
        ({"smallest_effect": float("nan")}, "smallest_effect"),
        ({"pairs": 1}, "pairs"),
        ({"pairs": 65}, "pairs"),
        ({"deadline_seconds": 0}, "deadline_seconds"),
        ({"question": ""}, "question"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_ideas_that_cannot_be_asked(tmp_path, change, problem):
    path = tmp_path / "idea.toml"
    lines = []
    for key, value in (KEYS | change).items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            tables = ", ".join(f"{{{k} = {v}}}" for each in value for k, v in each.items())
            lines.append(f"{key} = [{tables}]")
        elif isinstance(value, str):
            lines.append(f'{key} = "{value}"'.replace("\0", "\\u0000"))
        else:
            lines.append(f"{key} = {value}")
    path.write_text("\n".join(lines))
    with pytest.raises(BadInput) as caught:
        read_idea(path)
    assert problem in str(caught.value)
    assert str(path) in caught.value.problem


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(BadInput):
        read_idea(tmp_path / "missing.toml")
    (tmp_path / "broken.toml").write_text("question = ")
    with pytest.raises(BadInput):
        read_idea(tmp_path / "broken.toml")


def test_values_are_put_into_words_and_never_split():
    idea = Idea(
        question="?",
        baseline="train '{name}' --x={size} {seed}",
        variant="train {name} --x={size} {seed} {\"json\": 1} b",
        metric="loss",
        smallest_effect=1,
        rungs=[{"name": "a b; $c {seed}", "size": 1.5}, {"name": "d", "size": 2}],
    )  # fmt: skip
    assert idea.command("baseline", 0, 7) == ["train", "a b; $c {seed}", "--x=1.5", "7"]
    assert idea.command("variant", 1, 8) == ["train", "d", "--x=2", "8", "{json:", "1}", "b"]
    assert Idea(**KEYS).all_rungs() == [{}]


def test_files_that_commands_name(tmp_path):
    for name in ("train.py", "muon.py", "c-1.toml", "c-2.toml", "lib.py", "not-read.py"):
        (tmp_path / name).write_text(name)
    idea = Idea(
        question="?",
        baseline="python ./train.py --config=c-{size}.toml {seed}",
        variant="python train.py --config c-{size}.toml --part=muon.py {seed} " + "x" * 5000,
        metric="loss",
        smallest_effect=1,
        sizes=[1, 2, 3],
        reads=["l*.py"],
    )
    both = {"train.py", "c-1.toml", "c-2.toml", "lib.py"}
    assert set(files_read(idea, tmp_path)) == both | {"muon.py"}
    assert set(files_read(idea, tmp_path, ["baseline"])) == both
    before = files_read(idea, tmp_path)
    (tmp_path / "muon.py").write_text("other")
    after = files_read(idea, tmp_path)
    assert {name for name in before if before[name] != after[name]} == {"muon.py"}
    assert entry_hash(idea, before) != entry_hash(idea, after)


@pytest.mark.parametrize("pattern", ["none/*.py", "/etc/host*", "../*", "a/../../*"])
def test_patterns_stay_inside_and_match(tmp_path, pattern):
    here = tmp_path / "here"
    (here / "a").mkdir(parents=True)
    (tmp_path / "outside").write_text("")
    with pytest.raises(BadInput, match="matches no file"):
        files_read(Idea(**KEYS, reads=[pattern]), here)


@given(st.sampled_from(sorted(KEYS)))
def test_every_key_is_part_of_the_question(key):
    change = {"smallest_effect": 0.2}.get(key, f"{KEYS[key]} x")
    before, after = Idea(**KEYS), Idea(**KEYS | {key: change})
    assert entry_hash(before, {}) != entry_hash(after, {})
    assert entry_hash(before, {}) == entry_hash(Idea(**KEYS), {})
    assert [before.command(arm, 0, 1)[:2] for arm in ARMS] == [["train", "1"]] * 2
