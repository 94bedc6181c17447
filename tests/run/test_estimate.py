"""The plan of a run: what stages say, what is measured, and the sentence."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from xushi.base.errors import BadInput
from xushi.base.machine import GIB
from xushi.data import DataConfig
from xushi.data.read_files import ReadFiles, look_at
from xushi.run import costs as module
from xushi.run.costs import measure_text
from xushi.run.estimate import _held_bytes, _seconds, plan_sentence
from xushi.run.recipe import load_recipe
from xushi.run.stages import Costs, Results, Stage

from .conftest import MINIATURE

COSTS = Costs(1e-3, 1e-4, 1.0, 2.0, 3.0, 10_000, 50_000_000)


class Own(Stage):
    """A stage as somebody's file may have it."""

    name = "own"

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def run(self, place: object) -> Results:
        raise NotImplementedError

    def seconds(self, costs: Costs) -> float:
        answer = self.answer
        return answer(costs) if callable(answer) else answer


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda costs: 7 * costs, "cannot say how long it takes: TypeError"),  # once it was a float
        (lambda costs: 0.5 * costs, "cannot say how long it takes: TypeError"),
        (lambda costs: costs.token, "cannot say how long it takes: AttributeError"),
        (lambda costs: {}["steps"], "cannot say how long it takes: KeyError: 'steps'"),
        (None, "cannot say how long it takes: TypeError"),
        (math.nan, "says that it takes nan seconds"),
        (math.inf, "says that it takes inf seconds"),
        (-1, r"says that it takes -1\.0 seconds"),
    ],
)
def test_a_stage_that_cannot_say_how_long_it_takes(answer: object, said: str) -> None:
    with pytest.raises(BadInput, match=f"stage own {said}") as error:
        _seconds(Own(answer), COSTS)
    assert "seconds, which is given xushi.run.stages.Costs" in error.value.remedy


def test_costs_are_not_repeated_like_a_tuple() -> None:
    """Times millions of tokens, a tuple would be gigabytes before it is told as wrong."""
    with pytest.raises(TypeError):
        2 * COSTS  # type: ignore[operator]


def test_a_stage_that_says_it() -> None:
    assert [_seconds(Own(answer), COSTS) for answer in (0, lambda costs: costs.tokenizer)] == [0, 2]


def test_the_measure_of_overlap_is_in_the_time_of_the_data_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a part: 8 seconds for a sample are so much more for the whole text."""
    monkeypatch.setenv("XUSHI_CACHE", str(tmp_path / "cache"))
    now = [0.0]

    def shared(heldout: list[str], training: list[str]) -> float:
        now[0] += 8
        parts.append(len("".join(heldout + training)))
        return 0.0

    def looked(config: DataConfig) -> ReadFiles:
        now[0] += 1
        return look_at(config)

    parts: list[int] = []
    monkeypatch.setattr(module, "look_at", looked)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(module, "shared_fraction", shared)
    monkeypatch.setattr(module, "SAMPLE", 2000)
    (tmp_path / "a.txt").write_text("".join(f"{number:x} words\n" for number in range(1000)))
    size = (tmp_path / "a.txt").stat().st_size
    source = f"data.sources=[{{name = 'a', kind = 'text', glob = '{tmp_path / 'a.txt'}'}}]"
    found = measure_text(load_recipe(MINIATURE, [source, "environment.transcripts=0"]))
    assert parts == [2000 + found.summary.heldout_bytes]
    assert found.data == pytest.approx(1 + 8 * size / parts[0])


def test_the_memory_of_a_plan_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * GIB)
    assert _held_bytes("cuda", 50 * GIB) == 3 * GIB
    assert 50 * GIB < _held_bytes("cpu", 50 * GIB) != 53 * GIB
    plan = {"seconds.total": 60.0, "memory.whole_bytes": 3 * GIB, "data.bytes": 5000}
    for device, said in (("cpu", "3.0 GiB of memory"), ("H200", "3.0 GiB of GPU memory")):
        assert said in plan_sentence(plan | {"machine.device": device})
