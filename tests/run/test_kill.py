"""Killed at ten random moments over all stages and started again with the same command: the same
bits.
"""

import hashlib
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from .conftest import MINIATURE, ROOT, XUSHI, Chain, read_results, xushi

STAGES = ("data", "tokenizer", "pretrain", "sft", "rl", "control", "evaluate", "export")
# Where the ten kills fall; the moment inside the stage is random, by the time it took when it was
# left alone.
TARGETS = (
    "data",
    "tokenizer",
    "pretrain",
    "pretrain",
    "pretrain",
    "sft",
    "sft",
    "rl",
    "rl",
    "export",
)

pytestmark = pytest.mark.slow


def start(directory: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*XUSHI, "run", str(MINIATURE), "--out", str(directory)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=dict(os.environ),
    )


def wait_for_stage(directory: Path, stage: str, process: subprocess.Popen[bytes]) -> None:
    """Until `stage` was started in this directory, by this process or an earlier one."""
    deadline = time.monotonic() + 300
    while not (directory / "stages" / f"{stage}.started").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)


def weights(directory: Path) -> dict[str, str]:
    return {
        name: hashlib.sha256(
            (directory / "export" / name / "model.safetensors").read_bytes()
        ).hexdigest()
        for name in ("base", "reasoning")
    }


def test_ten_kills_change_nothing(chain: Chain, tmp_path: Path) -> None:
    directory, moments = tmp_path / "run", random.Random(20261124)
    hit = []
    for target in TARGETS:
        process = start(directory)
        wait_for_stage(directory, target, process)
        time.sleep(moments.uniform(0.0, 0.7 * chain.results[f"seconds.{target}"]))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            hit.append(
                [stage for stage in STAGES if (directory / "stages" / f"{stage}.started").exists()][
                    -1
                ]
            )
        process.wait()
    assert len(hit) >= 9 and len(set(hit)) >= 4, hit
    final = xushi("run", MINIATURE, "--out", directory)
    assert final.returncode == 0, final.stderr
    assert weights(directory) == weights(chain.directory)
    results = read_results(directory)
    for key in (
        "evaluate.bits_per_byte",
        "rl.greedy_before",
        "rl.greedy_after",
        "rl.avg8_after",
        "rl.forced_before",
    ):
        assert results[key] == chain.results[key], key


def test_ctrl_c_saves_and_says_how_to_go_on(chain: Chain, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    process = subprocess.Popen(
        [*XUSHI, "run", str(MINIATURE), "--out", str(directory)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list((directory / "checkpoints" / "pretrain").glob("step-*")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command again" in said and "Traceback" not in said
    saved = max(
        int(path.name.removeprefix("step-"))
        for path in (directory / "checkpoints" / "pretrain").glob("step-*")
    )
    assert 0 < saved < 200
    final = xushi("run", MINIATURE, "--out", directory)
    assert final.returncode == 0, final.stderr
    assert weights(directory) == weights(chain.directory)
