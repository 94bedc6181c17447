"""Run a recipe: every stage in order, skipped when nothing it reads has changed, from the last
checkpoint otherwise.
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from xushi import __version__
from xushi.base.allocator import keep_freed_memory
from xushi.base.errors import BadInput, Failed
from xushi.base.files import disk_errors, write_atomic, write_json
from xushi.base.machine import children_peak_memory_bytes, chosen_device, inspect
from xushi.base.progress import say
from xushi.base.tracking import Tracking
from xushi.recipe import Recipe
from xushi.run import building, closing
from xushi.run.context import (
    RUN_FORMAT,
    RunContext,
    StageRecord,
    read_record,
    stage_key,
    write_record,
)
from xushi.run.estimate import check_memory, describe
from xushi.train import join

__all__ = ["describe", "run"]

Stage = Callable[[RunContext], dict[str, Any]]


def run(recipe: Recipe, directory: Path, update: bool = False) -> dict[str, Any] | None:
    """Run `recipe` in `directory` and return its results; the same call goes on where a killed one
    stopped.

    A directory that another recipe made is refused unless `update`, which runs the stages that
    changed again. Where torchrun started several processes all of them call this, and the first one
    alone has results.
    """
    layout, machine = (
        join(recipe.layout, recipe.model, chosen_device(recipe.device), recipe.rows),
        inspect(),
    )
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if layout.device == "cuda":  # each process has a GPU of its own
        check_memory(recipe, layout, torch.cuda.get_device_properties(0).total_memory, 1)
    else:
        check_memory(recipe, layout, machine.memory_total, processes_here)
    if not layout.is_first:
        _follow(RunContext(directory, recipe, Tracking(None), layout))
        return None
    with _own(directory):
        _claim(recipe, directory, update)
        tracking = Tracking(directory / "tracking.sqlite")
        context = RunContext(directory, recipe, tracking, layout)
        cores = max(1, machine.usable_cores // processes_here)
        processes = layout.data * layout.pipeline
        name = "threads" if processes == 1 else f"threads.{processes}"
        threads = layout.team.broadcast(tracking.decide("run", name, recipe.threads or cores))
        torch.set_num_threads(threads)
        spread = {"data": layout.data, "pipeline": layout.pipeline, "expert": layout.expert}
        if (before := tracking.decide("run", "layout", spread)) != spread:
            say(
                f"this run began with the layout {before} and goes on with {spread}: the same "
                "batches, and losses that "
                "differ in their last digits"
            )
        forms = context.op_forms
        if (began := tracking.decide("run", "op_forms", forms)) != forms:
            say(
                f"this run began with other op forms ({began}) and goes on with these ({forms}): "
                "it will not end with "
                "the same bits"
            )
        keep_freed_memory()
        try:
            results = _run_stages(context)
        finally:
            tracking.close()
        layout.team.broadcast("end")
        return results


def _follow(context: RunContext) -> None:
    """What a process does that is not the first: wait for the stages that all do together, and do
    them.
    """
    torch.set_num_threads(_heard(context))
    keep_freed_memory()
    while (stage := _heard(context)) != "end":
        building.TOGETHER[stage](context)


def _heard(context: RunContext) -> Any:
    """What the first process says next."""
    try:
        return context.layout.team.broadcast(None)
    except RuntimeError:  # torch's error of a lost connection
        raise Failed(
            "the first process has ended", "it said why: mend that, start all again"
        ) from None


def _stages(recipe: Recipe) -> list[tuple[str, Stage, dict[str, Any]]]:
    """(name, function, the parts of the recipe it reads) of this run's stages in order."""
    whole = recipe.model_dump(mode="json")
    transcripts = (
        whole["environment"] if recipe.environment and recipe.environment.transcripts else None
    )
    stages: list[tuple[str, Stage, dict[str, Any]]] = [
        ("data", building.data, {"data": whole["data"], "transcripts": transcripts}),
        (
            "tokenizer",
            building.tokenizer,
            {"tokenizer": whole["tokenizer"], "merges": recipe.runs("tokenizer")},
        ),
    ]
    trained = {"seed": recipe.seed, "model": whole["model"]}
    if recipe.runs("pretrain"):
        stages.append(
            (
                "pretrain",
                building.pretrain,
                trained | {"pretrain": whole["pretrain"], "text": recipe.runs("data")},
            )
        )
    if recipe.runs("sft"):
        stages.append(
            (
                "sft",
                building.sft,
                trained
                | {
                    "sft": whole["sft"],
                    "environment": whole["environment"],
                    "pretrained": recipe.runs("pretrain"),
                },
            )
        )
    if recipe.runs("rl"):
        stages.append(
            (
                "rl",
                building.rl,
                trained
                | {
                    "rl": whole["rl"],
                    "environment": whole["environment"],
                    "tuned": recipe.runs("sft"),
                },
            )
        )
        if recipe.runs("sft"):
            stages.append(("control", building.control, {"sft": whole["sft"]}))
    return [
        *stages,
        ("evaluate", closing.evaluate, {"evaluate": whole["evaluate"]}),
        ("export", closing.export, {"name": recipe.name}),
    ]


