"""A pipeline of stages: each process holds some of the layers, and a batch goes through them in
microbatches.

One forward, one backward (Narayanan et al. 2021, arXiv:2104.04473, section 2.2): a stage begins
with as many microbatches as there are stages behind it and then alternates, so that it keeps no
more than these. Every stage reads the batch itself; only the residual travels, and its gradient
back. Losses of a stage's own layers (balance, indexers) are differentiated in that stage.

Axes: B rows, T tokens, S streams, D hidden.
"""

from collections import deque
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from xushi.model import Batch, Deepseek, Hidden, LossParts
from xushi.train.layout import Layout

MICROBATCHES_PER_STAGE = 4  # with 4 of them a stage waits at most a fifth of the time

Loss = Callable[[Batch, Tensor | None], LossParts]


def microbatches(batch: Batch, layout: Layout) -> list[Batch]:
    """The batch in microbatches of whole rows, nearly equal."""
    return batch.split(min(batch.rows, MICROBATCHES_PER_STAGE * layout.pipeline))


def run_pipeline(
    model: Deepseek, batch: Batch, layout: Layout, loss: Loss, gradients_travel: bool = True
) -> LossParts:
    """Forward and backward of all microbatches through this process's stage.

    Gradients are left in the parameters. `loss` gives a microbatch's parts from its tensors and the
    residual of the stage before; returned are the sums of this stage's parts over the microbatches.
    Without `gradients_travel` the input of a stage is not differentiated.
    """
    parts_of = microbatches(batch, layout)
    sent = _Sent()
    ahead = min(len(parts_of), layout.pipeline - 1 - layout.stage)
    waiting: deque[tuple[Tensor | None, LossParts]] = deque()
    done: list[LossParts] = []
    for i in range(len(parts_of) + ahead):
        if i < len(parts_of):
            residual = _incoming(model, parts_of[i].tokens, layout)
            if residual is not None and gradients_travel:
                residual.requires_grad_()
            parts = loss(parts_of[i], residual)
            if parts.residual is not None:
                sent.send(parts.residual.detach(), layout, 1)
            waiting.append((residual, parts))
        if i >= ahead:
            residual, parts = waiting.popleft()
            _synchronise(model, len(done) + 1 == len(parts_of))
            _backward(parts, layout, gradients_travel)
            if residual is not None and gradients_travel:
                assert residual.grad is not None
                sent.send(residual.grad, layout, -1)
            done.append(parts)
    sent.finish()
    return _sum_of(done)


def run_stage(
    model: Deepseek, layout: Layout, tokens_BT: Tensor, positions_BT: Tensor, segments_BT: Tensor
) -> Hidden:
    """The trunk's forward through all stages, without gradients: this stage's output."""
    residual = _incoming(model, tokens_BT, layout)
    hidden = model.hidden(tokens_BT, positions_BT, segments_BT, residual=residual)
    if not model.ends:
        output = hidden.hidden_BTD.contiguous()
        dist.send(output, layout.neighbour(1), group=layout.stage_groups[1])
    return hidden


def _incoming(model: Deepseek, tokens_BT: Tensor, layout: Layout) -> Tensor | None:
    """The residual that the stage before sends for a microbatch; None in the first stage."""
    if model.begins:
        return None
    config = model.config
    streams = (config.hc_mult,) if config.is_v4 else ()
    shape = (*tokens_BT.shape, *streams, config.hidden_size)
    dtype = next(model.parameters()).dtype
    return _receive(tokens_BT.new_empty(shape, dtype=dtype), layout, -1)


def _backward(parts: LossParts, layout: Layout, gradients_travel: bool) -> None:
    """Differentiate a microbatch's own losses, and its output by the gradient from the next
    stage.
    """
    roots, gradients = [parts.total], [torch.ones_like(parts.total)]
    if parts.residual is not None and gradients_travel:
        roots.append(parts.residual)
        gradients.append(_receive(torch.empty_like(parts.residual), layout, 1))
    pairs = [
        (root, gradient)
        for root, gradient in zip(roots, gradients, strict=True)
        if root.requires_grad
    ]
    if pairs:  # a stage of dense layers has nothing to learn while indexers warm up
        torch.autograd.backward([root for root, _ in pairs], [gradient for _, gradient in pairs])


def _synchronise(model: Deepseek, last: bool) -> None:
    """Have FSDP2 add up gradients over processes only in the last backward pass."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)
        model.set_is_last_backward(last)


def _receive(empty: Tensor, layout: Layout, direction: int) -> Tensor:
    """Fill a tensor from the stage before (-1) or the next (1).

    The two directions have groups of their own, so that they do not wait for each other.
    """
    dist.recv(empty, layout.neighbour(direction), group=layout.stage_groups[-direction])
    return empty


class _Sent:
    """Tensors being sent: at most two in each direction, so that no more are kept in memory."""

    def __init__(self) -> None:
        self._queues: dict[int, deque[tuple[dist.Work | None, Tensor]]] = {
            -1: deque(),
            1: deque(),
        }

    def send(self, tensor: Tensor, layout: Layout, direction: int) -> None:
        """Send to the stage before (-1) or the next (1), without waiting."""
        tensor = tensor.contiguous()
        queue = self._queues[direction]
        if len(queue) == 2:
            _wait(queue.popleft())
        queue.append(
            (
                dist.isend(
                    tensor, layout.neighbour(direction), group=layout.stage_groups[direction]
                ),
                tensor,
            )
        )

    def finish(self) -> None:
        """Wait until all have arrived."""
        for queue in self._queues.values():
            while queue:
                _wait(queue.popleft())


def _wait(sent: tuple[dist.Work | None, Tensor]) -> None:
    if sent[0] is not None:
        sent[0].wait()


def _sum_of(parts: list[LossParts]) -> LossParts:
    def added(values: list[Tensor]) -> Tensor:
        return torch.stack(values).sum(0)

    loads = {name: added([part.loads[name] for part in parts]) for name in parts[0].loads}
    sums = {
        name: added([getattr(part, name).detach() for part in parts])
        for name in ("total", "next_token", "mtp", "balance", "indexer")
    }
    return LossParts(**sums, loads=loads)
