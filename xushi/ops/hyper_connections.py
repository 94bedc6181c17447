"""Manifold-constrained hyper-connections (mHC): how a block reads from and writes to several
residual streams.

Source: arXiv:2512.24880; transformers' `DeepseekV4HyperConnection`. The weights of streams are
computed in float32 or wider.

Axes: ... any leading axes, S streams, D hidden.
"""

import torch
from torch import Tensor


def sinkhorn(logits_SS: Tensor, iterations: int, eps: float) -> Tensor:
    """A nearly doubly stochastic matrix [..., S, S] from logits [..., S, S]: a softmax over the
    last axis, then columns and rows normalised in turn.

    The first iteration normalises only the columns, since the softmax has normalised the rows.
    Dividing separately for rows and for columns rounds exactly as transformers does.
    """
    mix = logits_SS.softmax(-1) + eps
    mix = mix / (mix.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        mix = mix / (mix.sum(-1, keepdim=True) + eps)
        mix = mix / (mix.sum(-2, keepdim=True) + eps)
    return mix


def stream_weights(
    projected: Tensor, scale_3: Tensor, base: Tensor, streams: int, iterations: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The weights with which a block reads from each stream [..., S] and writes to each stream
    [..., S], and the matrix that mixes the streams [..., S, S].

    `projected` [..., 2S + S*S] and `base` [2S + S*S] hold the logits of read, write and mix one
    after another; each part has its own scale. read = sigmoid + eps, write = 2 sigmoid, mix =
    `sinkhorn`.
    """
    parts = [streams, streams, streams**2]
    read, write, mix = torch.split(projected, parts, dim=-1)
    read_base, write_base, mix_base = torch.split(base, parts)
    mixed = (mix * scale_3[2] + mix_base).view(*mix.shape[:-1], streams, streams)
    return (
        (read * scale_3[0] + read_base).sigmoid() + eps,
        2 * (write * scale_3[1] + write_base).sigmoid(),
        sinkhorn(mixed, iterations, eps),
    )


def collapse_streams(streams_SD: Tensor, read_S: Tensor) -> Tensor:
    """A block's input, the sum of read * stream: [..., S, D] to [..., D] in the streams' dtype."""
    return (read_S[..., None] * streams_SD).sum(-2).to(streams_SD.dtype)


def expand_streams(streams_SD: Tensor, y_D: Tensor, write_S: Tensor, mix_SS: Tensor) -> Tensor:
    """The streams after a block [..., S, D]: mix^T streams + the outer product of write and the
    block's output y.

    New stream k is the sum over j of mix[j, k] * stream j. The matrix is doubly stochastic but not
    symmetric, so the transpose matters.
    """
    dtype = streams_SD.dtype
    return write_S.to(dtype)[..., None] * y_D[..., None, :] + mix_SS.to(dtype).mT @ streams_SD
