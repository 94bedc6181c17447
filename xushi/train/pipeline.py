"""A pipeline of stages: each process holds some of the layers, and a batch goes through them in
pieces.

One forward, one backward (Narayanan et al. 2021, arXiv:2104.04473, section 2.2): a stage begins
with as many pieces as there are stages behind it and then alternates, so that it keeps no more of
them than that. Every stage reads the batch itself; only the residual travels, and its gradient
back. Losses of a stage's own layers (balance, indexers) are differentiated where they are.

Axes: B rows, T tokens, S streams, D hidden.
"""

from collections import deque
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from xushi.model import Batch, Deepseek, Hidden, LossParts
from xushi.train.layout import Layout

PIECES_PER_STAGE = 4  # with 4 of them a stage waits at most a fifth of the time

Loss = Callable[[Batch, Tensor | None], LossParts]


def cut(batch: Batch, layout: Layout) -> list[Batch]:
    """The batch in pieces of whole rows, nearly equal."""
    return batch.split(min(batch.rows, PIECES_PER_STAGE * layout.pipeline))


def run_pipeline(
    model: Deepseek,
    batch: Batch,
    layout: Layout,
    loss: Loss,
    gradients_travel: bool = True,
) -> LossParts:
    """Forward and backward of all pieces through this process's stage; gradients are left in the
    parameters.

    `loss` gives a piece's parts from its tensors and the residual of the stage before. Returned are
    their sums over the pieces, of this stage. Without `gradients_travel` what a stage takes in is
    not differentiated.
    """
    pieces, sent = cut(batch, layout), _Sent()
    ahead = min(len(pieces), layout.pipeline - 1 - layout.stage)
    waiting: deque[tuple[Tensor | None, LossParts]] = deque()
    done: list[LossParts] = []
    for i in range(len(pieces) + ahead):
        if i < len(pieces):
            residual = _incoming(model, pieces[i].tokens, layout)
            if residual is not None and gradients_travel:
                residual.requires_grad_()
            parts = loss(pieces[i], residual)
            if parts.residual is not None:
                sent.send(parts.residual.detach(), layout, 1)
            waiting.append((residual, parts))
        if i >= ahead:
            residual, parts = waiting.popleft()
            _synchronise(model, len(done) + 1 == len(pieces))
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
    """The trunk's forward through all stages, without gradients: what this stage gives."""
    residual = _incoming(model, tokens_BT, layout)
    hidden = model.hidden(tokens_BT, positions_BT, segments_BT, residual=residual)
    if not model.ends:
        dist.send(hidden.hidden_BTD.contiguous(), layout.neighbour(1), group=layout.ways[1])
    return hidden


def _incoming(model: Deepseek, tokens_BT: Tensor, layout: Layout) -> Tensor | None:
    """What the stage before gives for a piece; None for the first."""
    if model.begins:
        return None
    config = model.config
    streams = (config.hc_mult,) if config.is_v4 else ()
    return _receive(
        tokens_BT.new_empty(
            (*tokens_BT.shape, *streams, config.hidden_size), dtype=next(model.parameters()).dtype
        ),
        layout,
        -1,
    )


def _backward(parts: LossParts, layout: Layout, gradients_travel: bool) -> None:
    """Differentiate a piece's own losses, and what was passed on by its gradient from the next
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
    """Have FSDP2 add up gradients over processes in the last backward pass only."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)
        model.set_is_last_backward(last)


def _receive(empty: Tensor, layout: Layout, direction: int) -> Tensor:
    """Fill a tensor from the stage before (-1) or the next (1); what flows one way has a group of
    its own.
    """
    dist.recv(empty, layout.neighbour(direction), group=layout.ways[-direction])
    return empty


class _Sent:
    """What is on its way: two tensors each way at most, so that no more is kept."""

    def __init__(self) -> None:
        self._on_the_way: dict[int, deque[tuple[dist.Work | None, Tensor]]] = {
            -1: deque(),
            1: deque(),
        }

    def send(self, tensor: Tensor, layout: Layout, direction: int) -> None:
        """To the stage before (-1) or the next (1)."""
        tensor, queue = tensor.contiguous(), self._on_the_way[direction]
        if len(queue) == 2:
            _wait(queue.popleft())
        queue.append(
            (dist.isend(tensor, layout.neighbour(direction), group=layout.ways[direction]), tensor)
        )

    def finish(self) -> None:
        """Until all has arrived."""
        for queue in self._on_the_way.values():
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
