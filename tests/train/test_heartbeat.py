"""A process that is killed, stopped or stands still is named by one that is well, all end, and the
run can go on.
"""

import signal
import time
from pathlib import Path

import pytest
import torch

from xushi.train import Layout, Team, latest_checkpoint
from xushi.train.heartbeat import Heartbeat

from .layouts import resumed
from .test_layouts import start


@pytest.mark.parametrize(
    "what, victim, said",
    [
        pytest.param("SIGKILL", 1, "process 1 (number {0} on", marks=pytest.mark.slow),
        pytest.param("SIGKILL", 0, "process 0", marks=pytest.mark.slow),
        pytest.param("SIGSTOP", 1, "process 1 (number {0} on", marks=pytest.mark.slow),
        pytest.param("SIGSTOP", 0, "process 0", marks=pytest.mark.slow),
        pytest.param("stands still", 1, "process 1 (number {0} on", marks=pytest.mark.slow),
    ],
)
def test_who_is_lost_is_named_and_the_run_goes_on(
    what: str, victim: int, said: str, tmp_path: Path
) -> None:
    torch.save({"endless": victim if what == "stands still" else None}, tmp_path / "task.pt")
    processes = start(tmp_path, 2)
    deadline = time.monotonic() + 120
    try:
        while not list((tmp_path / "run").glob("step-*")):
            assert time.monotonic() < deadline and all(
                process.poll() is None for process in processes
            )
            time.sleep(0.05)
        if what != "stands still":
            processes[victim].send_signal(getattr(signal, what))
        well = processes[1 - victim]
        _, heard = well.communicate(timeout=60)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert well.returncode == 1, heard[-2000:]
    assert said.format(processes[victim].pid) in heard and "Traceback" not in heard, heard[-2000:]
    ends = {
        "SIGKILL": "died",
        "SIGSTOP": "gave no sign of life for 3 s",
        "stands still": "did not move for 3 s",
    }
    assert ends[what] in heard
    checkpoint = latest_checkpoint(tmp_path / "run")
    assert checkpoint is not None and checkpoint.step >= 2
    # One process goes on with what two began.
    resumed("v3", Layout(), tmp_path / "run", checkpoint.step + 3, checkpoint.step + 2)
    again = latest_checkpoint(tmp_path / "run")
    assert again is not None and again.step == checkpoint.step + 2


def test_alone_there_is_nobody_to_watch() -> None:
    with Heartbeat(Team(), pytest.fail) as heart:
        heart.at(1, "batch")
        assert heart.who_is_gone() == ""


def test_a_start_is_not_judged_before_a_step_was_measured() -> None:
    """A resumed run whose steps take more than a minute must not be ended by its first ones."""
    heart = Heartbeat(Team(), pytest.fail)
    for step in (1200, 1201):
        heart.at(step, "batch")
        heart.at(step, "step")
        assert not heart._seconds
    heart.at(1202, "batch")
    assert len(heart._seconds) == 1


def test_the_limit_is_a_minute_or_five_median_steps() -> None:
    heart = Heartbeat(Team(), pytest.fail)
    assert heart._limit() == 60.0
    heart._seconds.extend([1.0, 40.0, 50.0])
    assert heart._limit() == 200.0
    heart._seconds.extend([1.0] * 10)
    assert heart._limit() == 60.0


def test_a_step_that_enters_its_batch_phase_twice_is_timed_once() -> None:
    """As reinforcement learning does, before and after its weights are gathered."""
    heart = Heartbeat(Team(), print)
    for step in range(5):
        for phase in ("batch", "step", "batch", "step", "save"):
            heart.at(step, phase)
    assert len(heart._seconds) == 3  # steps 1 to 3, once the next one begins; not the first
