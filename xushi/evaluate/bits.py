"""Bits per byte: what the model would need to write the held-out text down, per byte of it.

Every target token of the stream is predicted once, in windows that do not overlap, document ends
included; the bytes are those of the raw text, without any separators.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from xushi.model import Batch, Deepseek, Hidden, next_token_loss


@torch.no_grad()
def total_bits(
    model: Deepseek,
    batches: Iterable[Batch],
    run: Callable[[Tensor, Tensor, Tensor], Hidden] | None = None,
) -> float:
    """-log2 p of all target tokens of `batches`, summed in float64.

    `run` stands for the model's own `hidden` where that is spread over a pipeline, whose last stage
    has the sum.
    """
    nats = 0.0
    for whole in batches:
        batch = whole.to(model.device)
        hidden = (run or model.hidden)(batch.tokens, batch.positions, batch.segments).hidden_BTD
        if not model.ends:
            continue
        nats += float(
            next_token_loss(model, hidden, batch.targets, batch.loss_mask.to(torch.float32))
        )
    return nats / math.log(2)
