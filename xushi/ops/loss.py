"""The output head with the log-probabilities of targets, in chunks of tokens: the logits of a whole
batch are never held in memory.

Axes: N tokens, D hidden, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xushi.ops import native
from xushi.ops.dispatch import use_reference

CHUNK = 512  # rows of logits held at a time


def token_log_probabilities_reference(x_ND: Tensor, head_VD: Tensor, targets_N: Tensor) -> Tensor:
    """log softmax(x head^T)[target], with the softmax in float32 or wider: [N]."""
    logits = F.linear(x_ND, head_VD.to(x_ND.dtype))
    return -F.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), targets_N, reduction="none"
    )


def token_log_probabilities(x_ND: Tensor, head_VD: Tensor, targets_N: Tensor) -> Tensor:
    """`token_log_probabilities_reference` in chunks. The backward pass recomputes the logits."""
    if use_reference() or x_ND.dtype == torch.float64:
        return token_log_probabilities_reference(x_ND, head_VD, targets_N)
    form = (
        native.NativeLogProbabilities
        if native.serves(x_ND, weights=(head_VD,))
        else _TokenLogProbabilities
    )
    result: Tensor = form.apply(x_ND, head_VD, targets_N)  # type: ignore[no-untyped-call]
    return result


def cross_entropy_reference(
    x_ND: Tensor, head_VD: Tensor, targets_N: Tensor, weights_N: Tensor
) -> Tensor:
    """-sum_n weight_n * log softmax(x_n head^T)[target_n], a scalar."""
    return -(token_log_probabilities_reference(x_ND, head_VD, targets_N) * weights_N).sum()


def cross_entropy(x_ND: Tensor, head_VD: Tensor, targets_N: Tensor, weights_N: Tensor) -> Tensor:
    """`cross_entropy_reference` in chunks. The forward pass computes both gradients, so no logits
    are recomputed.
    """
    if use_reference() or x_ND.dtype == torch.float64 or not torch.is_grad_enabled():
        return -(token_log_probabilities(x_ND, head_VD, targets_N) * weights_N).sum()
    form = (
        native.NativeCrossEntropy
        if native.serves(x_ND, weights=(head_VD, weights_N))
        else _CrossEntropy
    )
    result: Tensor = form.apply(x_ND, head_VD, targets_N, weights_N)  # type: ignore[no-untyped-call]
    return result


def _chunk_probabilities(x: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The targets' log-probabilities [n] and all probabilities [n, V], in float32.

    log p = logit - largest logit + log of the largest p, which needs one softmax instead of a
    log-softmax and its exp.
    """
    logits = F.linear(x, head).float()
    p = logits.softmax(-1)
    chosen = logits.gather(1, targets[:, None]).squeeze(1)
    return chosen - logits.amax(-1) + p.amax(-1).log(), p


class _TokenLogProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, head_VD: Tensor, targets_N: Tensor) -> Tensor:
        head = head_VD.to(x_ND.dtype)
        ctx.save_for_backward(x_ND, head, targets_N)
        ctx.head_dtype = head_VD.dtype
        return torch.cat(
            [
                _chunk_probabilities(x, head, targets)[0]
                for x, targets in zip(
                    torch.split(x_ND, CHUNK), torch.split(targets_N, CHUNK), strict=True
                )
            ]
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x_ND, head, targets_N = ctx.saved_tensors
        dx_ND = torch.empty_like(x_ND)
        d_head = torch.zeros(head.shape, dtype=torch.float32, device=head.device)
        for start in range(0, x_ND.shape[0], CHUNK):
            rows = slice(start, start + CHUNK)
            x = x_ND[rows]
            targets = targets_N[rows]
            gradient = gradients[0][rows]
            # d log p[target] / d logits = onehot(target) - p
            d_logits = _chunk_probabilities(x, head, targets)[1].mul_(-gradient[:, None])
            d_logits.scatter_add_(1, targets[:, None], gradient[:, None].to(d_logits.dtype))
            d_logits = d_logits.to(x.dtype)
            torch.mm(d_logits, head, out=dx_ND[rows])
            d_head += (d_logits.T @ x).float()
        return dx_ND, d_head.to(ctx.head_dtype), None


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, head_VD: Tensor, targets_N: Tensor, weights_N: Tensor
    ) -> Tensor:
        head = head_VD.to(x_ND.dtype)
        dx_ND = torch.empty_like(x_ND)
        d_head = torch.zeros(head.shape, dtype=torch.float32, device=head.device)
        loss = torch.zeros((), dtype=torch.float32, device=head.device)
        for start in range(0, x_ND.shape[0], CHUNK):
            rows = slice(start, start + CHUNK)
            x = x_ND[rows]
            targets = targets_N[rows]
            weights = weights_N[rows].float()
            chosen, d_logits = _chunk_probabilities(x, head, targets)
            loss -= (chosen * weights).sum()
            d_logits.mul_(weights[:, None])
            d_logits.scatter_add_(1, targets[:, None], -weights[:, None])
            d_logits = d_logits.to(x.dtype)
            torch.mm(d_logits, head, out=dx_ND[rows])
            d_head += (d_logits.T @ x).float()
        ctx.save_for_backward(dx_ND, d_head.to(head_VD.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dx_ND, d_head = ctx.saved_tensors
        return dx_ND * gradients[0].to(dx_ND.dtype), d_head * gradients[0], None, None
