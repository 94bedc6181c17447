"""xushi try and xushi tried: exit codes, what is printed, and what is refused."""

import json

import pytest

from ..miniature import xushi_here
from .conftest import PYTHON


def lines(text: str) -> list[dict]:
    """JSON as everybody reads it: without NaN and Infinity."""

    def refuse(name: str) -> float:
        raise ValueError(name)

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


@pytest.mark.parametrize(
    ("verdict", "code", "gain", "smallest_effect", "pairs"),
    [
        ("better", 0, 0.5, 0.01, 4),
        ("none", 10, 0.5, 9, 2),
        ("worse", 11, -0.5, 0.01, 4),
        ("unsettled", 12, 0.002, 0.001, 2),
    ],
)
def test_the_exit_code_is_the_verdict(write_idea, verdict, code, gain, smallest_effect, pairs):
    variant = f"{PYTHON} train.py --seed {{seed}} --gain {gain}"
    path = write_idea(variant=variant, smallest_effect=smallest_effect, pairs=pairs)
    done = xushi_here("try", path, "--json")
    assert done.returncode == code
    (result,) = lines(done.stdout)
    assert result["verdict"] == verdict
    low, high = result["interval"]
    assert low < result["difference"] < high
    assert {"promoted", "pairs", "seconds", "rungs"} <= set(result)
    assert "low" not in result
    again = xushi_here("try", path)
    assert again.returncode == code
    assert again.stdout.startswith(f"idea: {verdict}")
    assert len(again.stdout.splitlines()) == 1


def test_the_last_line_is_of_the_last_idea(write_idea, place):
    first = write_idea("first", smallest_effect=9, pairs=2)
    variant = f"{PYTHON} train.py --seed {{seed}} --gain -0.5"
    second = write_idea("second", variant=variant)
    done = xushi_here("try", first, second, "--json", "--ledger", "elsewhere", "--workers", "1")
    assert done.returncode == 11
    assert [each["name"] for each in lines(done.stdout)] == ["first", "second"]
    assert (place / "elsewhere").is_dir()
    assert not (place / "ladder").exists()
    found = xushi_here("tried", "--ledger", "elsewhere", "--json")
    (table,) = lines(found.stdout)
    assert [each["result"]["verdict"] for each in table["ideas"]] == ["none", "worse"]
    shown = xushi_here("tried", "--ledger", "elsewhere").stdout.splitlines()
    assert "first" in shown[1]
    assert "worse" in shown[2]


def test_two_ideas_with_one_name(write_idea, place, runs):
    path = write_idea("same")
    (place / "deeper").mkdir()
    (place / "deeper" / "same.toml").write_text(path.read_text())
    done = xushi_here("try", path, place / "deeper" / "same.toml")
    assert done.returncode == 2
    assert "two ideas have the name same" in done.stderr
    assert runs() == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "no idea is given"),
        (("missing.toml",), "missing.toml"),
        (("idea.toml", "--judge", "logs.csv"), "an idea and --judge are given"),
        (("--judge", "logs.csv"), "needs --smallest-effect"),
        (("--judge", "logs.csv", "--smallest-effect", "nan"), "needs --smallest-effect"),
        (("--judge", "logs.csv", "--smallest-effect", "-1"), "needs --smallest-effect"),
        (("--judge", "logs.csv", "--smallest-effect", "1", "--columns", "arm,run"), "has 2 names"),
        (("--judge", "logs.csv", "--smallest-effect", "1", "--arms", "a"), "names 1 arms"),
        (("--judge", "logs.csv", "--smallest-effect", "1", "--arms", "a,d"), "no arm d"),
        (("idea.toml", "--workers", "0"), "workers"),
    ],
)
def test_what_cannot_be_done_is_two_lines(place, write_idea, arguments, said):
    write_idea()
    (place / "logs.csv").write_text("arm,run,metric\na,1,1\nb,1,2\n")
    done = xushi_here("try", *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 2
    assert done.stdout == ""


def test_a_failing_command_is_exit_code_one(write_idea):
    done = xushi_here("try", write_idea("fails", "raise SystemExit('out of memory')"), "--json")
    assert done.returncode == 1
    assert "out of memory" in done.stderr
    assert done.stdout == ""


def test_no_ledger_is_said_and_none_is_made(place):
    for name in ("missing", "."):
        done = xushi_here("tried", "--ledger", name)
        assert done.returncode == 2
        assert "there is no ledger at" in done.stderr
    assert [path.name for path in place.iterdir()] == ["train.py"]


LOGS = (
    "arm,run,metric\n"
    "a,1,10\na,2,10.1\na,3,9.9\nb,1,5\nb,2,5.1\nb,3,4.9\nc,1,5.2\nc,2,5\nc,3,5.1\nd,1,3\n"
)


def test_logs_are_judged(place):
    (place / "logs.csv").write_text(LOGS)
    judge = ("try", "--judge", "logs.csv", "--smallest-effect", "1")
    done = xushi_here(*judge, "--json")
    assert done.returncode == 0
    found = lines(done.stdout)
    assert [(each["baseline"], each["variant"]) for each in found] == [
        ("a", "b"), ("b", "c"), ("c", "d"),
    ]  # fmt: skip
    assert [each["verdict"] for each in found] == ["better", "none", "unsettled"]
    assert (found[2]["low"], found[2]["high"]) == (None, None)
    turned = xushi_here(*judge, "--arms", "a,b", "--higher-is-better")
    assert turned.returncode == 11
    assert turned.stdout.startswith("b against a: worse: gain -5 ")
    assert xushi_here(*judge, "--arms", "b,c").returncode == 10
    assert xushi_here(*judge, "--arms", "c,d").returncode == 12
    assert not (place / "ladder").exists()
