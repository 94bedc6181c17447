"""One step of a run again: what it was trained on, and its loss, computed as it was.

The tracking store has each step's cursor and the hash of its batch, so that batch ramps, withheld
updates, rollbacks and kills change nothing here. The loss needs the weights before the step: those
of the last checkpoint before it, or the stage's first ones, trained up to it. The run is not
changed.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from xushi.base.errors import BadInput
from xushi.base.machine import chosen_device
from xushi.base.progress import say
from xushi.base.tracking import BatchRecord, Tracking
from xushi.data import batch_hash
from xushi.run.directory import check_format
from xushi.run.facts import op_forms
from xushi.run.place import RunPlace
from xushi.run.recipe import Recipe, load_recipe
from xushi.run.stages import TrainingStage, keys_of, records_of
from xushi.train import LayoutConfig, join

SHOWN = 60  # characters of each item's text; --json has all of them


def replay(
    directory: Path, step: int, stage: str = "pretrain", compute_loss: bool = True
) -> dict[str, Any]:
    """What step `step` (from 1) of a stage was trained on and, unless told not to, its loss
    computed again.

    The result is JSON-able. Raises `BadInput` if there is no such run, stage or step.
    """
    if not (directory / "tracking.sqlite").is_file():
        raise BadInput(f"{directory} is not a run directory", "give one, such as runs/demo")
    check_format(directory)
    recipe = load_recipe(directory / "recipe.toml", [])
    training = _training_stage(recipe, stage)
    _check_started(recipe, directory, stage)
    tracking = Tracking(directory / "tracking.sqlite")
    try:
        layout = join(LayoutConfig(), recipe.model, chosen_device(recipe.device))
        place = RunPlace(directory, tracking, layout)
        records = tracking.batches(stage, step)
        if not records:
            steps = [number for number, _ in tracking.series(stage, "loss")]
            raise BadInput(
                f"{directory} has no step {step} of stage {stage}",
                f"give one from 1 to {steps[-1]}" if steps else "run that stage first",
            )
        result = _recorded(training, place, records[-1])
        if compute_loss:
            logged = dict(tracking.series(stage, "loss")).get(step, math.nan)
            result["loss_logged"] = logged if math.isfinite(logged) else None  # JSON has no NaN
            result |= _loss(recipe, training, place, records)
        return result
    finally:
        tracking.close()


def _training_stage(recipe: Recipe, name: str) -> TrainingStage:
    stages = {stage.name: stage for stage in recipe.run_stages()}
    stage = stages.get(name)
    if not isinstance(stage, TrainingStage):
        training = [s.name for s in stages.values() if isinstance(s, TrainingStage)]
        raise BadInput(
            f"stage {name!r} has no steps to replay", f"give one of {', '.join(training)}"
        )
    return stage


def _check_started(recipe: Recipe, directory: Path, stage: str) -> None:
    """What the store holds of the stage was made by the recipe that the directory has now."""
    marker = directory / "stages" / f"{stage}.started"
    stages = recipe.run_stages()
    records = records_of(stages, RunPlace(directory, Tracking(None)))
    key = keys_of(stages, records)[stage]
    if marker.exists() and marker.read_text() != key:
        raise BadInput(
            f"{directory} was updated to another recipe or text, and stage {stage} has not run "
            "again since",
            "run the recipe first",
        )


def _recorded(stage: TrainingStage, place: RunPlace, record: BatchRecord) -> dict[str, Any]:
    """What the store and the run's data tell of a step."""
    batch = stage.batch(place, record)
    return {
        "stage": stage.name,
        "step": record.step,
        "cursor": record.cursor,
        "items": record.items,
        "problem": record.problem,
        "batch_hash": batch_hash(batch) if batch else None,
        "batch_hash_logged": record.hash,
        "tokens": int(batch.loss_mask.sum()) if batch else None,
        "spans": stage.spans(place, record),
    }


def _loss(
    recipe: Recipe, stage: TrainingStage, place: RunPlace, records: Sequence[BatchRecord]
) -> dict[str, Any]:
    """The loss of the last record's step, computed again."""
    decided = place.tracking.decided
    threads = recipe.threads or decided("run", "threads") or torch.get_num_threads()
    torch.set_num_threads(threads)
    forms = op_forms(recipe, place.layout)
    first_forms = decided("run", "op_forms")
    if first_forms != forms:
        say(
            f"the run used other op forms ({first_forms}) than there are here ({forms}): the loss "
            "will differ in its last digits"
        )
    grid = decided("run", "layout") or {"data": 1, "pipeline": 1}
    processes = grid["data"] * grid["pipeline"]
    if processes > 1:
        say(
            f"the run was spread over {processes} processes and this is one: the loss will differ "
            "in its last digits"
        )
    replayed = stage.training(place).replay(records)
    loss = replayed.result.figures["loss"]
    return {
        "batch_hash": replayed.result.hash,
        "loss": loss if math.isfinite(loss) else None,
        "trained_from_step": replayed.trained_from,
    }


def replay_sentences(result: dict[str, Any]) -> str:
    """A `replay` for a person: a head, then a line for every item of data."""
    tokens = "" if result["tokens"] is None else f", {result['tokens']:,} target tokens"
    lines = [
        f"{result['stage']} step {result['step']}: {result['items']} items of data from number "
        f"{result['cursor']} on{tokens}",
        _batch_sentence(result),
    ]
    if result["problem"]:
        lines.append(result["problem"])
    if "loss" in result:
        same = result["loss"] == result["loss_logged"]
        verdict = "as logged" if same else f"NOT as logged ({_shown(result['loss_logged'])})"
        lines.append(
            f"loss {_shown(result['loss'])}, {verdict}; trained again from step "
            f"{result['trained_from_step']}"
        )
    lines += [_span_sentence(span) for span in result["spans"]]
    return "\n".join(lines)


def _batch_sentence(result: dict[str, Any]) -> str:
    found, logged = result["batch_hash"], result["batch_hash_logged"]
    if found is None:
        return (
            f"batch {logged[:16]}; it was sampled, so only its loss can tell whether it is the same"
        )
    verdict = "as logged" if found == logged else f"NOT as logged ({logged[:16]})"
    return f"batch {found[:16]}, {verdict}"


def _span_sentence(span: dict[str, Any]) -> str:
    place = "  ".join(f"{name} {value}" for name, value in span["meta"].items())
    text = span["text"] if len(span["text"]) <= SHOWN else span["text"][:SHOWN] + "…"
    return (
        f"{span['sequence']:>8}  {span['source']}  {place}  bytes {span['first_byte']:,} to "
        f"{span['end_byte']:,}  {text!r}"
    )


def _shown(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.9g}"
