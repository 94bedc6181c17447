"""One step of a run again: which bytes it was trained on, and its loss, computed as it was.

A step's data is in the tracking store (its cursor and the hash of its batch), so a ramp, a step
without an update, a rollback or a kill on the way changes nothing here. The loss needs the weights
that the step began with: those of the last checkpoint before it, or the stage's first ones, trained
up to it. Nothing of the run is changed.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xushi.base.errors import BadInput, Failed
from xushi.base.machine import chosen_device
from xushi.base.progress import StepProgress, say
from xushi.base.tracking import BatchRecord, Tracking
from xushi.data import batch_hash, find_documents
from xushi.recipe import load_recipe
from xushi.run.building import TrainingInputs, dataset_of, training_inputs
from xushi.run.context import RunContext
from xushi.train import Data, LayoutConfig, TrainingState, join, latest_checkpoint, training_step

STAGES = ("pretrain", "sft")
SHOWN = 60  # characters of each piece; --json has all of them


def replay(
    directory: Path, step: int, stage: str = "pretrain", compute_loss: bool = True
) -> dict[str, Any]:
    """What step `step` (from 1) of a stage was trained on and, unless told not to, its loss
    computed again.

    The result is JSON-able. A run or a step that is not there is a `XushiError`.
    """
    if stage not in STAGES:
        raise BadInput(
            f"stage {stage!r} has no steps to replay", f"give one of {', '.join(STAGES)}"
        )
    if not (directory / "tracking.sqlite").is_file():
        raise BadInput(f"{directory} is no run directory", "give one, such as runs/demo")
    tracking = Tracking(directory / "tracking.sqlite")
    try:
        recipe = load_recipe(directory / "recipe.toml", [])
        context = RunContext(
            directory,
            recipe,
            tracking,
            join(LayoutConfig(), recipe.model, chosen_device(recipe.device)),
        )
        way = tracking.batches(stage, step)
        if not way:
            steps = [number for number, _ in tracking.series(stage, "loss")]
            raise BadInput(
                f"{directory} has no step {step} of stage {stage}",
                f"give one from 1 to {steps[-1]}" if steps else "run that stage first",
            )
        inputs, record = training_inputs(context, stage), way[-1]
        batch = inputs.data.batches(record.cursor, record.pieces)
        result: dict[str, Any] = {
            "stage": stage,
            "step": step,
            "cursor": record.cursor,
            "pieces": record.pieces,
            "problem": record.problem,
            "batch_hash": batch_hash(batch),
            "batch_hash_logged": record.hash,
            "tokens": int(batch["loss_mask"].sum()),
            "spans": _spans(context, stage, record),
        }
        if compute_loss:
            logged = dict(tracking.series(stage, "loss")).get(step, math.nan)
            result["loss_logged"] = logged if math.isfinite(logged) else None  # JSON has no other
            result |= _loss(context, inputs, stage, way)
        return result
    finally:
        tracking.close()


def _loss(
    context: RunContext, inputs: TrainingInputs, stage: str, way: list[BatchRecord]
) -> dict[str, Any]:
    """The loss of the way's last step, from the last checkpoint before it."""
    decided = context.tracking.decided
    torch.set_num_threads(decided("run", "threads") or torch.get_num_threads())
    forms = context.op_forms
    if (began := decided("run", "op_forms")) != forms:
        say(
            f"the run used other op forms ({began}) than there are here ({forms}): the loss will "
            "differ in its last "
            "digits"
        )
    if (layout := decided("run", "layout")) and (
        processes := layout["data"] * layout["pipeline"]
    ) > 1:
        say(
            f"the run was spread over {processes} processes and this is one: the loss will differ "
            "in its last "
            "digits"
        )
    state = TrainingState.begin(context.trained_model(inputs.after), inputs.config, context.layout)
    first = state.restore(latest_checkpoint(context.checkpoints(stage), up_to=way[-1].step - 1))
    figures: dict[str, float] = {}
    if way[0].step > first + 1:
        raise BadInput(
            f"the tracking store has nothing before step {way[0].step} of stage {stage}, and the "
            "last "
            f"checkpoint before that is of step {first}",
            "--no-loss shows the step's data",
        )
    with StepProgress("replay", way[-1].step, first) as progress:
        for record in (record for record in way if record.step > first):
            batch = _logged(inputs.data, record)
            figures, _ = training_step(state, inputs.config, record.step - 1, batch)
            progress.update(record.step, f"loss {figures['loss']:.3f}")
    loss = figures["loss"]
    return {"loss": loss if math.isfinite(loss) else None, "trained_from_step": first}


