"""Calls of the compiled kernels: which tensors they take, and how arguments are passed to C.

Not here: the kernels' autograd functions (`attention`, `experts`, `functions`).
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from xushi.ops.dispatch import asked_form
from xushi.ops.native.build import load

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
# Other tensor classes, such as DTensor, have no single block of memory that a kernel could read.
PLAIN = (Tensor, torch.nn.Parameter)


def serves(*activations: Tensor, weights: tuple[Tensor, ...] = ()) -> bool:
    """Whether the compiled kernels take these tensors. Callers ask before they use a kernel.

    True if all activations are float32 or all are bfloat16, all `weights` are float32, every tensor
    is a plain non-empty CPU tensor, XUSHI_OPS does not ask for another form, and the kernels can be
    loaded. The first call compiles the kernels if necessary.
    """
    dtype = activations[0].dtype
    return (
        dtype in DTYPES
        and all(t.dtype == dtype for t in activations)
        and all(t.dtype == torch.float32 for t in weights)
        and all(
            t.device.type == "cpu" and t.numel() and type(t) in PLAIN
            for t in (*activations, *weights)
        )
        and asked_form() is None
        and load(DTYPES[dtype]) is not None
    )


def call(dtype: torch.dtype, name: str, *arguments: Tensor | int | float | None) -> None:
    """Call kernel `name` of the library for `dtype`.

    Tensors are passed as pointers (None: null), int as int64, float as float32. Tensors must be
    contiguous unless the kernel takes strides.
    """
    library = load(DTYPES[dtype])
    assert library is not None
    converted: list[Any] = []
    for argument in arguments:
        if argument is None or isinstance(argument, Tensor):
            converted.append(ctypes.c_void_p(None if argument is None else argument.data_ptr()))
        else:
            converted.append(
                ctypes.c_int64(argument) if isinstance(argument, int) else ctypes.c_float(argument)
            )
    getattr(library, name)(*converted)  # ctypes releases the GIL during the call


def check_shapes(matching: bool) -> None:
    """Raise ValueError unless the shapes match: a kernel trusts its sizes and would otherwise read
    beyond the end of a tensor.
    """
    if not matching:
        raise ValueError("the shapes of an op's inputs do not match")


def threads() -> int:
    """The number of threads a kernel may use."""
    return torch.get_num_threads()
