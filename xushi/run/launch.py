"""Starting the processes of a run on many machines, and going on with those that are left when one
is lost.

On Slurm torchrun does both: it is started once on each node, finds the others, and starts `xushi
run` anew with as many nodes as are there when some were lost. On Ray this module does it: each
process is an actor. A run that is started anew goes on from its last checkpoint with any number of
processes, so nothing else is needed. `layout.fewest` in the recipe says how many must be left;
without it a lost node ends the job.
"""

import ctypes
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from xushi.base.errors import BadInput, Failed, XushiError
from xushi.base.files import write_atomic
from xushi.base.progress import say
from xushi.run.recipe import Recipe
from xushi.train import LayoutConfig, check_layout

PORT = 29400  # torchrun's own for its rendezvous
SECONDS_TO_PLACE = (
    120.0  # how long Ray may take to start the actors for which it said there was room
)
SECONDS_TO_NOTICE = 20.0  # until Ray knows that a machine is gone; before, it offers its room


@dataclass(frozen=True)
class Launch:
    """How many machines with how many processes each, how often a run may be started anew, and the
    words of `run`.
    """

    nodes: int
    processes: int
    restarts: int
    words: tuple[str, ...]

    def fewest_nodes(self, layout: LayoutConfig) -> int:
        """With how many a run may go on."""
        return (
            self.nodes
            if layout.fewest is None
            else max(1, math.ceil(layout.fewest / self.processes))
        )


def check_launch(recipe: Recipe, launch: Launch) -> None:
    """Raise a `XushiError` unless the recipe's layout works with all nodes and with every number
    that may be left.
    """
    if launch.nodes < 1 or launch.processes < 1 or launch.restarts < 0:
        raise BadInput(
            "nodes and processes must be at least 1 and restarts at least 0",
            "correct these options",
        )
    fewest = launch.fewest_nodes(recipe.layout)
    for nodes in range(launch.nodes, min(fewest, launch.nodes) - 1, -1):
        try:
            check_layout(recipe.layout, recipe.model, nodes * launch.processes, recipe.rows)
        except XushiError as error:
            left = "" if nodes == launch.nodes else f", which may be left of {launch.nodes},"
            raise BadInput(
                f"with {nodes} nodes of {launch.processes} processes{left} {error.problem}",
                error.remedy if not left else f"{error.remedy}; or set layout.fewest higher",
            ) from None


def write_slurm_job(recipe: Recipe, launch: Launch, out: Path, gpus: bool) -> Path:
    """Write the job file into the run directory's parent as <run>.sbatch and return its path."""
    check_launch(recipe, launch)
    fewest = launch.fewest_nodes(recipe.layout)
    nodes = str(launch.nodes) if fewest == launch.nodes else f"{fewest}-{launch.nodes}"
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        nodes.replace("-", ":"),
        "--nproc-per-node",
        str(launch.processes),
        "--max-restarts",
        str(launch.restarts),
        "--rdzv-backend",
        "c10d",
    ]
    lines = [
        "#!/bin/bash",
        f"#SBATCH --job-name=xushi-{recipe.name}",
        f"#SBATCH --nodes={launch.nodes}",
        "#SBATCH --ntasks-per-node=1",
        *([f"#SBATCH --gpus-per-node={launch.processes}"] if gpus else []),
        "#SBATCH --exclusive",
        "#SBATCH --no-kill",
        "#SBATCH --requeue",
        f"#SBATCH --output={out.parent.resolve() / (out.name + '-%j.txt')}",
        "",
        f"# {launch.nodes} nodes of {launch.processes} processes; when some are lost it goes on "
        f"with {fewest} or more.",
        "# A job that Slurm starts anew goes on from the last checkpoint. Partition, account and "
        "time: add your own.",
        'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        f"cd {shlex.quote(os.getcwd())} || exit 1",
        f"srun --no-kill --kill-on-bad-exit=0 {shlex.join(torchrun)} \\",
        f'    --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first:${{XUSHI_PORT:-{PORT}}}" \\',
        f"    -m xushi run {shlex.join(launch.words)}",
    ]
    path = out.parent / f"{out.name}.sbatch"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "\n".join(lines) + "\n")
    return path


