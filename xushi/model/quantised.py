"""Published FP8 and FP4 weights: checked, and converted to floating point while they are read.

FP8 (V3 and later): float8_e4m3fn with one scale for each block of the matrix. A scale is float32,
bfloat16 or a power of two (float8_e8m0fnu). Blocks are 128x128 unless config.json says otherwise;
the last blocks of a row or column may be partial. Weight = stored value * scale, although Hugging
Face calls the scale `weight_scale_inv`; DeepSeek calls it `scale`.

FP4 (V4's routed experts): e2m1, two values to a byte, the first in the lower four bits, and an e8m0
scale for every 32 columns of a row. Matches transformers' `Fp8Dequantize`, which derives the blocks
from the scales' shape; here that shape is checked.

Axes: R rows, C columns.
"""

import math
from typing import Any

import torch
from torch import Tensor

from xushi.base.errors import BadInput
from xushi.base.published_files import FROM_ELSEWHERE, shown
from xushi.model.shards import Stored

FP8_BLOCK = (128, 128)
# Rows and columns of the unpacked matrix. NVFP4, with a scale for 16 values, is another format.
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
CHUNK = 2**22  # values that are converted at a time


def fp8_block(table: dict[str, Any], where: str) -> tuple[int, int]:
    """The rows and columns of an FP8 block, from `quantization_config` of a config.json table.

    `where` names the file in messages. Another quantisation is a `XushiError`.
    """
    quantised = table.get("quantization_config")
    if quantised is None:
        return FP8_BLOCK
    if not isinstance(quantised, dict):
        raise BadInput(
            f"{where}: quantization_config is {shown(quantised)}, not a table", "get the file again"
        )
    if quantised.get("fmt", "e4m3") != "e4m3":
        raise BadInput(
            f"{where}: quantization_config.fmt is {shown(repr(quantised['fmt']))}; only 'e4m3' is "
            "implemented",
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
            f"{where}: quantization_config.weight_block_size is {shown(block)}, not two positive "
            "whole numbers",
            "set it to the checkpoint's block size; DeepSeek's is [128, 128]",
        )
    return block[0], block[1]


def block_of(stored: Stored, fp8: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns that share one scale of this tensor; (1, 1) for a tensor without scales."""
    if stored.dtype in PACKED:
        return FP4_BLOCK
    return fp8 if stored.dtype == torch.float8_e4m3fn else (1, 1)


def check_weight(
    stored: Stored,
    scale: Stored | None,
    shape: tuple[int, ...],
    fp8: tuple[int, int],
    is_expert: bool,
) -> None:
    """A `XushiError` unless the tensor and its scale are weights of `shape` in a format known here.

    `fp8` is the block of FP8 weights. Only experts (`is_expert`) may be FP4.
    """
    where = f"{stored.file}: {shown(stored.name)}"
    is_fp4 = stored.dtype in PACKED and is_expert
    wanted = (*shape[:-1], math.ceil(shape[-1] / 2)) if is_fp4 else shape
    if stored.shape != wanted:
        raise BadInput(
            f"{where} has shape {list(stored.shape)}, config.json asks for {list(wanted)}",
            FROM_ELSEWHERE,
        )
    if stored.dtype in PLAIN:
        if scale is not None:
            raise BadInput(
                f"{scale.file} holds {shown(scale.name)}, a scale, but {shown(stored.name)} is "
                f"{_name(stored)} and needs none",
                FROM_ELSEWHERE,
            )
        return
    is_fp8 = stored.dtype == torch.float8_e4m3fn and len(shape) == 2
    if not is_fp4 and not is_fp8:
        raise BadInput(f"{where} is {_name(stored)}, which is not supported for it", FROM_ELSEWHERE)
    if scale is None:
        raise BadInput(
            f"{where} is {_name(stored)} and its scale is missing",
            "get the checkpoint again; its weights are useless without their scales",
        )
    _check_scale(stored, scale, shape, block_of(stored, fp8))


def _check_scale(
    stored: Stored, scale: Stored, shape: tuple[int, ...], block: tuple[int, int]
) -> None:
    kinds = {torch.float8_e8m0fnu}
    if stored.dtype not in PACKED:
        kinds |= {torch.float32, torch.bfloat16}
    if scale.dtype not in kinds:
        raise BadInput(
            f"{scale.file}: {shown(scale.name)} is {_name(scale)}, which is not supported as a "
            f"scale of {_name(stored)}",
            FROM_ELSEWHERE,
        )
    rows, columns = block
    grid = (math.ceil(shape[0] / rows), math.ceil(shape[1] / columns))
    if scale.shape != grid:
        raise BadInput(
            f"{scale.file}: {shown(scale.name)} has shape {list(scale.shape)}; blocks of "
            f"{rows}x{columns} need {list(grid)}",
            "set quantization_config.weight_block_size in config.json to the blocks that the "
            "checkpoint has; if it has one scale for a whole matrix, use another checkpoint",
        )


def _name(stored: Stored) -> str:
    return str(stored.dtype).removeprefix("torch.")


def unpack_fp4(packed: Tensor) -> Tensor:
    """Packed FP4, bytes [R, C / 2], to float32 [R, C], without the scales."""
    low_high = packed.view(torch.uint8)
    indices = torch.stack((low_high & 15, low_high >> 4), dim=-1).flatten(-2).int()
    return torch.tensor(FP4_VALUES, device=packed.device)[indices]


def dequantise(target_RC: Tensor, stored: Tensor, scale: Tensor, block: tuple[int, int]) -> None:
    """Fill `target_RC`, of any float dtype and on any device, with stored value * scale in float32.

    `stored` is [R, C] in FP8 or [R, C / 2] in packed FP4; `scale` has one number per block. Works
    in chunks of whole rows of blocks, so that no float32 copy of the matrix is made.
    """
    total, columns = target_RC.shape
    rows = max(1, CHUNK // columns // block[0]) * block[0]
    scale = scale.to(torch.float32)
    for first in range(0, total, rows):
        part = stored[first : first + rows].to(target_RC.device)
        values = unpack_fp4(part)[:, :columns] if part.dtype in PACKED else part.to(torch.float32)
        grid = scale[first // block[0] : math.ceil((first + len(part)) / block[0])]
        grid = grid.to(target_RC.device)
        wide = grid.repeat_interleave(block[0], 0)[: len(part)]
        wide = wide.repeat_interleave(block[1], 1)[:, :columns]
        target_RC[first : first + rows] = values * wide
