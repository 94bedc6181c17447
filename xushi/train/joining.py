"""Joining the processes that torchrun started: the layout of this one among them."""

import atexit
import contextlib
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from xushi.base.config import shorten
from xushi.base.errors import BadInput
from xushi.model import ModelConfig
from xushi.train.config import LayoutConfig
from xushi.train.fitting import check_layout
from xushi.train.layout import Layout
from xushi.train.team import Team

# How long to wait for another process, which may be reading a corpus.
SECONDS_TO_WAIT = 24 * 3600
MOST_PROCESSES = 1_000_000
_OF_TORCHRUN = ("RANK", "MASTER_ADDR", "MASTER_PORT")


def started_processes() -> tuple[int, int]:
    """(rank, how many) from the environment that torchrun sets; (0, 1) without it. An incomplete or
    impossible one is a `BadInput`.
    """
    rank = _number("RANK", 0)
    processes = _number("WORLD_SIZE", 1)
    missing = [name for name in _OF_TORCHRUN if name not in os.environ]
    if processes > 1 and missing:
        raise BadInput(
            f"WORLD_SIZE={processes} is set without {', '.join(missing)}",
            "start several processes with torchrun; for a single one, unset WORLD_SIZE",
        )
    if processes > 1:
        _number("MASTER_PORT", 1, 65535)
    if rank >= processes:
        raise BadInput(
            f"RANK={rank} is not one of WORLD_SIZE={processes} processes",
            "start several processes with torchrun; for a single one, unset RANK and WORLD_SIZE",
        )
    return rank, processes


def processes_on_this_machine() -> int:
    """How many processes torchrun started on this machine; 1 without it."""
    return _number("LOCAL_WORLD_SIZE", 1)


def _number(name: str, least: int, most: int = MOST_PROCESSES) -> int:
    """A whole number from the environment; `least` where it is not set."""
    text = os.environ.get(name, str(least))
    with contextlib.suppress(ValueError):  # not a number, or one of thousands of digits
        if least <= (number := int(text)) <= most:
            return number
    raise BadInput(
        f"the environment variable {name}={shorten(text)} is not a whole number from {least} to "
        f"{most}",
        f"unset {name}, or start with torchrun, which sets it",
    )


def join(config: LayoutConfig, model: ModelConfig, device: str = "cpu", rows: int = 0) -> Layout:
    """The layout of this process among those that were started; that of one alone if it is alone.

    Raises `BadInput` as `check_layout` does, and if there are more processes than GPUs.
    """
    rank, processes = started_processes()
    check_layout(config, model, processes, rows)
    if device == "cuda":
        _take_gpu(rank)
    if processes == 1:
        return Layout(device=device)
    if not dist.is_initialized():
        backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=timedelta(seconds=SECONDS_TO_WAIT))
        # gloo's threads free Python's tensors, and Python aborts a process in which another thread
        # does so while it exits.
        atexit.register(dist.destroy_process_group)
    layout = _grid(config, rank, processes, device)
    if layout.pipeline > 1:
        _connect_stages(layout)
    return layout


def _take_gpu(rank: int) -> None:
    """Use this process's own GPU, with deterministic algorithms."""
    # cuBLAS gives the same bits each time only with a workspace of fixed size.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    number = _number("LOCAL_RANK", 0)
    available = torch.cuda.device_count()
    if number >= available:
        raise BadInput(
            f"process {rank} is number {number} of its machine (from 0), which has {available} "
            "GPUs",
            'start one process for each GPU, or set device = "cpu"',
        )
    torch.cuda.set_device(number)


def _grid(config: LayoutConfig, rank: int, processes: int, device: str) -> Layout:
    """The grid of processes, with the groups along its axes."""
    from torch.distributed.device_mesh import init_device_mesh

    stages = config.pipeline
    data = processes // stages
    stage, place = divmod(rank, data)
    trunk = init_device_mesh(device, (stages, data), mesh_dim_names=("stage", "data"))
    experts = init_device_mesh(
        device,
        (stages, data // config.expert, config.expert),
        mesh_dim_names=("stage", "replica", "expert"),
    )
    meshes = {"data": trunk["data"], "replica": experts["replica"], "expert": experts["expert"]}
    # Objects travel by gloo on any device, and the threads that write checkpoints need a group of
    # their own, so that their calls do not meet the training's.
    team, writers = (
        Team(rank, processes, dist.new_group(backend="gloo", timeout=_timeout())) for _ in range(2)
    )
    return Layout(
        data,
        stages,
        config.expert,
        place,
        stage,
        device,
        meshes,
        team=team,
        writers=writers,
    )


def _connect_stages(layout: Layout) -> None:
    """The groups between pipeline stages; all processes make all of them, in the same order."""
    layout.stage_groups = {direction: dist.new_group(timeout=_timeout()) for direction in (-1, 1)}
    for column in range(layout.data):
        ends = [column, (layout.pipeline - 1) * layout.data + column]
        group = dist.new_group(ends, timeout=_timeout())
        if column == layout.rank:
            layout.embedding_group = group


def _timeout() -> timedelta:
    return timedelta(seconds=SECONDS_TO_WAIT)
