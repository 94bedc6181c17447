"""What a run will cost, before anything starts: parameters, memory, and time from steps timed here
and now.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch

from xushi.base.errors import BadInput
from xushi.base.machine import GIB, chosen_device, inspect, peak_memory_bytes
from xushi.data.left_out import in_short
from xushi.plan import (
    count_parameters,
    kv_cache_bytes_per_token,
    train_flops_per_token,
    training_memory_bytes,
)
from xushi.plan.memory import TrainingMemory
from xushi.run.benchmark import Shape
from xushi.run.costs import forward_token_seconds, measure_text, training_token_seconds
from xushi.run.recipe import Recipe
from xushi.run.stages import Costs, Stage
from xushi.run.stages.control import Control
from xushi.run.stages.pretrain import Pretrain
from xushi.run.stages.rl import RL
from xushi.train import MICROBATCHES_PER_STAGE, Layout, PretrainConfig, chosen_dtype

KEPT_OR_RECOMPUTED: tuple[Literal["keep", "recompute"], ...] = ("keep", "recompute")


def describe(recipe: Recipe) -> dict[str, Any]:
    """The plan of a run as flat keys.

    Takes some seconds, and as long as it takes to read the text: it times steps with activations
    kept and recomputed, and the other stages on a part of the text.
    """
    device = chosen_device(recipe.device)
    return {
        "run.name": recipe.name,
        "run.stages": ", ".join(recipe.stages),
        "run.without": recipe.without or "",
        "machine.dtype": chosen_dtype(recipe.pretrain.dtype, device),
        "machine.device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        **_model_facts(recipe),
        **_measured(recipe, device),
    }


def _model_facts(recipe: Recipe) -> dict[str, Any]:
    config = recipe.sized_model
    counts = count_parameters(config)
    return {
        "model.parameters_total": counts.total,
        "model.parameters_mtp": counts.mtp,
        "model.parameters_active": counts.active,
        "model.parameters_active_without_embedding": counts.active_without_embedding,
        "model.kv_cache_bytes_per_token": kv_cache_bytes_per_token(config),
        "model.train_flops_per_token": train_flops_per_token(config, recipe.data.sequence_length),
    }


def _measured(recipe: Recipe, device: str) -> dict[str, Any]:
    """Time and memory, of parts of the run that are tried here and now."""
    torch.set_num_threads(recipe.threads or inspect().usable_cores)
    shape = Shape(recipe.name, recipe.sized_model, recipe.pretrain, recipe.data.sequence_length)
    text = measure_text(recipe)
    chosen = recipe.pretrain.activations
    token = {chosen: training_token_seconds(shape, device)}
    forward = forward_token_seconds(shape, device)
    whole = _held_bytes(device, text.primed_bytes)
    (other,) = set(KEPT_OR_RECOMPUTED) - {chosen}
    token[other] = training_token_seconds(shape.but(activations=other), device)
    weights = 4 * count_parameters(recipe.sized_model).total_with_mtp
    costs = Costs(
        training_token=token[chosen],
        forward_token=forward,
        data=text.data,
        tokenizer=text.tokenizer,
        compressors=text.compressors,
        heldout_tokens=text.heldout_tokens,
        weights_bytes=weights,
    )
    seconds = {stage.name: _seconds(stage, costs) for stage in recipe.run_stages()}
    if Control.name in seconds:  # it takes as long as reinforcement learning
        seconds[Control.name] = seconds[RL.name]
    memory = {
        choice: _memory(recipe, recipe.pretrain, recipe.pretrain.batch_tokens, device, choice).total
        for choice in KEPT_OR_RECOMPUTED
    }
    batch = recipe.pretrain.batch_tokens
    return {
        "memory.whole_bytes": whole,
        "memory.training_bytes": memory[chosen],
        **{f"memory.training_bytes_{choice}": memory[choice] for choice in KEPT_OR_RECOMPUTED},
        **{f"seconds.step_{choice}": token[choice] * batch for choice in KEPT_OR_RECOMPUTED},
        **{f"seconds.{name}": value for name, value in seconds.items() if value},
        "seconds.total": sum(seconds.values()),
        "data.bytes": text.summary.bytes,
        **{f"data.left_out.{reason}": count for reason, count in text.left_out.items()},
    }


def _held_bytes(device: str, primed_bytes: int) -> int:
    """What this process has held so far, as the run will; the compressors' memory is added. On a
    GPU its memory alone counts, which is the one that runs out.
    """
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return peak_memory_bytes() + primed_bytes


def _seconds(stage: Stage, costs: Costs) -> float:
    """A stage's estimate of its time."""
    remedy = "correct its method seconds, which is given xushi.run.stages.Costs"
    try:
        value = float(stage.seconds(costs))
    except Exception as error:  # the stage may be from somebody's own file
        raise BadInput(
            f"stage {stage.name} cannot say how long it takes: {type(error).__name__}: {error}",
            remedy,
        ) from error
    if not 0 <= value < math.inf:
        raise BadInput(f"stage {stage.name} says that it takes {value} seconds", remedy)
    return value


