"""Root-mean-square normalisation (Zhang and Sennrich 2019)."""

import torch
from torch import Tensor

from xushi.ops import native


def rms_norm_reference(
    x: Tensor, weight: Tensor | None, eps: float, wide_weight: bool = False
) -> Tensor:
    """x / rms(x) * weight over the last axis, in x's dtype. Without a weight, x / rms(x).

    Normalises in float32 or wider. Matches transformers' `DeepseekV3RMSNorm`, which casts the
    normalised value to x's dtype before it multiplies by the weight. With `wide_weight` it matches
    `DeepseekV4RMSNorm`, which casts after.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is None:
        return normalised.to(x.dtype)
    if wide_weight:
        return (weight * normalised).to(x.dtype)
    return weight.to(x.dtype) * normalised.to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, wide_weight: bool = False) -> Tensor:
    """`rms_norm_reference`, compiled if possible."""
    if weight is not None and native.serves(x, weights=(weight,)):
        result: Tensor = native.NativeNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
        return result
    return rms_norm_reference(x, weight, eps, wide_weight)
