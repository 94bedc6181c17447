"""Starting a run on many machines, for which processes on one stand, and going on when one of them
is lost.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from xushi.base.errors import XushiError
from xushi.base.tracking import Tracking
from xushi.run.launch import Launch, check_launch, write_slurm_job
from xushi.run.recipe import load_recipe

from .conftest import MINIATURE, ROOT, Chain, read_results, xushi, xushi_here
from .test_torchrun import hashes

# What Slurm would do, for two nodes: the names of its nodes, and the command once on each.
SCONTROL = "#!/bin/sh\necho localhost\necho localhost\n"
SRUN = """#!/bin/bash
while [ "${1#--}" != "$1" ]; do shift; done
for node in 0 1; do
    setsid "$@" &
    echo $! > "$NODES/$node"
    sleep 1
done
wait
"""


def test_the_job_file_says_what_was_asked(tmp_path: Path) -> None:
    recipe = load_recipe(MINIATURE, ["layout.fewest=4", "layout.expert=2"])
    path = write_slurm_job(
        recipe, Launch(2, 4, 5, (str(MINIATURE), "--out", "a run")), tmp_path / "a run", gpus=True
    )
    text = path.read_text()
    assert (
        path == tmp_path / "a run.sbatch" and subprocess.run(["bash", "-n", path]).returncode == 0
    )
    for words in (
        "--nodes=2\n",
        "--gpus-per-node=4\n",
        "--nnodes 1:2 --nproc-per-node 4 --max-restarts 5",
        "--out 'a run'",
        "#SBATCH --no-kill\n",
    ):
        assert words in text
    whole = write_slurm_job(
        load_recipe(MINIATURE, []), Launch(4, 1, 5, ()), tmp_path / "b", gpus=False
    ).read_text()
    assert "--nnodes 4 " in whole and "gpus" not in whole


@pytest.mark.parametrize(
    "settings, launch, problem",
    [
        (
            ["layout.expert=2", "layout.fewest=1"],
            Launch(2, 1, 3, ()),
            "1 nodes of 1 processes, which layout.fewest allows when nodes are lost: "
            "layout.expert=2",
        ),
        (["layout.data=3"], Launch(2, 1, 3, ()), "2 nodes of 1 processes: layout.data=3"),
        (["layout.fewest=3"], Launch(2, 1, 3, ()), "layout.fewest=3 and 2 processes"),
        ([], Launch(0, 1, 3, ()), "nodes and processes must be at least 1"),
    ],
)
def test_what_could_not_go_on_is_refused_before_it_starts(
    settings: list[str], launch: Launch, problem: str
) -> None:
    with pytest.raises(XushiError, match=problem):
        check_launch(load_recipe(MINIATURE, settings), launch)


def test_a_job_goes_where_the_run_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = xushi_here("launch", MINIATURE, "--slurm", "--set", 'without="rl"')
    assert done.stdout == "sbatch runs/miniature-without-rl.sbatch\n"
    assert (
        "--out runs/miniature-without-rl " in Path("runs/miniature-without-rl.sbatch").read_text()
    )


def test_a_launch_is_one_of_two() -> None:
    done = xushi_here("launch", MINIATURE)
    assert done.returncode == 2 and "either --slurm or --ray ADDRESS" in done.stderr


@pytest.mark.slow
def test_a_lost_node_and_the_job_goes_on_with_the_other(tmp_path: Path, chain: Chain) -> None:
    """The job file itself runs, by another srun; the node that goes is the one that does not hold
    the rendezvous.
    """
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    run = tmp_path / "run"
    done = xushi(
        "launch",
        MINIATURE,
        "--slurm",
        "--nodes",
        "2",
        "--restarts",
        "3",
        "--out",
        run,
        "--set",
        "layout.fewest=1",
        "--set",
        'stages=["data", "tokenizer", "pretrain"]',
    )
    assert done.returncode == 0 and done.stdout == f"sbatch {tmp_path / 'run.sbatch'}\n"
    job = subprocess.Popen(
        ["bash", tmp_path / "run.sbatch"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "two",
            "NODES": str(tmp_path),
            "XUSHI_PORT": "29473",
        },
    )
    while not list((run / "checkpoints" / "pretrain").glob("step-*")):
        assert job.poll() is None, job.communicate()[1][-3000:]
        time.sleep(0.05)
    torchrun = int((tmp_path / "1").read_text())
    for process in (torchrun, *children(torchrun)):  # a machine that is lost takes all with it
        os.kill(process, signal.SIGKILL)
    _, said = job.communicate(timeout=400)
    assert job.returncode == 0, said[-3000:]
    assert (
        "began with the layout {'data': 2, 'pipeline': 1, 'expert': 1} and continues with "
        "{'data': 1" in said
    )
    assert read_results(run)["pretrain.steps"] == 200
    assert hashes(run, "pretrain", 200) == hashes(chain.directory, "pretrain", 200)
    events = Tracking(run / "tracking.sqlite").events("pretrain", "started")
    assert len(events) >= 2


def children(parent: int) -> list[int]:
    """The processes that a process has started."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if int((place / "stat").read_text().rsplit(")", 1)[1].split()[1]) == parent:
                found.append(int(place.name))
        except OSError:
            continue
    assert found
    return found


@pytest.mark.slow
def test_a_lost_machine_of_a_ray_cluster(tmp_path: Path, chain: Chain) -> None:
    script = f"""
import threading, time
from pathlib import Path
from ray.cluster_utils import Cluster
from xushi.run.recipe import load_recipe
from xushi.run.launch import Launch, launch_on_ray

cluster = Cluster(initialize_head=True, head_node_args={{"num_cpus": 1}})
other = cluster.add_node(num_cpus=1)
run = Path({str(tmp_path / "run")!r})
words = [{str(MINIATURE)!r}, "--out", str(run), "--set", "layout.fewest=1", "--stages", "data,tokenizer,pretrain"]

def lose():
    while not list((run / "checkpoints" / "pretrain").glob("step-*")):
        time.sleep(0.05)
    cluster.remove_node(other, allow_graceful=False)

threading.Thread(target=lose, daemon=True).start()
recipe = load_recipe(Path({str(MINIATURE)!r}), ["layout.fewest=1"])
launch_on_ray(recipe, Launch(2, 1, 3, tuple(words)), cluster.address, gpus=False)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stderr + done.stdout
    assert "attempt 1: 2 processes" in said and ": 1 processes on 1 machines" in said
    assert read_results(tmp_path / "run")["pretrain.steps"] == 200
    assert hashes(tmp_path / "run", "pretrain", 200) == hashes(chain.directory, "pretrain", 200)
