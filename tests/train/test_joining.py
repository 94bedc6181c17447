"""Joining the processes that were started. Several of them are in test_layouts."""

import pytest
import torch

from xushi.base.errors import BadInput, XushiError
from xushi.train import LayoutConfig, join
from xushi.train.joining import processes_on_this_machine, started_processes

from .layouts import THIRD

NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, (0, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1)),
        (WHOLE | {"MASTER_PORT": "65535"}, (1, 2)),
        (WHOLE | {"WORLD_SIZE": "1000000"}, (1, 1_000_000)),
    ],
)
def test_processes_from_the_environment(
    environment: dict[str, str], found: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert started_processes() == found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": None}, "WORLD_SIZE=2 is set without RANK"),
        ({"RANK": None, "MASTER_PORT": None}, "without RANK, MASTER_PORT"),
        ({"RANK": "abc"}, "RANK='abc' is not a whole number"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE='' is not a whole number"),
        ({"RANK": "2"}, "RANK=2 is not one of WORLD_SIZE=2"),
        ({"RANK": "-1"}, "RANK='-1' is not a whole number from 0 to 1000000"),
        ({"RANK": "9" * 5000}, r"RANK='9*\.\.\. \(5,002 characters\) is not a whole number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0' is not a whole number from 1 to 1000000"),
        ({"WORLD_SIZE": "1000001"}, "WORLD_SIZE='1000001' is not a whole number from 1 to"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http' is not a whole number from 1 to 65535"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT='65536' is not a whole number from 1 to 65535"),
    ],
)
def test_an_environment_that_cannot_be(
    changes: dict[str, str | None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (WHOLE | changes).items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match=message):
        started_processes()


@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_a_machine_has_one_process_at_least(value: str, monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", value)
    with pytest.raises(
        BadInput, match=f"LOCAL_WORLD_SIZE='{value}' is not a whole number from 1 to"
    ):
        processes_on_this_machine()


def test_one_process_is_a_layout_of_its_own(monkeypatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    layout = join(LayoutConfig(), THIRD)
    assert layout.is_first and layout.data == layout.pipeline == layout.team.size == 1
    assert layout.team.gather("x") == ["x"] and layout.team.broadcast(3) == 3


def test_more_processes_than_gpus_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda _: None)
    for name, value in (WHOLE | {"LOCAL_RANK": "1"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(XushiError, match="which has 1 GPUs"):
        join(LayoutConfig(), THIRD, "cuda")
