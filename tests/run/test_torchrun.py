"""The miniature recipe on two processes: the batches of one, a model as good, and any number of
processes may go on.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from xushi.base.tracking import Tracking

from .conftest import MINIATURE, ROOT, Chain, read_results, xushi

pytestmark = pytest.mark.slow

TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "2",
    "-m",
    "xushi",
]


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*TORCHRUN, *map(str, arguments)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def started_until_a_checkpoint(
    directory: Path, stage: str, *arguments: str | Path
) -> subprocess.Popen[str]:
    """The run at the moment when `stage` has its first checkpoint."""
    process = start(*arguments)
    while not list((directory / "checkpoints" / stage).glob("step-*")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    return process


def hashes(directory: Path, stage: str, steps: int) -> list[str]:
    store = Tracking(directory / "tracking.sqlite")
    found = [record.hash for record in store.batches(stage, steps)]
    store.close()
    return found


def test_killed_on_two_and_gone_on_with_by_one_it_sees_the_same_batches(
    chain: Chain, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    for stage, layout in (("pretrain", "layout.expert=2"), ("sft", "layout.pipeline=2")):
        process = started_until_a_checkpoint(
            directory, stage, "run", MINIATURE, "--out", directory, "--set", layout
        )
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    newest = max((directory / "checkpoints" / "pretrain").glob("step-*"))
    assert {file.name for file in newest.glob("model*")} == {
        "model-00000-of-00002.safetensors",
        "model-00001-of-00002.safetensors",
    }

    done = xushi("run", MINIATURE, "--out", directory)
    assert done.returncode == 0, done.stderr
    assert (
        "began with the layout {'data': 2, 'pipeline': 1, 'expert': 2} and continues with {'data': "
        "1, 'pipeline': 1, "
        "'expert': 1}"
    ) in done.stderr
    for stage, steps in (("pretrain", 200), ("sft", 160)):
        assert hashes(directory, stage, steps) == hashes(chain.directory, stage, steps)
    results = read_results(directory)
    # Another order of sums and then another routing now and then: as good a model, not the same
    # one.
    assert results["evaluate.bits_per_byte"] == pytest.approx(
        chain.results["evaluate.bits_per_byte"], rel=0.02
    )
    assert results["rl.forced_before"] > 0.8


def worker(process: subprocess.Popen[str], rank: int) -> int:
    """The number of one of torchrun's processes."""
    for status in Path("/proc").glob("[0-9]*/environ"):
        try:
            environment = dict(
                part.split("=", 1)
                for part in status.read_bytes().decode().split("\0")
                if "=" in part
            )
            parent = int((status.parent / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, ValueError):
            continue
        if parent == process.pid and environment.get("RANK") == str(rank):
            return int(status.parent.name)
    raise AssertionError("no such process")


def test_a_worker_that_dies_is_named(tmp_path: Path) -> None:
    process = started_until_a_checkpoint(
        tmp_path / "run",
        "pretrain",
        "run",
        MINIATURE,
        "--out",
        tmp_path / "run",
        "--set",
        "layout.expert=2",
    )
    victim = worker(process, 1)
    os.kill(victim, signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert (
        process.returncode != 0
        and f"pretrain: process 1 (number {victim} on" in said
        and "died" in said
    )


@pytest.mark.parametrize("layout", ["layout.data=2", "layout.pipeline=2"])
def test_a_whole_run_on_two_speaks_once(layout: str, tmp_path: Path) -> None:
    process = start(
        "run",
        MINIATURE,
        "--out",
        tmp_path / "run",
        "--stages",
        "data,tokenizer,pretrain",
        "--set",
        "pretrain.steps=20",
        "--set",
        layout,
    )
    said, warned = process.communicate(timeout=300)
    assert process.returncode == 0, warned
    assert (
        said.count("report:") == 1
        and warned.count("pretrain: finished") == 1
        and warned.count("20/20") == 1
    )
    assert read_results(tmp_path / "run")["pretrain.steps"] == 20


def test_a_stage_from_a_file_trains_on_two(tmp_path: Path) -> None:
    own = ROOT / "tests" / "contracts" / "stages.py"
    sets = ["pretrain.steps=6", "denoise.steps=4", "denoise.learning_rate=0.001"]
    process = start(
        "run",
        MINIATURE,
        "--out",
        tmp_path / "run",
        "--stages",
        f"data,tokenizer,pretrain,{own}:Denoise",
        *(word for each in sets for word in ("--set", each)),
    )
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    results = read_results(tmp_path / "run")
    assert results["denoise.steps"] == 4 and results["denoise.replaced"] > 0


def test_a_layout_that_cannot_be_is_refused_by_all(tmp_path: Path) -> None:
    process = start("run", MINIATURE, "--out", tmp_path / "run", "--set", "layout.expert=3")
    _, said = process.communicate(timeout=120)
    assert (
        process.returncode != 0
        and "layout.expert=3 does not divide the 2 processes that share a batch" in said
    )
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.doc").write_text("do not touch")
    process = start("run", MINIATURE, "--out", tmp_path / "run")
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0 and "is not a run directory" in said
    assert "process 1: process 0 exited" in said
