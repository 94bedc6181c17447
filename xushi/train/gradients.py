"""Clips the gradient's norm, and measures it for each part of the model."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from xushi.train.layout import Layout, local

# Which part of the model a parameter belongs to: the first key that is in its name.
PARTS = {
    "embed_tokens": "embedding",
    "lm_head": "head",
    ".indexer.": "indexer",
    ".self_attn.": "attention",
    ".experts.": "experts",
    ".shared_experts.": "shared_experts",
    ".mlp.gate.": "router",
    ".mlp.": "dense",
}


def part_of(name: str) -> str:
    """Which part of the model a parameter belongs to, "other" if none is known."""
    return next((part for key, part in PARTS.items() if key in name), "other")


class Norms(NamedTuple):
    """The norm of the whole gradient, and of each part of the model."""

    whole: float
    parts: dict[str, float]


def clip_gradients(
    parameters: Iterable[tuple[str, nn.Parameter]], limit: float, layout: Layout | None = None
) -> Norms:
    """Scale all gradients so that their joint norm is at most `limit`; returns the norms before."""
    layout = layout or Layout()
    layout.add_shared_gradients()
    found = [(name, p) for name, p in parameters if p.grad is not None]
    gradients: list[Tensor] = [local(p.grad) for _, p in found]  # type: ignore[arg-type]
    names = [*dict.fromkeys(PARTS.values()), "other"]
    squares = torch.zeros(len(names), dtype=torch.float64)
    # A pipeline stage without indexers has no gradient at all while only indexers are trained.
    norms = torch.stack(torch._foreach_norm(gradients)).double().cpu() if gradients else squares[:0]
    for (name, p), norm in zip(found, norms, strict=True):
        # The embedding that the first and the last stage share counts once.
        if p is not layout.shared_embedding or layout.stage == 0:
            squares[names.index(part_of(name))] += norm.square()
    squares = layout.grand_total(squares.to(layout.device)).cpu()
    whole = float(squares.sum().sqrt())
    scale = limit / (whole + 1e-6)
    if gradients and not scale >= 1.0:  # a product with 1 would cost time; NaN must go through
        torch._foreach_mul_(gradients, scale)
    return Norms(
        whole,
        {name: float(square.sqrt()) for name, square in zip(names, squares, strict=True) if square},
    )