def _run_stages(context: RunContext) -> dict[str, Any]:
    began = time.monotonic()
    results: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    before = ""
    for name, stage, inputs in _stages(context.recipe):
        key = stage_key(name, {**inputs, "before": before})
        record = read_record(context, name)
        if record is not None and record.key == key:
            say(f"{name}: done before, in {record.seconds:.0f} s")
        else:
            record = _run_stage(context, name, stage, key)
        results |= record.results
        seconds[f"seconds.{name}"] = record.seconds
        before = key
    results |= seconds | {
        "seconds.total": sum(seconds.values()),
        "seconds.this_start": time.monotonic() - began,
    }
    results |= closing.describe_run(context) | {
        "memory.peak_children_bytes": children_peak_memory_bytes()
    }
    write_json(context.path("results.json"), results)
    return results


def _run_stage(context: RunContext, name: str, stage: Stage, key: str) -> StageRecord:
    """Run one stage; checkpoints of a run with other inputs are removed first."""
    marker = context.path("stages", f"{name}.started")
    if not marker.exists() or marker.read_text() != key:
        closing.forget_stage(context, name)
        write_atomic(marker, key)
    say(f"{name}: started")
    context.tracking.event(name, "started", version=__version__)
    began = time.monotonic()
    if name in building.TOGETHER:
        context.layout.team.broadcast(name)
    try:
        results = stage(context)
    finally:
        spent = time.monotonic() - began
        context.tracking.metrics(name, int(time.time()), {"attempt_seconds": spent})
    record = StageRecord(
        key, sum(value for _, value in context.tracking.series(name, "attempt_seconds")), results
    )
    write_record(context, name, record)
    context.tracking.event(name, "finished", seconds=spent)
    say(f"{name}: finished in {spent:.0f} s")
    return record


@contextlib.contextmanager
def _own(directory: Path) -> Iterator[None]:
    """Hold the run directory against a second process; the lock goes with the process, however it
    ends.
    """
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Failed(
                f"{directory} is in use by another xushi run",
                "wait for it, or choose another --out",
            ) from None
        yield
    finally:
        os.close(lock)


def _claim(recipe: Recipe, directory: Path, update: bool) -> None:
    """Write the recipe into a fresh run directory, or see that the directory is this recipe's."""
    file = directory / "run.json"
    if file.exists():
        try:
            table = json.loads(file.read_text(encoding="utf-8"))
            found, owner = table["format"], table["recipe_hash"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadInput(
                f"{file} cannot be read: {error!r}", "choose another --out, or remove the directory"
            ) from None
        if found != RUN_FORMAT:
            raise BadInput(
                f"{directory} was made by xushi {table.get('version', '?')} (run format {found}; "
                "this "
                f"version reads format {RUN_FORMAT})",
                "use that version, or choose another --out",
            )
        if owner != recipe.hash and not update:
            raise BadInput(
                f"{directory} was made by another recipe (its own is {directory / 'recipe.toml'})",
                "choose another --out, or add --update to run the stages that changed again",
            )
    elif any(path.name != ".lock" for path in directory.iterdir()):
        raise BadInput(f"{directory} is not empty and is no run directory", "choose another --out")
    write_atomic(directory / "recipe.toml", recipe.to_toml())
    write_json(file, {"format": RUN_FORMAT, "recipe_hash": recipe.hash, "version": __version__})
