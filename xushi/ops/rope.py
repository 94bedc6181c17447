"""Rotary position embedding (Su et al. 2021), with YaRN's frequencies for longer contexts (Peng et
al. 2023, arXiv:2309.00071).

Axes: R rotated width (even); the last axis of cos and sin is R/2, one angle per pair of values.
"""

import math

import torch
from torch import Tensor


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature, 0.1 * mscale * ln(factor) + 1 (eq. 22 of the paper, with
    DeepSeek's multiplier `mscale`). 1 for factors up to 1.
    """
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def rope_frequencies(width: int, theta: float) -> Tensor:
    """The frequency theta^(-2i/R) of each pair i, in radians per position: [R/2] float32, on the
    CPU.

    On the meta device, where models are built before their files are read, `arange` would import
    torch's compiler, for more than a second.
    """
    pairs = torch.arange(0, width, 2, dtype=torch.float32, device="cpu")
    return 1.0 / theta ** (pairs / width)


def yarn_frequencies(
    width: int,
    theta: float,
    factor: float,
    original_length: int,
    beta_fast: float,
    beta_slow: float,
) -> Tensor:
    """YaRN's frequencies [R/2] in float32, radians per position.

    A pair that turns more than `beta_fast` times within `original_length` positions keeps its
    frequency. One that turns fewer than `beta_slow` times gets its frequency divided by `factor`.
    Between them the share of each changes linearly with the pair's index. Matches transformers'
    `_compute_yarn_parameters` with truncated bounds.
    """

    def pair_that_turns(turns: float) -> float:
        return width * math.log(original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(beta_slow)), width - 1)
    span = (high - low) or 0.001
    pairs = torch.arange(width // 2, dtype=torch.float32, device="cpu")
    ramp = ((pairs - low) / span).clamp(0, 1)
    frequencies = rope_frequencies(width, theta)
    return frequencies / factor * ramp + frequencies * (1 - ramp)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the pairs of x's last axis [..., R] by the given angles; cos and sin [..., R/2]
    broadcast over x's leading axes.

    Pairs are (x0, x1), (x2, x3), ... if `interleaved`, else (x_i, x_{i + R/2}). The result is
    always laid out in halves: first values of all pairs, then second values. Matches transformers'
    DeepSeek-V3.
    """
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rotate_tail(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the last R values of x's last axis in pairs (x0, x1), (x2, x3), ...; every value keeps
    its place.

    cos and sin [..., R/2] broadcast over x's leading axes. Computed in float32 or wider, returned
    in x's dtype. Called with -sin it rotates back. Matches transformers' DeepSeek-V4.
    """
    rest, tail = torch.split(x, [x.shape[-1] - 2 * cos.shape[-1], 2 * cos.shape[-1]], dim=-1)
    wide = tail.to(torch.promote_types(x.dtype, torch.float32))
    first, second = wide[..., 0::2], wide[..., 1::2]
    rotated = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(
        -2
    )
    return torch.cat((rest, rotated.to(x.dtype)), dim=-1)
