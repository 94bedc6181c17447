"""Published FP8 and FP4 weights, given back their values while they are read.

FP8 (V3 onwards): float8_e4m3fn with one scale, float32 or a power of two (float8_e8m0fnu), for each
block of the matrix, 128x128 unless config.json says otherwise; the last blocks may be partial.
Weight = stored value times scale, although Hugging Face's name for it is `weight_scale_inv`;
DeepSeek's is `scale`.

FP4 (V4's routed experts): e2m1, two to a byte, the lower four bits first, and for every 32 columns
of a row a scale in e8m0. As transformers' `Fp8Dequantize`, which takes the blocks from the scales'
shape; here the shape must agree.

Axes: R rows, C columns.
"""

import math
from typing import Any

import torch
from torch import Tensor

from xushi.base.errors import BadInput
from xushi.model.shards import Stored, shown

FP8_BLOCK = (128, 128)
# Of the unpacked row; 16 bytes. A format with a scale per 16 values exists too (NVFP4) and is not
# this one.
FP4_BLOCK = (1, 32)
FP4_VALUES = (
    0.0,
    0.5,
    1.0,
    1.5,
    2.0,
    3.0,
    4.0,
    6.0,
    -0.0,
    -0.5,
    -1.0,
    -1.5,
    -2.0,
    -3.0,
    -4.0,
    -6.0,
)
PLAIN = frozenset((torch.float64, torch.float32, torch.float16, torch.bfloat16))
PACKED = frozenset((torch.int8, torch.uint8))
PIECE = 2**22  # values that are unpacked at a time
_REMEDY = "the weights do not belong to this config.json; get both from one place"


def fp8_block(table: dict[str, Any], where: str) -> tuple[int, int]:
    """The rows and columns of an FP8 block by a config.json's `quantization_config`; another kind
    is a `XushiError`.
    """
    quantised = table.get("quantization_config")
    if quantised is None:
        return FP8_BLOCK
    if not isinstance(quantised, dict):
        raise BadInput(
            f"{where}: quantization_config is {shown(quantised)}, not a table", "get the file again"
        )
    for key, value in (("quant_method", "fp8"), ("fmt", "e4m3")):
        if quantised.get(key, value) != value:
            raise BadInput(
                f"{where}: quantization_config.{key} is {shown(repr(quantised[key]))}, and only "
                f"{value!r} is implemented",
                "use DeepSeek's own FP8 checkpoint, or one in bfloat16",
            )
    block = quantised.get("weight_block_size")
    if block is None:
        return FP8_BLOCK
    if (
        not isinstance(block, list)
        or len(block) != 2
        or not all(type(x) is int and 0 < x < 2**31 for x in block)
    ):
        raise BadInput(
            f"{where}: quantization_config.weight_block_size is {shown(block)}, not two whole "
            "numbers",
            "DeepSeek's are [128, 128]",
        )
    return block[0], block[1]


def block_of(stored: Stored, fp8: tuple[int, int]) -> tuple[int, int]:
    """The block that one scale of this tensor stands for; (1, 1) for a tensor without scales."""
    return (
        FP4_BLOCK
        if stored.dtype in PACKED
        else fp8
        if stored.dtype == torch.float8_e4m3fn
        else (1, 1)
    )


def check_weight(
    stored: Stored,
    scale: Stored | None,
    shape: tuple[int, ...],
    fp8: tuple[int, int],
    is_expert: bool,
) -> None:
    """A `XushiError` unless the tensor and its scale are weights of `shape` in a form that is known
    here.

    `is_expert`: FP4 may be; `fp8` is the block of FP8 weights.
    """
    where, kind = f"{stored.file}: {shown(stored.name)}", str(stored.dtype).removeprefix("torch.")
    packed = stored.dtype in PACKED
    wanted = (*shape[:-1], math.ceil(shape[-1] / 2)) if packed and is_expert else shape
    if stored.shape != wanted:
        raise BadInput(
            f"{where} has shape {list(stored.shape)}, config.json asks for {list(wanted)}", _REMEDY
        )
    if stored.dtype in PLAIN:
        if scale is not None:
            raise BadInput(
                f"{scale.file} holds {shown(scale.name)}, a scale, and {shown(stored.name)} is in "
                f"{kind}",
                _REMEDY,
            )
        return
    if not (packed and is_expert) and not (stored.dtype == torch.float8_e4m3fn and len(shape) == 2):
        raise BadInput(f"{where} is in {kind}, which is no dtype for it", _REMEDY)
    if scale is None:
        raise BadInput(
            f"{where} is in {kind} and there is no scale for it",
            "get the checkpoint again; without its scales it is not the model",
        )
    kinds = {torch.float8_e8m0fnu} if packed else {torch.float8_e8m0fnu, torch.float32}
    if scale.dtype not in kinds:
        raise BadInput(
            f"{scale.file}: {shown(scale.name)} is in {str(scale.dtype).removeprefix('torch.')}, "
            "which is "
            f"no dtype for a scale of {kind}",
            _REMEDY,
        )
    rows, columns = block_of(stored, fp8)
    grid = (math.ceil(shape[0] / rows), math.ceil(shape[1] / columns))
    if scale.shape != grid:
        raise BadInput(
            f"{scale.file}: {shown(scale.name)} has shape {list(scale.shape)}; blocks of "
            f"{rows}x{columns} "
            f"make {list(grid)}",
            "set quantization_config.weight_block_size in config.json to the blocks "
            "that the checkpoint has",
        )


def unpack_fp4(packed: Tensor) -> Tensor:
    """Bytes [R, C / 2] to float32 [R, C]."""
    low_high = packed.view(torch.uint8)
    indices = torch.stack((low_high & 15, low_high >> 4), dim=-1).flatten(-2).int()
    return torch.tensor(FP4_VALUES, device=packed.device)[indices]


def dequantise(target_RC: Tensor, stored: Tensor, scale: Tensor, block: tuple[int, int]) -> None:
    """Fill `target_RC`, of any float dtype and on any device, with the values of `stored`; products
    in float32.

    `stored` is [R, C] in FP8 or [R, C / 2] in packed FP4, `scale` one number per block. Goes by
    rows of blocks, so that no float32 copy of the whole is made.
    """
    total, columns = target_RC.shape
    rows = max(1, PIECE // columns // block[0]) * block[0]
    scale = scale.to(torch.float32)
    for first in range(0, total, rows):
        part = stored[first : first + rows].to(target_RC.device)
        values = unpack_fp4(part)[:, :columns] if part.dtype in PACKED else part.to(torch.float32)
        grid = scale[first // block[0] : math.ceil((first + len(part)) / block[0])].to(
            target_RC.device
        )
        wide = grid.repeat_interleave(block[0], 0)[: len(part)].repeat_interleave(block[1], 1)[
            :, :columns
        ]
        target_RC[first : first + rows] = values * wide
