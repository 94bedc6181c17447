"""How much memory a model takes for generation, and which dtype and cache size fit the machine.

Not here: loading (model.weights), the memory of training (plan.memory).
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from xushi.base.errors import BadInput
from xushi.base.machine import best_training_dtype, inspect
from xushi.base.model_directory import read_settings
from xushi.model import ModelConfig
from xushi.model.building import model_without_memory, state_bytes
from xushi.model.cache import slot_widths

# The default cache has room for this many conversations of full length, but has no more slots than
# the limit.
DEFAULT_CONVERSATIONS = 8
DEFAULT_SLOTS_LIMIT = 1 << 16
# A cache that the machine's memory makes smaller than the default is at least this large.
SMALLEST_CACHE = 1024
# Part of the available memory that weights and cache may take. The rest is for a step's tensors.
SHARE = 0.9
# More layers than any model has. load_pretrained says what is wrong with such a config.
MOST_LAYERS = 1000
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class MemoryPlan:
    """What a model takes for generation. `slots`: the tokens that the cache holds. `reason`: why
    this dtype.
    """

    dtype: torch.dtype
    slots: int
    weight_bytes: int
    cache_bytes: int
    reason: str

    def __str__(self) -> str:
        name = NAMES.get(self.dtype, str(self.dtype).removeprefix("torch."))
        return (
            f"weights {gigabytes(self.weight_bytes)} in {name} ({self.reason}), cache of "
            f"{self.slots:,} tokens {gigabytes(self.cache_bytes)}"
        )


def plan_memory(
    directory: Path, config: ModelConfig, dtype: torch.dtype | None = None, slots: int | None = None
) -> MemoryPlan:
    """The dtype and cache size for the model of `directory`: those given, else what fits.

    Weights in float32 stay float32 where they fit. Weights of 16 bits or fewer become bfloat16 if
    the processor multiplies it or float32 does not fit, else float32. The default cache holds
    `DEFAULT_CONVERSATIONS` full contexts, at most `DEFAULT_SLOTS_LIMIT` tokens but one context, or
    as much of that as fits. What does not fit is a `XushiError` with the figures.
    """
    if slots is not None and slots < 1:
        raise BadInput(f"a cache of {slots} tokens holds nothing", "give at least 1")
    wanted = slots or default_slots(config)
    machine = inspect()
    available = machine.memory_available
    if available is None:
        available = machine.memory_total
    room = None if available is None else int(available * SHARE)
    least = slots or min(wanted, SMALLEST_CACHE)
    if dtype is None:
        dtype, reason = _default_dtype(directory, config, least, room, machine.features)
    else:
        reason = "as asked for"
    weights = weight_bytes(config, dtype)
    each = slot_bytes(config, dtype)
    if room is not None and weights + least * each > room:
        raise BadInput(
            f"{directory} does not fit into memory: weights in {NAMES.get(dtype, dtype)} take "
            f"{gigabytes(weights)}, a cache of {least:,} tokens {gigabytes(least * each)}, and "
            f"{gigabytes(room)} can be used of {gigabytes(available or 0)} available",
            _remedy(config, dtype, least, room, slots is not None),
        )
    fitting = wanted if room is None else min(wanted, (room - weights) // max(each, 1))
    return MemoryPlan(dtype, fitting, weights, fitting * each, reason)


def default_slots(config: ModelConfig) -> int:
    """The default number of cache slots where memory is enough: at least one full context."""
    context = config.max_position_embeddings
    return max(context, min(DEFAULT_CONVERSATIONS * context, DEFAULT_SLOTS_LIMIT))


def weight_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of the model's parameters and buffers when its weights are `dtype`; 0 for a config of
    which no model can be built, which `load_pretrained` refuses.
    """
    if config.num_hidden_layers > MOST_LAYERS:
        return 0
    try:
        model = model_without_memory(config, dtype)
    except (RuntimeError, TypeError, ValueError, ArithmeticError):
        return 0
    return state_bytes(model)


def slot_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of the cache for one token."""
    values = sum(slot_widths(config, layer)[0] for layer in range(config.num_hidden_layers))
    return values * dtype.itemsize


def gigabytes(count: int) -> str:
    """Bytes for a reader, such as 62.8 GB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _default_dtype(
    directory: Path,
    config: ModelConfig,
    least: int,
    room: int | None,
    features: frozenset[str],
) -> tuple[torch.dtype, str]:
    """(dtype, why) for the files of `directory` and a cache of `least` tokens."""
    wide, narrow = torch.float32, torch.bfloat16
    need = weight_bytes(config, wide) + least * slot_bytes(config, wide)
    fits = room is None or need <= room
    table = read_settings(directory, "config.json")
    quantised = bool(table.get("quantization_config"))
    stored = table.get("dtype") or table.get("torch_dtype")
    if not fits:
        return narrow, "float32 does not fit into memory"
    if quantised or stored in ("bfloat16", "float16"):
        if best_training_dtype(features)[0] != "bf16":
            return wide, "without instructions for bf16 it is faster"
        return narrow, (
            "as stored; this processor multiplies it"
            if stored == "bfloat16" and not quantised
            else "nearest to what is stored; this processor multiplies it"
        )
    if stored == "float32":
        return wide, "as stored"
    return wide, f"stored as {stored}" if isinstance(stored, str) else "no dtype is stated"


def _remedy(config: ModelConfig, dtype: torch.dtype, least: int, room: int, asked: bool) -> str:
    """What makes the model fit, or that nothing does. `asked`: whether the user asked for a
    cache of `least` tokens.
    """
    narrow = torch.bfloat16

    def fitting(kind: torch.dtype) -> int:
        return (room - weight_bytes(config, kind)) // max(slot_bytes(config, kind), 1)

    fewer = f"give --cache-tokens {fitting(dtype)} (LLM: slots) or less"
    if asked and fitting(dtype) >= 1:
        return fewer
    if dtype != narrow and fitting(narrow) >= least:
        return "give --dtype bf16 (LLM: dtype=torch.bfloat16)"
    if fitting(dtype) >= 1:
        return fewer
    if dtype != narrow and fitting(narrow) >= 1:
        return (
            f"give --dtype bf16 and --cache-tokens {fitting(narrow)} or less (LLM: "
            "dtype=torch.bfloat16, slots)"
        )
    return "use a machine with more memory, or a smaller model"
