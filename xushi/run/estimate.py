"""What a run will cost, before anything starts: parameters, memory, and time from steps timed here
and now.
"""

import time
from collections.abc import Iterator
from typing import Any

import torch

from xushi.base.errors import BadInput
from xushi.base.machine import GIB, chosen_device, inspect
from xushi.plan import (
    count_parameters,
    kv_cache_bytes_per_token,
    train_flops_per_token,
    training_memory_bytes,
)
from xushi.recipe import Recipe
from xushi.run.benchmark import Shape, training_step
from xushi.train import PIECES_PER_STAGE, Layout, PretrainConfig, chosen_dtype

# Sampling an answer costs about as much again as learning from it (measured on the demo,
# docs/lab-log.md).
RL_COST_PER_TRAINED_TOKEN = 2.0


def describe(recipe: Recipe) -> dict[str, Any]:
    """The plan of a run as flat keys; some seconds, since it times steps with activations kept and
    recomputed.
    """
    config = recipe.model.model_copy(update={"vocab_size": recipe.tokenizer.vocab_size})
    counts = count_parameters(config)
    device = chosen_device(recipe.device)
    dtype = chosen_dtype(recipe.pretrain.dtype, device)
    batch_tokens = recipe.pretrain.batch_tokens
    shape = Shape(recipe.name, config, recipe.pretrain, recipe.data.sequence_length)
    memory = {
        choice: training_memory_bytes(
            config,
            batch_tokens,
            shape.length,
            recipe.pretrain.optimizer,
            "bf16" if dtype == "bf16" else "fp32",
            bool(recipe.pretrain.mtp_weight),
            bool(recipe.pretrain.indexer_weight),
            choice == "recompute",
        ).total
        for choice in ("keep", "recompute")
    }
    torch.set_num_threads(recipe.threads or inspect().usable_cores)
    step = {
        choice: _step_seconds(shape.but(activations=choice), device)
        for choice in ("keep", "recompute")
    }
    per_token = step[recipe.pretrain.activations] / batch_tokens
    seconds = {
        "pretrain": recipe.pretrain.tokens(shape.length) * per_token
        if recipe.runs("pretrain")
        else 0.0
    }
    digits = recipe.environment.max_digits if recipe.environment else 0
    if recipe.sft is not None and recipe.runs("sft"):
        example = digits + 4 + recipe.sft.thinking_share * digits
        seconds["sft"] = recipe.sft.steps * recipe.sft.batch_examples * example * per_token
    if recipe.rl is not None and recipe.runs("rl"):
        answers = recipe.rl.steps * recipe.rl.prompts * recipe.rl.samples
        seconds["rl"] = answers * (2 * digits + 4) * per_token * RL_COST_PER_TRAINED_TOKEN
        seconds["control"] = seconds["rl"] if recipe.runs("sft") else 0.0
    return {
        "run.name": recipe.name,
        "run.stages": ", ".join(recipe.stages),
        "run.without": recipe.without or "",
        "machine.dtype": dtype,
        "model.parameters_total": counts.total,
        "model.parameters_mtp": counts.mtp,
        "model.parameters_active": counts.active,
        "model.parameters_active_without_embedding": counts.active_without_embedding,
        "model.kv_cache_bytes_per_token": kv_cache_bytes_per_token(config),
        "model.train_flops_per_token": train_flops_per_token(config, recipe.data.sequence_length),
        "memory.training_bytes": memory[recipe.pretrain.activations],
        **{f"memory.training_bytes_{choice}": value for choice, value in memory.items()},
        **{f"seconds.step_{choice}": value for choice, value in step.items()},
        **{f"seconds.{stage}": value for stage, value in seconds.items()},
        "seconds.training": sum(seconds.values()),
    }


def check_memory(
    recipe: Recipe, layout: Layout, memory_total: int | None, processes_here: int
) -> None:
    """Raise a `XushiError` with the numbers, and what would fit, if pretraining cannot fit into
    this machine's memory.

    An estimate (`training_memory_bytes`) against all the memory there is: what is refused would not
    run, what is not refused may still be too much beside other programs.
    """
    if memory_total is None or not recipe.runs("pretrain"):
        return
    room = memory_total // processes_here
    if (needed := _bytes_per_process(recipe, layout, recipe.pretrain)) <= room:
        return
    problem = (
        f"pretraining needs about {needed / GIB:,.1f} GiB in each process, and this machine has "
        f"{memory_total / GIB:,.1f} GiB for {processes_here}"
    )
    for changes, said in _smaller(recipe):
        fits = _bytes_per_process(recipe, layout, recipe.pretrain.model_copy(update=changes))
        if fits <= room:
            raise BadInput(
                problem, f"with {said} it is about {fits / GIB:,.1f} GiB; or use more machines"
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
    config = recipe.model.model_copy(update={"vocab_size": recipe.tokenizer.vocab_size})
    length = recipe.data.sequence_length
    rows = -(-(pretrain.batch_tokens // length) // layout.data)
    parts = training_memory_bytes(
        config,
        rows * length,
        length,
        pretrain.optimizer,
        "bf16" if chosen_dtype(pretrain.dtype, layout.device) == "bf16" else "fp32",
        bool(pretrain.mtp_weight),
        bool(pretrain.indexer_weight),
        pretrain.activations == "recompute",
    )
    stages = layout.pipeline
    share = (parts.weights + parts.gradients + parts.optimizer) // (layout.data * stages)
    # A stage keeps its layers' activations of as many pieces as there are stages.
    activations = parts.activations // max(stages, min(rows, PIECES_PER_STAGE * stages))
    # Each process makes the whole model before it keeps its part.
    made = 4 * count_parameters(config).total_with_mtp if layout.data * stages > 1 else 0
    return max(made, share + activations + parts.logits)


def _step_seconds(shape: Shape, device: str) -> float:
    """The faster of two full optimizer steps on random tokens, after one that warms up."""
    step, tokens, times = training_step(shape, device), shape.tokens(), []
    for _ in range(3):
        began = time.perf_counter()
        step(tokens)
        times.append(time.perf_counter() - began)
    return min(times[1:])