def _logged(data: Data, record: BatchRecord) -> dict[str, Tensor]:
    batch = data.batches(record.cursor, record.pieces)
    if batch_hash(batch) != record.hash:
        raise Failed(
            f"the batch of step {record.step} is not the one that was trained on: its hash differs",
            "the run's data or tokenizer was changed since; --no-loss shows what is there now",
        )
    return batch


def _spans(context: RunContext, stage: str, record: BatchRecord) -> list[dict[str, Any]]:
    """Every piece of a document in the batch, in order, with its text."""
    numbers = range(record.cursor, record.cursor + record.pieces)
    if stage == "sft":
        return [_demonstration(context, number) for number in numbers]
    dataset = dataset_of(context)
    found = [(number, span) for number in numbers for span in dataset.byte_spans(number)]
    documents = find_documents(
        context.path("data", "corpus"), "train", [uid for _, (uid, _, _) in found]
    )
    spans = []
    for number, (uid, first, end) in found:
        document = documents[uid]
        spans.append(
            {
                "sequence": number,
                "uid": uid.hex(),
                "source": document.source,
                "meta": dict(document.meta),
                "first_byte": first,
                "end_byte": end,
                # A token may end inside a character.
                "text": document.text.encode()[first:end].decode("utf-8", "replace"),
            }
        )
    return spans


def _demonstration(context: RunContext, number: int) -> dict[str, Any]:
    config = context.recipe.sft
    assert config is not None, "the stage has run"
    environment = context.environment()
    messages = environment.demonstration("train", number, config.thinking_share)
    text = "\n".join(
        f"{message.role}: {message.reasoning or ''}{message.content}" for message in messages
    )
    return {
        "sequence": number,
        "source": environment.name,
        "meta": {"task": number},
        "first_byte": 0,
        "end_byte": len(text.encode()),
        "text": text,
    }


def replay_sentences(result: dict[str, Any]) -> str:
    """A `replay` for a person: a head, then a line for every piece of a document."""
    same_batch = result["batch_hash"] == result["batch_hash_logged"]
    lines = [
        f"{result['stage']} step {result['step']}: {result['pieces']} pieces of data from number "
        f"{result['cursor']} on, {result['tokens']:,} target tokens",
        f"batch {result['batch_hash'][:16]}, "
        + ("as logged" if same_batch else f"NOT as logged ({result['batch_hash_logged'][:16]})"),
    ]
    if result["problem"]:
        lines.append(result["problem"])
    if "loss" in result:
        same = result["loss"] == result["loss_logged"]
        lines.append(
            f"loss {_shown(result['loss'])}, "
            + ("as logged" if same else f"NOT as logged ({_shown(result['loss_logged'])})")
            + f"; trained again from step {result['trained_from_step']}"
        )
    for span in result["spans"]:
        place = "  ".join(f"{name} {value}" for name, value in span["meta"].items())
        text = repr(span["text"] if len(span["text"]) <= SHOWN else span["text"][:SHOWN] + "…")
        lines.append(
            f"{span['sequence']:>8}  {span['source']}  {place}  bytes {span['first_byte']:,} to "
            f"{span['end_byte']:,}  {text}"
        )
    return "\n".join(lines)


def _shown(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.9g}"
