"""A model without memory, and then with memory but without values, which whatever has the weights
fills tensor by tensor: random ones (`Deepseek.initialise`), a run's checkpoint, a published
directory (weights.py).
"""

import torch

from xushi.base.machine import inspect
from xushi.model.config import ModelConfig
from xushi.model.deepseek import Deepseek
from xushi.model.names import stays_float32


def model_without_memory(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Deepseek:
    """The model on the meta device, with its parameters' final dtypes."""
    with torch.device("meta"):
        model = Deepseek(config)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if stays_float32(name, config) else dtype)
    return model


def state_bytes(model: Deepseek) -> int:
    """Bytes of the model's parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def allocate(model: Deepseek, device: torch.device | str) -> None:
    """Give the model memory on `device`. Its values are undefined then; only the rotations' angles
    are right. A MemoryError if the machine has less than it needs.
    """
    needed = state_bytes(model)
    total = inspect().memory_total
    if torch.device(device).type == "cpu" and total is not None and needed > total:
        # Linux may promise memory that it does not have and kill the process that uses it.
        raise MemoryError(f"it has {needed} bytes, the machine {total}")
    model.to_empty(device=device)
    model.make_angles(device)
