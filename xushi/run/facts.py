"""The facts of a run itself, under the keys of results.json: recipe, machine, model, memory."""

import platform
from typing import Any

import torch

from xushi import __version__
from xushi.base.machine import children_peak_memory_bytes, inspect, peak_memory_bytes
from xushi.ops import native
from xushi.plan import count_parameters, kv_cache_bytes_per_token
from xushi.run.place import RunPlace
from xushi.run.recipe import Recipe
from xushi.run.stages.training import model_config
from xushi.train import Layout, chosen_dtype


def op_forms(recipe: Recipe, layout: Layout) -> str:
    """Which forms of the ops run."""
    if layout.device != "cpu":
        return f"pytorch on {layout.device}"
    return native.form(chosen_dtype(recipe.pretrain.dtype, layout.device))


def run_facts(recipe: Recipe, place: RunPlace) -> dict[str, Any]:
    """Everything that no stage measures."""
    machine = inspect()
    config = model_config(recipe.model, place.tokenizer())
    counts = count_parameters(config)
    on_gpu = place.layout.device == "cuda"
    return {
        "run.name": recipe.name,
        "run.seed": recipe.seed,
        "run.recipe_hash": recipe.hash,
        "run.without": recipe.without or "",
        "run.version": __version__,
        "machine.cpu": machine.cpu,
        "machine.cores": machine.usable_cores,
        "machine.threads": torch.get_num_threads(),
        "machine.memory_bytes": machine.memory_total or 0,
        "machine.torch": torch.__version__,
        "machine.python": platform.python_version(),
        "machine.op_forms": op_forms(recipe, place.layout),
        "machine.dtype": chosen_dtype(recipe.pretrain.dtype, place.layout.device),
        "machine.system": machine.system,
        "machine.device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "model.parameters_total": counts.total,
        "model.parameters_active": counts.active,
        "model.parameters_active_without_embedding": counts.active_without_embedding,
        "model.parameters_mtp": counts.mtp,
        "model.kv_cache_bytes_per_token": kv_cache_bytes_per_token(config),
        "memory.peak_bytes": peak_memory_bytes(),
        "memory.peak_children_bytes": children_peak_memory_bytes(),
    }
