"""What a model costs, counted from its config alone: parameters, cache, FLOPs and memory.

Not here: predictions of time.
"""

from xushi.plan.inspection import group_layers, inspect_model
from xushi.plan.memory import TrainingMemory, training_memory_bytes
from xushi.plan.parameters import ParameterCount, count_parameters
from xushi.plan.reach import kv_cache_bytes, kv_cache_bytes_per_token
from xushi.plan.work import decode_flops_per_token, train_flops_per_token

__all__ = [
    "ParameterCount",
    "TrainingMemory",
    "count_parameters",
    "decode_flops_per_token",
    "group_layers",
    "inspect_model",
    "kv_cache_bytes",
    "kv_cache_bytes_per_token",
    "train_flops_per_token",
    "training_memory_bytes",
]
