"""Expert parallelism: each process of a group holds some of the experts, and rows travel to theirs
and back.

Axes: N tokens, k experts per token, D hidden, P rows sent or received.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from xushi.model.moe import RunExperts


class _AllToAll(torch.autograd.Function):
    """Rows to other processes, so many to each; their gradients come back the same way."""

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
    """Send the first `sent[0]` rows to process 0 of the group and so on; what came in, in the order
    of processes.
    """
    result = rows.new_empty((sum(received), *rows.shape[1:]))
    dist.all_to_all_single(result, rows.contiguous(), received, sent, group=group)
    return result


class ExpertDispatch:
    """The `dispatch` of `Experts` whose weights are experts_here of all; see there."""

    def __init__(self, group: dist.ProcessGroup, experts_here: int) -> None:
        self.group, self.experts_here = group, experts_here

    def __call__(
        self, x_ND: Tensor, indices_Nk: Tensor, weights_Nk: Tensor, run: RunExperts
    ) -> Tensor:
        """[N, D] to [N, D]: each token's rows go where its experts are, and come back to be
        weighted and added.
        """
        group, per_token = self.group, indices_Nk.shape[1]
        expert_P = indices_Nk.flatten()
        order = expert_P.argsort(
            stable=True
        )  # processes hold neighbouring experts: theirs are together
        expert_P = expert_P.index_select(0, order)
        counts = torch.bincount(expert_P // self.experts_here, minlength=group.size())
        there = torch.empty_like(counts)
        dist.all_to_all_single(there, counts, group=group)
        sent, received = counts.tolist(), there.tolist()
        rows_PD: Tensor = _AllToAll.apply(  # type: ignore[no-untyped-call]
            x_ND.index_select(0, order // per_token), sent, received, group
        )
        here_P1 = exchange_rows(expert_P % self.experts_here, sent, received, group)[:, None]
        y_PD = run(rows_PD, here_P1, weights_Nk.new_ones(here_P1.shape))
        back_PD: Tensor = _AllToAll.apply(y_PD, received, sent, group)  # type: ignore[no-untyped-call]
        weight_P1 = weights_Nk.flatten().index_select(0, order)[:, None].to(back_PD.dtype)
        return torch.zeros_like(x_ND).index_add(0, order // per_token, back_PD * weight_P1)
