"""Root-mean-square normalisation (Zhang and Sennrich 2019)."""

import torch
from torch import Tensor

from xushi.ops import native


def rms_norm_reference(
    x: Tensor, weight: Tensor | None, eps: float, wide_weight: bool = False
) -> Tensor:
    """x / rms(x) * weight over the last axis, in at least float32, returned in x's dtype; no weight
    is a weight of 1.

    Matches transformers' `DeepseekV3RMSNorm`, where the normalised value is cast to x's dtype
    before the weight multiplies; with `wide_weight`, `DeepseekV4RMSNorm`, where it is cast after.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is None:
        return normalised.to(x.dtype)
    return (
        (weight * normalised).to(x.dtype)
        if wide_weight
        else weight.to(x.dtype) * normalised.to(x.dtype)
    )


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, wide_weight: bool = False) -> Tensor:
    """The same, compiled where it can be."""
    if weight is not None and native.serves(x, weights=(weight,)):
        result: Tensor = native.NativeNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
        return result
    return rms_norm_reference(x, weight, eps, wide_weight)