def launch_on_ray(recipe: Recipe, launch: Launch, address: str, gpus: bool) -> None:
    """Run on a Ray cluster, each process an actor with one GPU or its share of a machine's cores;
    returns at the end.

    When a process fails or its machine is lost, all are started anew with as many as there is room
    for, down to `layout.fewest`, at most `launch.restarts` times.
    """
    check_launch(recipe, launch)
    try:
        ray = import_module("ray")
    except ImportError as error:
        raise BadInput(f"ray is not installed ({error})", "pip install 'xushi[ray]'") from None
    try:
        ray.init(address=address, log_to_driver=True, ignore_reinit_error=True)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise BadInput(
            f"no Ray cluster answers at {address}: {error}",
            "start one with ray start --head, and give its address, or auto on one of its machines",
        ) from None
    fewest = launch.fewest_nodes(recipe.layout) * launch.processes
    resource = "GPU" if gpus else "CPU"
    for attempt in range(launch.restarts + 1):
        room = [int(node["Resources"].get(resource, 0)) for node in ray.nodes() if node["Alive"]]
        each = 1 if gpus else max(1, max(room, default=0) // launch.processes)
        count = min(
            launch.nodes * launch.processes,
            sum(min(cores // each, launch.processes) for cores in room),
        )
        while count >= fewest and not _fits(recipe, count):
            count -= 1
        if count < fewest:
            raise Failed(
                f"the Ray cluster has room for {count} processes, and {fewest} are needed",
                "add machines, or set layout.fewest lower",
            )
        say(f"attempt {attempt + 1}: {count} processes on {sum(map(bool, room))} machines")
        if (problem := _attempt(ray, launch, count, {f"num_{resource.lower()}s": each})) is None:
            return
        say(
            f"{problem}; what is left goes on from the last checkpoint in {SECONDS_TO_NOTICE:.0f} s"
        )
        time.sleep(SECONDS_TO_NOTICE)
    raise Failed(
        f"the run was started {launch.restarts + 1} times and did not come to its end",
        "see what its processes said; the same command goes on from the last checkpoint",
    )


def _fits(recipe: Recipe, processes: int) -> bool:
    try:
        check_layout(recipe.layout, recipe.model, processes, recipe.rows)
    except XushiError:
        return False
    return True


def _attempt(ray: Any, launch: Launch, count: int, resources: dict[str, int]) -> str | None:
    """Run all processes to their end; None, or why they did not come to it."""
    actor = ray.remote(max_restarts=0, scheduling_strategy="SPREAD", **resources)(_Process)
    processes = [actor.remote() for _ in range(count)]
    try:
        places = ray.get(
            [process.place.remote() for process in processes], timeout=SECONDS_TO_PLACE
        )
        nodes = [node for node, _, _ in places]
        # Processes of a machine get neighbouring numbers, as torchrun's do.
        order = sorted(range(count), key=lambda i: (nodes.index(nodes[i]), i))
        _, host, port = places[order[0]]
        seen: Counter[str] = Counter()
        own_gpu = "num_gpus" in resources  # then Ray shows each process its GPU alone, as number 0
        running = []
        for rank, i in enumerate(order):
            environment = {
                "RANK": rank,
                "WORLD_SIZE": count,
                "MASTER_ADDR": host,
                "MASTER_PORT": port,
                "LOCAL_RANK": 0 if own_gpu else seen[nodes[i]],
                "LOCAL_WORLD_SIZE": nodes.count(nodes[i]),
            }
            seen[nodes[i]] += 1
            running.append(
                processes[i].run.remote(
                    {key: str(value) for key, value in environment.items()},
                    launch.words,
                    os.getcwd(),
                )
            )
        left = list(running)
        while left:
            done, left = ray.wait(left)
            if (status := ray.get(done[0])) != 0:
                return f"process {running.index(done[0])} ended with {status}"
        return None
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
        return f"a process was lost ({str(error).splitlines()[0]})"
    finally:
        for process in processes:
            ray.kill(process)


class _Process:
    """A Ray actor: one process of the run, as a child, so that however it ends the actor can say
    so.
    """

    def place(self) -> tuple[str, str, int]:
        """The machine's name to Ray, its address, and a free port of it."""
        ray = import_module("ray")
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), port

    def run(self, environment: dict[str, str], words: Sequence[str], directory: str) -> int:
        """`xushi run` with torchrun's environment; its exit status."""
        return subprocess.run(
            [sys.executable, "-m", "xushi", "run", *words],
            cwd=directory,
            check=False,
            env={**os.environ, **environment},
            preexec_fn=_die_with_parent,
        ).returncode


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
