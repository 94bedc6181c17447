"""Expert parallelism: each process of a group holds some of the experts; each token's rows are sent
to the processes of its experts and come back.

Axes: N tokens, k experts per token, D hidden, P rows sent or received.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from xushi.model.moe import RunExperts


class _AllToAll(torch.autograd.Function):
    """Sends rows to other processes; their gradients are sent back in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, rows_PD: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return exchange_rows(rows_PD, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return exchange_rows(gradients[0], ctx.received, ctx.sent, ctx.group), None, None, None


def exchange_rows(
    rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> Tensor:
    """Send the first `sent[0]` rows to rank 0 of the group, the next `sent[1]` to rank 1, and so
    on.

    Returns the rows received, in the order of ranks.
    """
    result = rows.new_empty((sum(received), *rows.shape[1:]))
    dist.all_to_all_single(result, rows.contiguous(), received, sent, group=group)
    return result


class ExpertDispatch:
    """The `dispatch` of an `Experts` module that holds `experts_here` of all experts."""

    def __init__(self, group: dist.ProcessGroup, experts_here: int) -> None:
        self.group, self.experts_here = group, experts_here

    def __call__(
        self, x_ND: Tensor, indices_Nk: Tensor, weights_Nk: Tensor, run: RunExperts
    ) -> Tensor:
        """[N, D] to [N, D]: each token's rows go to its experts' processes, come back, and are
        weighted and added.
        """
        group = self.group
        per_token = indices_Nk.shape[1]
        expert_P = indices_Nk.flatten()
        # Each process holds consecutive experts, so sorting puts the rows for one process together.
        order = expert_P.argsort(stable=True)
        expert_P = expert_P.index_select(0, order)
        counts = torch.bincount(expert_P // self.experts_here, minlength=group.size())
        incoming = torch.empty_like(counts)
        dist.all_to_all_single(incoming, counts, group=group)
        sent, received = counts.tolist(), incoming.tolist()
        rows_PD: Tensor = _AllToAll.apply(  # type: ignore[no-untyped-call]
            x_ND.index_select(0, order // per_token), sent, received, group
        )
        here_P1 = exchange_rows(expert_P % self.experts_here, sent, received, group)[:, None]
        y_PD = run(rows_PD, here_P1, weights_Nk.new_ones(here_P1.shape))
        back_PD: Tensor = _AllToAll.apply(y_PD, received, sent, group)  # type: ignore[no-untyped-call]
        weight_P1 = weights_Nk.flatten().index_select(0, order)[:, None].to(back_PD.dtype)
        return torch.zeros_like(x_ND).index_add(0, order // per_token, back_PD * weight_P1)
