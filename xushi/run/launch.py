"""Start a run's processes on many machines, and continue with the remaining ones when one is lost.

On Slurm torchrun does both: it is started once on each node, finds the others, and restarts `xushi
run` on the remaining nodes when some are lost. On Ray this module does it: each process is an
actor. A restarted run continues from its last checkpoint with any number of processes, so nothing
else is needed. `layout.fewest` in the recipe is the smallest number of processes to continue with;
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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from xushi.base.errors import BadInput, Failed, XushiError
from xushi.base.files import write_atomic
from xushi.base.progress import say
from xushi.run.recipe import Recipe
from xushi.train import LayoutConfig, check_layout

PORT = 29400  # torchrun's default for its rendezvous
# How long Ray may take to start the actors after it has reported enough free resources.
SECONDS_TO_PLACE = 120.0
# How long Ray takes to notice that a machine is lost. Until then it still counts its resources.
SECONDS_TO_NOTICE = 20.0


@dataclass(frozen=True)
class Launch:
    """How to start a run: `nodes` machines with `processes` each, restarted up to `restarts` times.

    `arguments` are those of `xushi run`.
    """

    nodes: int
    processes: int
    restarts: int
    arguments: tuple[str, ...]

    def fewest_nodes(self, layout: LayoutConfig) -> int:
        """The smallest number of nodes that the run may continue with."""
        if layout.fewest is None:
            return self.nodes
        return max(1, math.ceil(layout.fewest / self.processes))


def check_launch(recipe: Recipe, launch: Launch) -> None:
    """Raise a `XushiError` unless the layout works with every number of nodes that may remain."""
    if launch.nodes < 1 or launch.processes < 1 or launch.restarts < 0:
        raise BadInput(
            "nodes and processes must be at least 1 and restarts at least 0",
            "correct --nodes, --processes or --restarts",
        )
    fewest = launch.fewest_nodes(recipe.layout)
    for nodes in range(launch.nodes, min(fewest, launch.nodes) - 1, -1):
        try:
            check_layout(recipe.layout, recipe.model, nodes * launch.processes, recipe.rows)
        except XushiError as error:
            if nodes == launch.nodes:
                raise BadInput(
                    f"{nodes} nodes of {launch.processes} processes: {error.problem}", error.remedy
                ) from None
            raise BadInput(
                f"{nodes} nodes of {launch.processes} processes, which layout.fewest allows when "
                f"nodes are lost: {error.problem}",
                f"{error.remedy}; or set layout.fewest higher",
            ) from None


def write_slurm_job(recipe: Recipe, launch: Launch, out: Path, gpus: bool) -> Path:
    """Write the job file `<run>.sbatch` beside the run directory `out` and return its path."""
    check_launch(recipe, launch)
    fewest = launch.fewest_nodes(recipe.layout)
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
        f"# {launch.nodes} nodes of {launch.processes} processes; when some are lost, the job "
        f"continues with {fewest} or more.",
        "# A job that Slurm starts again continues from the last checkpoint. Add your partition, "
        "account and time limit.",
        'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        f"cd {shlex.quote(os.getcwd())} || exit 1",
        f"srun --no-kill --kill-on-bad-exit=0 {shlex.join(_torchrun(launch, fewest))} \\",
        f'    --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first:${{XUSHI_PORT:-{PORT}}}" \\',
        f"    -m xushi run {shlex.join(launch.arguments)}",
    ]
    path = out.parent / f"{out.name}.sbatch"
    write_atomic(path, "\n".join(lines) + "\n")
    return path


def _torchrun(launch: Launch, fewest: int) -> list[str]:
    nodes = str(launch.nodes) if fewest == launch.nodes else f"{fewest}:{launch.nodes}"
    options = {
        "--nnodes": nodes,
        "--nproc-per-node": launch.processes,
        "--max-restarts": launch.restarts,
        "--rdzv-backend": "c10d",
    }
    words = [str(word) for option in options.items() for word in option]
    return [sys.executable, "-m", "torch.distributed.run", *words]


def launch_on_ray(recipe: Recipe, launch: Launch, address: str, gpus: bool) -> None:
    """Run on a Ray cluster and return when the run has ended.

    Each process is an actor with one GPU, or with its share of a machine's cores. When a process
    fails or its machine is lost, all processes are restarted, as many as the cluster has resources
    for and at least `layout.fewest`. This happens at most `launch.restarts` times.
    """
    check_launch(recipe, launch)
    ray = _connect(address)
    for attempt in range(launch.restarts + 1):
        count, resources = _available(ray, recipe, launch, "GPU" if gpus else "CPU", attempt + 1)
        problem = _attempt(ray, launch, count, resources)
        if problem is None:
            return
        if attempt == launch.restarts:
            break
        say(
            f"{problem}; the remaining machines continue from the last checkpoint in "
            f"{SECONDS_TO_NOTICE:.0f} s"
        )
        time.sleep(SECONDS_TO_NOTICE)
    raise Failed(
        f"the run was started {launch.restarts + 1} times and failed each time, at last because "
        f"{problem}",
        "fix the error that its processes printed; the same command continues from the last "
        "checkpoint",
    )


def _connect(address: str) -> Any:
    """The module `ray`, connected to the cluster at `address`."""
    try:
        ray = import_module("ray")
    except ImportError as error:
        raise BadInput(f"ray is not installed ({error})", "pip install 'xushi[ray]'") from None
    try:
        ray.init(address=address, log_to_driver=True, ignore_reinit_error=True)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise BadInput(
            f"no Ray cluster answers at {address}: {error}",
            "start one with ray start --head and give its address, or give auto on one of its "
            "machines",
        ) from None
    return ray


def _available(
    ray: Any, recipe: Recipe, launch: Launch, resource: str, attempt: int
) -> tuple[int, dict[str, int]]:
    """(how many processes to start now, the resources that each of them asks Ray for)."""
    nodes = [int(node["Resources"].get(resource, 0)) for node in ray.nodes() if node["Alive"]]
    each = 1 if resource == "GPU" else max(1, max(nodes, default=0) // launch.processes)
    count = min(
        launch.nodes * launch.processes,
        sum(min(units // each, launch.processes) for units in nodes),
    )
    fewest = launch.fewest_nodes(recipe.layout) * launch.processes
    while count >= fewest and not _fits(recipe, count):
        count -= 1
    if count < fewest:
        raise Failed(
            f"the Ray cluster has resources for {count} processes, but {fewest} are needed",
            "add machines, or set layout.fewest lower",
        )
    say(f"attempt {attempt}: {count} processes on {sum(map(bool, nodes))} machines")
    return count, {f"num_{resource.lower()}s": each}


def _fits(recipe: Recipe, processes: int) -> bool:
    try:
        check_layout(recipe.layout, recipe.model, processes, recipe.rows)
    except XushiError:
        return False
    return True


class _Place(NamedTuple):
    """Where an actor runs: Ray's name of the machine, its address, and a free port on it."""

    node: str
    host: str
    port: int


