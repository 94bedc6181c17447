"""Training killed with -9 at random moments, many of them while a checkpoint is written: the same
bytes at the end.
"""

import random
import signal
import time
from pathlib import Path

import pytest
import torch

from .test_layouts import start

pytestmark = pytest.mark.slow

STEPS = 400


def newest(place: Path) -> int:
    return max(
        (int(path.name.removeprefix("step-")) for path in (place / "run").glob("step-*")), default=0
    )


def train_to_the_end(place: Path, processes: int) -> dict[str, bytes]:
    started = start(place, processes)
    said = [process.communicate(timeout=300)[1] for process in started]
    assert all(process.returncode == 0 for process in started), "\n".join(said)
    return {
        file.name: file.read_bytes() for file in (place / "run" / f"step-{STEPS:09d}").iterdir()
    }


@pytest.mark.parametrize("processes, kills", [(1, 20), (2, 6)])
def test_kills_change_nothing(processes: int, kills: int, tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        torch.save({"kill": STEPS}, tmp_path / name / "task.pt")
    whole = train_to_the_end(tmp_path / "whole", processes)
    moments, within = random.Random(processes), 0
    for kill in range(kills):
        before = newest(tmp_path / "killed")
        started = start(tmp_path / "killed", processes)
        # Not before it has trained a little further, and so that all kills fall within the steps
        # there are.
        while newest(tmp_path / "killed") <= before + 1:
            assert all(process.poll() is None for process in started)
            time.sleep(0.005)
        time.sleep(moments.uniform(0.0, 0.2))
        deadline = time.monotonic() + 1.0
        while (
            kill % 2
            and time.monotonic() < deadline
            and not list((tmp_path / "killed" / "run").glob(".step-*"))
        ):
            pass  # every other one while a checkpoint is written
        for process in started:
            process.send_signal(signal.SIGKILL)
        for process in started:
            process.communicate()
        assert newest(tmp_path / "killed") < STEPS, f"kill {kill} came too late"
        within += bool(list((tmp_path / "killed" / "run").glob(".step-*")))
    print(f"{within} of {kills} kills fell into the writing of a checkpoint")
    assert within >= kills // 5
    assert train_to_the_end(tmp_path / "killed", processes) == whole
