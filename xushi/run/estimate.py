"""What a run will cost, before anything starts: parameters, memory, and time from steps timed here and now."""

import time
from typing import Any

import torch

from xushi.base.machine import inspect
from xushi.plan import count_parameters, kv_cache_bytes_per_token, train_flops_per_token, training_memory_bytes
from xushi.recipe import Recipe
from xushi.run.benchmark import Shape, training_step
from xushi.train import chosen_dtype

# Sampling an answer costs about as much again as learning from it (measured on the demo, docs/lab-log.md).
RL_COST_PER_TRAINED_TOKEN = 2.0


def describe(recipe: Recipe) -> dict[str, Any]:
    """The plan of a run as flat keys; some seconds, since it times steps with activations kept and recomputed."""
    config = recipe.model.model_copy(update={"vocab_size": recipe.tokenizer.vocab_size})
    counts = count_parameters(config)
    dtype = chosen_dtype(recipe.pretrain.dtype)
    batch_tokens = recipe.pretrain.batch_tokens
    shape = Shape(recipe.name, config, recipe.pretrain, recipe.data.sequence_length)
    memory = {choice: training_memory_bytes(
        config, batch_tokens, shape.length, recipe.pretrain.optimizer, "bf16" if dtype == "bf16" else "fp32",
        bool(recipe.pretrain.mtp_weight), bool(recipe.pretrain.indexer_weight), choice == "recompute").total
        for choice in ("keep", "recompute")}
    torch.set_num_threads(recipe.threads or inspect().usable_cores)
    step = {choice: _step_seconds(shape.but(activations=choice)) for choice in ("keep", "recompute")}
    per_token = step[recipe.pretrain.activations] / batch_tokens
    seconds = {"pretrain": recipe.pretrain.tokens(shape.length) * per_token if recipe.runs("pretrain") else 0.0}
    digits = recipe.environment.max_digits if recipe.environment else 0
    if recipe.sft is not None and recipe.runs("sft"):
        example = digits + 4 + recipe.sft.thinking_share * digits
        seconds["sft"] = recipe.sft.steps * recipe.sft.batch_examples * example * per_token
    if recipe.rl is not None and recipe.runs("rl"):
        answers = recipe.rl.steps * recipe.rl.prompts * recipe.rl.samples
        seconds["rl"] = answers * (2 * digits + 4) * per_token * RL_COST_PER_TRAINED_TOKEN
        seconds["control"] = seconds["rl"] if recipe.runs("sft") else 0.0
    return {
        "run.name": recipe.name, "run.stages": ", ".join(recipe.stages), "run.without": recipe.without or "",
        "machine.dtype": dtype, "model.parameters_total": counts.total, "model.parameters_mtp": counts.mtp,
        "model.parameters_active": counts.active,
        "model.parameters_active_without_embedding": counts.active_without_embedding,
        "model.kv_cache_bytes_per_token": kv_cache_bytes_per_token(config),
        "model.train_flops_per_token": train_flops_per_token(config, recipe.data.sequence_length),
        "memory.training_bytes": memory[recipe.pretrain.activations],
        **{f"memory.training_bytes_{choice}": value for choice, value in memory.items()},
        **{f"seconds.step_{choice}": value for choice, value in step.items()},
        **{f"seconds.{stage}": value for stage, value in seconds.items()},
        "seconds.training": sum(seconds.values())}


def _step_seconds(shape: Shape) -> float:
    """The faster of two full optimizer steps on random tokens, after one that warms up."""
    step, tokens, times = training_step(shape), shape.tokens(), []
    for _ in range(3):
        began = time.perf_counter()
        step(tokens)
        times.append(time.perf_counter() - began)
    return min(times[1:])