def _attempt(ray: Any, launch: Launch, count: int, resources: dict[str, int]) -> str | None:
    """Run `count` processes to the end of the run; None, or the reason why they ended early."""
    actor = ray.remote(max_restarts=0, scheduling_strategy="SPREAD", **resources)(_Process)
    processes = [actor.remote() for _ in range(count)]
    try:
        found = ray.get([process.place.remote() for process in processes], timeout=SECONDS_TO_PLACE)
        running = [
            processes[number].run.remote(environment, launch.arguments, os.getcwd())
            for number, environment in _environments(
                [_Place(*place) for place in found], own_gpu="num_gpus" in resources
            )
        ]
        left = list(running)
        while left:
            done, left = ray.wait(left)
            if (status := ray.get(done[0])) != 0:
                return f"process {running.index(done[0])} exited with status {status}"
        return None
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
        return f"a process was lost ({str(error).splitlines()[0]})"
    finally:
        for process in processes:
            ray.kill(process)


def _environments(places: Sequence[_Place], own_gpu: bool) -> Iterator[tuple[int, dict[str, str]]]:
    """(actor, torchrun's environment for it) in the order of ranks.

    Processes on one machine get neighbouring ranks, as torchrun's do. With `own_gpu` Ray shows each
    process only its own GPU, as number 0.
    """
    nodes = [place.node for place in places]
    order = sorted(range(len(places)), key=lambda i: (nodes.index(nodes[i]), i))
    first = places[order[0]]
    seen: Counter[str] = Counter()
    for rank, number in enumerate(order):
        node = nodes[number]
        environment = {
            "RANK": rank,
            "WORLD_SIZE": len(places),
            "MASTER_ADDR": first.host,
            "MASTER_PORT": first.port,
            "LOCAL_RANK": 0 if own_gpu else seen[node],
            "LOCAL_WORLD_SIZE": nodes.count(node),
        }
        seen[node] += 1
        yield number, {key: str(value) for key, value in environment.items()}


class _Process:
    """A Ray actor that runs one process of the run as a child process.

    Since the process is a child, the actor can report its exit status however it ends.
    """

    def place(self) -> tuple[str, str, int]:
        """The fields of a `_Place`."""
        ray = import_module("ray")
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), port

    def run(self, environment: dict[str, str], arguments: Sequence[str], directory: str) -> int:
        """Run `xushi run` in `directory` with torchrun's environment; returns its exit status."""
        return subprocess.run(
            [sys.executable, "-m", "xushi", "run", *arguments],
            cwd=directory,
            check=False,
            env={**os.environ, **environment},
            preexec_fn=_die_with_parent,
        ).returncode


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
