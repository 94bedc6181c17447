"""What a run will cost, before anything starts: parameters, memory, and time from two steps timed here and now."""

import time
from typing import Any

import torch

from xushi.base.machine import inspect
from xushi.model import Deepseek, pretraining_loss
from xushi.plan import count_parameters, kv_cache_bytes_per_token, train_flops_per_token, training_memory_bytes
from xushi.recipe import Recipe
from xushi.train import chosen_dtype, new_optimizer, set_compute_dtype

# Sampling an answer costs about as much again as learning from it (measured on the demo, docs/lab-log.md).
RL_COST_PER_TRAINED_TOKEN = 2.0


def describe(recipe: Recipe) -> dict[str, Any]:
    """The plan of a run as flat keys; takes a few seconds because it times two optimizer steps."""
    config = recipe.model.model_copy(update={"vocab_size": recipe.tokenizer.vocab_size})
    counts = count_parameters(config)
    dtype = chosen_dtype(recipe.pretrain.dtype)
    batch_tokens = recipe.pretrain.batch_tokens
    memory = training_memory_bytes(config, batch_tokens, recipe.data.sequence_length, recipe.pretrain.optimizer,
                                   "bf16" if dtype == "bf16" else "fp32", bool(recipe.pretrain.mtp_weight),
                                   bool(recipe.pretrain.indexer_weight))
    torch.set_num_threads(recipe.threads or inspect().usable_cores)
    per_token = _seconds_per_token(recipe, Deepseek(config).initialise(recipe.seed))
    seconds = {"pretrain": recipe.pretrain.steps * batch_tokens * per_token if recipe.runs("pretrain") else 0.0}
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
        "memory.training_bytes": memory.total,
        **{f"seconds.{stage}": value for stage, value in seconds.items()},
        "seconds.training": sum(seconds.values())}


def _seconds_per_token(recipe: Recipe, model: Deepseek) -> float:
    """The faster of two full optimizer steps on random tokens, after one that warms up."""
    config, length = recipe.pretrain, recipe.data.sequence_length
    set_compute_dtype(model, config.dtype)
    optimizer = new_optimizer(model, config)
    stream = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (config.batch_tokens // length, length), generator=stream)
    batch = {"tokens": tokens, "targets": tokens.roll(-1, 1), "positions": torch.arange(length).expand_as(tokens),
             "segments": torch.zeros_like(tokens), "loss_mask": torch.ones_like(tokens, dtype=torch.bool)}
    times = []
    for _ in range(3):
        began = time.perf_counter()
        loss = pretraining_loss(model, batch, mtp_weight=config.mtp_weight, balance_weight=config.balance_weight,
                                indexer_weight=config.indexer_weight)
        loss.total.backward()  # type: ignore[no-untyped-call]
        optimizer.step(1e-9)
        optimizer.zero_grad()
        times.append(time.perf_counter() - began)
    return min(times[1:]) / config.batch_tokens
