"""Root-mean-square normalisation (Zhang and Sennrich 2019)."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last axis, in at least float32, returned in x's dtype.

    Matches transformers' `DeepseekV3RMSNorm`: the normalised value is cast to x's dtype before the weight multiplies.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight.to(x.dtype) * normalised.to(x.dtype)
