"""What a run will cost, before anything starts: parameters, memory, and time from steps timed here
and now.
"""

import time
from collections.abc import Iterator
from typing import Any, Literal

import torch

from xushi.base.errors import BadInput
from xushi.base.machine import GIB, chosen_device, inspect
from xushi.plan import (
    count_parameters,
    kv_cache_bytes_per_token,
    train_flops_per_token,
    training_memory_bytes,
)
from xushi.plan.memory import TrainingMemory
from xushi.run.benchmark import Shape, training_step
from xushi.run.recipe import Recipe
from xushi.run.stages.pretrain import Pretrain
from xushi.train import MICROBATCHES_PER_STAGE, Layout, PretrainConfig, chosen_dtype

KEPT_OR_RECOMPUTED: tuple[Literal["keep", "recompute"], ...] = ("keep", "recompute")


def describe(recipe: Recipe) -> dict[str, Any]:
    """The plan of a run as flat keys.

    Takes some seconds: it times steps with activations kept and recomputed.
    """
    config = recipe.sized_model
    counts = count_parameters(config)
    device = chosen_device(recipe.device)
    shape = Shape(recipe.name, config, recipe.pretrain, recipe.data.sequence_length)
    memory = {
        choice: _memory(recipe, recipe.pretrain, recipe.pretrain.batch_tokens, device, choice).total
        for choice in KEPT_OR_RECOMPUTED
    }
    torch.set_num_threads(recipe.threads or inspect().usable_cores)
    step = {
        choice: _step_seconds(shape.but(activations=choice), device)
        for choice in KEPT_OR_RECOMPUTED
    }
    activations = recipe.pretrain.activations
    per_token = step[activations] / recipe.pretrain.batch_tokens
    estimates = {stage.name: stage.seconds(per_token) for stage in recipe.run_stages()}
    return {
        "run.name": recipe.name,
        "run.stages": ", ".join(recipe.stages),
        "run.without": recipe.without or "",
        "machine.dtype": chosen_dtype(recipe.pretrain.dtype, device),
        "model.parameters_total": counts.total,
        "model.parameters_mtp": counts.mtp,
        "model.parameters_active": counts.active,
        "model.parameters_active_without_embedding": counts.active_without_embedding,
        "model.kv_cache_bytes_per_token": kv_cache_bytes_per_token(config),
        "model.train_flops_per_token": train_flops_per_token(config, shape.length),
        "memory.training_bytes": memory[activations],
        **{f"memory.training_bytes_{choice}": value for choice, value in memory.items()},
        **{f"seconds.step_{choice}": value for choice, value in step.items()},
        **{f"seconds.{name}": value for name, value in estimates.items() if value},
        "seconds.training": sum(estimates.values()),
    }


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


def _step_seconds(shape: Shape, device: str) -> float:
    """The faster of two full optimizer steps on random tokens, after one that warms up."""
    step, tokens, times = training_step(shape, device), shape.tokens(), []
    for _ in range(3):
        began = time.perf_counter()
        step(tokens)
        times.append(time.perf_counter() - began)
    return min(times[1:])