def plan_sentence(plan: dict[str, Any]) -> str:
    """The plan in one sentence: time, memory, and what the text leaves out."""
    left_out = in_short(
        {
            key.removeprefix("data.left_out."): value
            for key, value in plan.items()
            if key.startswith("data.left_out.")
        }
    )
    memory = "memory" if plan["machine.device"] == "cpu" else "GPU memory"
    return (
        f"It takes about {_duration(plan['seconds.total'])} and "
        f"{plan['memory.whole_bytes'] / GIB:.1f} GiB of {memory} for {plan['data.bytes']:,} bytes "
        f"of text, and leaves out {left_out or 'nothing'}."
    )


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"


def _memory(
    recipe: Recipe, pretrain: PretrainConfig, tokens: int, device: str, activations: str
) -> TrainingMemory:
    """What a step on `tokens` tokens needs on one process."""
    return training_memory_bytes(
        recipe.sized_model,
        tokens,
        recipe.data.sequence_length,
        pretrain.optimizer,
        "bf16" if chosen_dtype(pretrain.dtype, device) == "bf16" else "fp32",
        bool(pretrain.mtp_weight),
        bool(pretrain.indexer_weight),
        activations == "recompute",
    )


def check_memory(
    recipe: Recipe, layout: Layout, memory_total: int | None, processes_here: int
) -> None:
    """Raise a `XushiError` with the numbers, and what would fit, if pretraining cannot fit into
    this machine's memory.

    An estimate (`training_memory_bytes`) against all the memory there is: what is refused would not
    run, what is not refused may still be too much beside other programs.
    """
    if memory_total is None or not Pretrain.wanted(recipe):
        return
    room = memory_total // processes_here
    place = "this GPU" if layout.device == "cuda" else "this machine"
    if (needed := _bytes_per_process(recipe, layout, recipe.pretrain)) <= room:
        return
    problem = (
        f"pretraining needs about {needed / GIB:,.1f} GiB in each process, and {place} has "
        f"{memory_total / GIB:,.1f} GiB for {processes_here} of them"
    )
    for changes, said in _smaller(recipe):
        fits = _bytes_per_process(recipe, layout, recipe.pretrain.model_copy(update=changes))
        if fits <= room:
            raise BadInput(
                problem,
                f"with {said} (by --set) it is about {fits / GIB:,.1f} GiB; or use more machines",
            )
    raise BadInput(
        problem,
        "weights, gradients and moments alone are too much for any batch: use a smaller model, "
        "or more machines",
    )


def _smaller(recipe: Recipe) -> Iterator[tuple[dict[str, Any], str]]:
    """Settings that need less memory, the least change first."""
    yield {"activations": "recompute"}, "pretrain.activations=recompute"
    rows = recipe.pretrain.batch_tokens // recipe.data.sequence_length
    while rows > 1:
        rows //= 2
        tokens = rows * recipe.data.sequence_length
        yield (
            {"activations": "recompute", "batch_tokens": tokens},
            f"pretrain.activations=recompute and pretrain.batch_tokens={tokens}",
        )


def _bytes_per_process(recipe: Recipe, layout: Layout, pretrain: PretrainConfig) -> int:
    length = recipe.data.sequence_length
    rows = -(-(pretrain.batch_tokens // length) // layout.data)
    parts = _memory(recipe, pretrain, rows * length, layout.device, pretrain.activations)
    stages = layout.pipeline
    share = (parts.weights + parts.gradients + parts.optimizer) // (layout.data * stages)
    # A stage keeps its layers' activations of as many microbatches as there are stages.
    activations = parts.activations // max(stages, min(rows, MICROBATCHES_PER_STAGE * stages))
    # Each process makes the whole model before it keeps its part.
    made = 0
    if layout.data * stages > 1:
        made = 4 * count_parameters(recipe.sized_model).total_with_mtp
    return max(made, share + activations + parts.logits)
