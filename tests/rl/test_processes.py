"""Reinforcement learning on two processes is that of one: gradients, weights, figures; killed and
started again it ends with the same bits.
"""

import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from xushi.train import Layout, latest_checkpoint

from ..train.test_layouts import Box, size, start, together
from .processes import KILLED, VARIANTS, config_of, gradients, trained

pytestmark = pytest.mark.slow
MODULE = "tests.rl.processes"


@pytest.fixture
def place(fine_tuned, tmp_path) -> Path:
    torch.save(fine_tuned().state_dict(), tmp_path / "weights.pt")
    torch.set_num_threads(1)
    return tmp_path


def joined(parts: list[dict[str, Any]], name: str, which: str) -> Tensor:
    """A whole gradient out of the processes' parts."""
    boxes = [Box(**{k: tuple(v) for k, v in part["boxes"][name].items()}) for part in parts]
    whole = torch.full(boxes[0].shape, float("nan"), dtype=torch.float64)
    for box, part in zip(boxes, parts, strict=True):
        whole[box.slices] = part[which][0][name].double()
    assert not whole.isnan().any()
    return whole


@pytest.mark.parametrize("expert", [1, 2])
def test_two_processes_are_one(expert: int, place: Path) -> None:
    """Gradients of one pinned rollout in float64 to its rounding, in float32 within 2e-6 of the
    design's measure, as those of pretraining are.

    Four steps that sample freely draw the same tokens here: the figures that count them are equal.
    Their weights differ by 2e-6 at most. A gradient's error is 2e-6 of the whole gradient's norm
    (0.3), AdamW's step changes by at most 2 * rate / epsilon = 0.6 times that of the gradient: 4e-7
    a step, beside the rounding of the weights (6e-8).
    """
    parts = together(place, 2, {"expert": expert}, MODULE)
    for name in VARIANTS:
        found, figures = gradients(place, Layout(), name, exact=False)
        exact, _ = gradients(place, Layout(), name, exact=True)
        whole = torch.stack([g.norm() for g in exact.values()]).norm()
        assert whole > 1e-3 and parts[0][f"{name} False"][0].keys() == found.keys()
        for key, wanted in exact.items():
            error = (joined(parts, key, f"{name} True") - wanted).norm()
            assert error <= 1e-12 * size(wanted, whole), key
            error = (joined(parts, key, f"{name} False") - found[key].double()).norm()
            assert error <= 2e-6 * size(wanted, whole), key
        for part in parts:  # every process knows the whole batch's figures
            assert part[f"{name} False"][1] == pytest.approx(figures, rel=2e-6, abs=2e-6)

        _, tracked = trained(place, Layout(), place / f"{name}-alone", config_of(name))
        for part in parts:
            for step, alone in zip(part[f"{name} figures"], tracked, strict=True):
                for key in ("reward", "length", "truncated", "with_signal", "router.1.load.0"):
                    assert step[key] == alone[key], key
                assert step["gradient_norm"] == pytest.approx(alone["gradient_norm"], rel=1e-4)
        two, one = (latest_checkpoint(place / end) for end in (name, f"{name}-alone"))
        assert two is not None and one is not None and two.step == one.step
        for key, tensor in one.tensors["model"].items():
            assert (two.read("model", key) - tensor).abs().max() <= 2e-6, key


def newest(place: Path) -> int:
    steps = [int(path.name.removeprefix("step-")) for path in (place / "run").glob("step-*")]
    return max(steps, default=0)


def to_the_end(place: Path) -> dict[str, bytes]:
    started = start(place, 2, MODULE)
    errors = [process.communicate(timeout=300)[1] for process in started]
    assert all(process.returncode == 0 for process in started), "\n".join(errors)
    end = place / "run" / f"step-{KILLED:09d}"
    return {file.name: file.read_bytes() for file in end.iterdir()}


def test_kills_change_nothing(place: Path) -> None:
    torch.save({"expert": 2, "kill": True}, place / "task.pt")
    whole = to_the_end(place)
    (place / "run").rename(place / "whole")
    for kill in range(3):
        before = newest(place)
        started = start(place, 2, MODULE)
        while newest(place) <= before + 2:
            assert all(process.poll() is None for process in started)
            time.sleep(0.005)
        time.sleep(0.05 * kill)
        for process in started:
            process.send_signal(signal.SIGKILL)
        for process in started:
            process.communicate()
        assert before < newest(place) < KILLED, f"kill {kill} came too late"
    assert to_the_end(place) == whole
