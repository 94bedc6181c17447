"""Joining the processes that were started. Several of them are in test_layouts."""

import pytest
import torch

from xushi.base.errors import XushiError
from xushi.train import LayoutConfig, join

from .layouts import THIRD


def test_one_process_is_a_layout_of_its_own(monkeypatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    layout = join(LayoutConfig(), THIRD)
    assert layout.is_first and layout.data == layout.pipeline == layout.team.size == 1
    assert layout.team.gather("x") == ["x"] and layout.team.broadcast(3) == 3


def test_more_processes_than_gpus_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda _: None)
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(XushiError, match="which has 1 GPUs"):
        join(LayoutConfig(), THIRD, "cuda")
