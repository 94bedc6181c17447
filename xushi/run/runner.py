"""Run a recipe: every stage in order, skipped if nothing that it reads has changed, else from its
last checkpoint.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from xushi import __version__
from xushi.base.allocator import keep_freed_memory
from xushi.base.errors import Failed
from xushi.base.files import write_json
from xushi.base.machine import Machine, chosen_device, inspect
from xushi.base.progress import say
from xushi.base.tracking import Tracking
from xushi.run.directory import check_format, claim, own, start_over
from xushi.run.estimate import check_memory
from xushi.run.facts import op_forms, run_facts
from xushi.run.place import RunPlace, StageRecord, read_record, stage_key, write_record
from xushi.run.recipe import Recipe
from xushi.run.stages import Stage, finished_stages, keys_of
from xushi.run.stages.pretrain import Pretrain
from xushi.run.stages.training import training_seconds
from xushi.train import join, processes_on_this_machine

END = "end"  # broadcast in place of a stage's name when the run is over


def run(
    recipe: Recipe,
    directory: Path,
    update: bool = False,
    asked: str = "",
    until: str | None = None,
) -> dict[str, Any] | None:
    """Run `recipe` in `directory` and return its results; the same call continues a killed run.

    A directory of another recipe is refused unless `update`, which runs the changed stages again.
    Where files that a finished stage has read changed, a finished run reads them again, as `update`
    does; one that is not finished goes on with what it has read. `asked`: see `claim`. With
    `until` the stages after the one of that name are left for later, and so is results.json.
    Under torchrun all processes call this, and only the first one has results.
    """
    check_format(directory)  # first: records of another format would be told as damaged
    stages = recipe.run_stages()
    keys_of(stages, {})  # a stage that cannot be hashed is refused before anything is made
    layout = join(recipe.layout, recipe.model, chosen_device(recipe.device), recipe.rows)
    for stage in stages:
        stage.check_layout(layout)
    machine = inspect()
    processes_here = processes_on_this_machine()
    if Pretrain.name not in finished_stages(stages, RunPlace(directory, Tracking(None), layout)):
        if layout.device == "cuda":  # each process has a GPU of its own
            check_memory(recipe, layout, torch.cuda.get_device_properties(0).total_memory, 1)
        else:
            check_memory(recipe, layout, machine.memory_total, processes_here)
    if not layout.is_first:
        _follow(recipe, RunPlace(directory, Tracking(None), layout))
        return None
    with own(directory):
        claim(recipe, directory, update, asked)
        place = RunPlace(directory, Tracking(directory / "tracking.sqlite"), layout)
        try:
            _set_up(recipe, place, machine, processes_here)
            results = _run_stages(recipe, place, until)
        finally:
            place.tracking.close()
        _tell(place, END)
        return results


def _set_up(recipe: Recipe, place: RunPlace, machine: Machine, processes_here: int) -> None:
    """Settings that decide the bits: taken at the first start and kept; tell where they change."""
    layout, tracking = place.layout, place.tracking
    processes = layout.data * layout.pipeline
    name = "threads" if processes == 1 else f"threads.{processes}"
    cores = max(1, machine.usable_cores // processes_here)
    threads = recipe.threads or tracking.decide("run", name, cores)
    torch.set_num_threads(layout.team.broadcast(threads))
    grid = {"data": layout.data, "pipeline": layout.pipeline, "expert": layout.expert}
    first_grid = tracking.decide("run", "layout", grid)
    if first_grid != grid:
        say(
            f"this run began with the layout {first_grid} and continues with {grid}: the batches "
            "are the same, and losses will differ in their last digits"
        )
    forms = op_forms(recipe, layout)
    first_forms = tracking.decide("run", "op_forms", forms)
    if first_forms != forms:
        say(
            f"this run began with other op forms ({first_forms}) and continues with these "
            f"({forms}): it will not end with the same bits"
        )
    keep_freed_memory()


def _follow(recipe: Recipe, place: RunPlace) -> None:
    """What every process but the first does: run the stages that all processes run together."""
    torch.set_num_threads(_heard(place))
    keep_freed_memory()
    stages = {stage.name: stage for stage in recipe.run_stages()}
    while True:
        name = _heard(place)
        if name == END:
            return
        stages[name].run(place)


def _tell(place: RunPlace, name: str) -> None:
    """Broadcast what the other processes do next."""
    try:
        place.layout.team.broadcast(name)
    except RuntimeError:  # torch's error of a lost connection
        raise Failed(
            "another process exited", "correct the error it printed, then start all again"
        ) from None


def _heard(place: RunPlace) -> Any:
    """What the first process broadcasts next."""
    try:
        return place.layout.team.broadcast(None)
    except RuntimeError:  # torch's error of a lost connection
        raise Failed(
            "process 0 exited", "correct the error it printed, then start all processes again"
        ) from None


def _run_stages(recipe: Recipe, place: RunPlace, until: str | None) -> dict[str, Any]:
    began = time.monotonic()
    results: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    stages = recipe.run_stages()
    names = [stage.name for stage in stages]
    before = ""
    for number, stage in enumerate(stages):
        key = stage_key(stage.name, stage.reads(), before)
        record = read_record(place, stage.name)
        if record is not None and record.key == key:
            say(f"{stage.name}: done before, in {record.seconds:.0f} s")
        else:
            record = _run_stage(stage, place, key, names[number + 1 :])
        before = record.after
        results |= record.results
        seconds[f"seconds.{stage.name}"] = record.seconds
        if stage.name == until:
            return results | seconds
    results |= seconds
    results["seconds.total"] = sum(seconds.values())
    results["seconds.this_start"] = time.monotonic() - began
    results |= run_facts(recipe, place)
    write_json(place.path("results.json"), results)
    return results


def _run_stage(stage: Stage, place: RunPlace, key: str, later: Sequence[str]) -> StageRecord:
    """Run one stage; what an attempt with other inputs left is removed first."""
    marker = place.path("stages", f"{stage.name}.started")
    if not marker.exists() or marker.read_text() != key:
        start_over(place, stage.name, key, later)
    say(f"{stage.name}: started")
    place.tracking.event(stage.name, "started", version=__version__)
    began = time.monotonic()
    if stage.together(place.layout):
        _tell(place, stage.name)
    try:
        results = stage.run(place)
    finally:
        spent = time.monotonic() - began
        starts = place.tracking.series(stage.name, "start_seconds")
        place.tracking.metrics(stage.name, len(starts) + 1, {"start_seconds": spent})
    starts = place.tracking.series(stage.name, "start_seconds")
    # A start that was killed left no time of its own, but that of its steps.
    steps = training_seconds(place.tracking, stage.name)
    seconds = max(steps, sum(value for _, value in starts))
    record = StageRecord(key, seconds, results.flat(), stage.files_read(place))
    write_record(place, stage.name, record)
    place.tracking.event(stage.name, "finished", seconds=spent)
    say(f"{stage.name}: finished in {spent:.0f} s")
    return record
