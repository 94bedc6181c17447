"""The mixture of fine-grained routed experts and shared experts (DeepSeekMoE, arXiv:2401.06066; V3,
arXiv:2412.19437).

Axes: B batch, T tokens, D hidden, N flat tokens, E experts, k experts per token, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from xushi.model.config import ModelConfig
from xushi.model.layers import MLP
from xushi.ops import (
    RouterChoice,
    routed_experts,
    sigmoid_router,
    softmax_router,
    sqrt_softplus_router,
)


class Router(nn.Module):
    """Chooses each token's experts by the rule of V2, V3 or V4.

    V3's and V4's `e_score_correction_bias` [E] is a float32 buffer. Training updates it without a
    gradient; V2 has none. In V4's first layers (`hashed`) the token's id decides: `tid2eid` [V, k],
    int64, holds the experts of each id and is part of the weights.
    """

    e_score_correction_bias: Tensor | None
    tid2eid: Tensor | None

    def __init__(self, config: ModelConfig, hashed: bool) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        bias = (
            torch.zeros(config.n_routed_experts) if config.has_router_bias and not hashed else None
        )
        table = (
            torch.zeros(config.vocab_size, config.num_experts_per_tok, dtype=torch.int64)
            if hashed
            else None
        )
        self.register_buffer("e_score_correction_bias", bias)
        self.register_buffer("tid2eid", table)

    def forward(
        self, x_ND: Tensor, tokens_N: Tensor | None, pinned_Nk: Tensor | None = None
    ) -> RouterChoice:
        """Scores, choice and gate values of N tokens. Hashed layers need the token ids `tokens_N`.

        `pinned_Nk` replaces the choice, except in rows of -1.
        """
        if self.tid2eid is not None:
            assert tokens_N is not None
            by_id_Nk = self.tid2eid.index_select(0, tokens_N)
            pinned_Nk = (
                by_id_Nk if pinned_Nk is None else torch.where(pinned_Nk < 0, by_id_Nk, pinned_Nk)
            )
        if self.config.is_v4:
            return sqrt_softplus_router(
                x_ND,
                self.weight,
                self.e_score_correction_bias,
                top_k=self.config.num_experts_per_tok,
                scale=self.config.routed_scaling_factor,
                pinned_Nk=pinned_Nk,
            )
        return self._grouped(x_ND, pinned_Nk)

    def _grouped(self, x_ND: Tensor, pinned_Nk: Tensor | None) -> RouterChoice:
        """V3's rule, or V2's, which has no bias; both choose from the best groups of experts."""
        config = self.config
        if self.e_score_correction_bias is None:
            groups = config.n_group if config.topk_method == "group_limited_greedy" else 1
            return softmax_router(
                x_ND,
                self.weight,
                top_k=config.num_experts_per_tok,
                groups=groups,
                top_groups=config.topk_group,
                scale=config.routed_scaling_factor,
                pinned_Nk=pinned_Nk,
            )
        return sigmoid_router(
            x_ND,
            self.weight,
            self.e_score_correction_bias,
            top_k=config.num_experts_per_tok,
            groups=config.n_group,
            top_groups=config.topk_group,
            normalise=config.norm_topk_prob,
            scale=config.routed_scaling_factor,
            pinned_Nk=pinned_Nk,
        )

    @torch.no_grad()
    def initialise_table(self, stream: torch.Generator) -> None:
        """Fill `tid2eid` with k distinct experts for every token id. The experts' numbers of ids
        differ by at most one.
        """
        if self.tid2eid is None:
            return
        vocabulary, top_k = self.tid2eid.shape
        experts = self.config.n_routed_experts
        # Each id gets k neighbours on a ring of shuffled experts: distinct within an id, and evenly
        # used over all ids.
        ring = torch.randperm(experts, generator=stream)
        places = torch.randperm(vocabulary, generator=stream)[:, None] * top_k + torch.arange(top_k)
        self.tid2eid.copy_(ring[places % experts])


# From rows [P, D], the expert of each [P, 1] and its gate value [P, 1], to rows [P, D].
RunExperts = Callable[[Tensor, Tensor, Tensor], Tensor]


class Experts(nn.Module):
    """The routed experts' weights, stacked: gate and up rows [E, 2F, D], down [E, D, F].

    `dispatch` is the hook for expert parallelism. When it is set, this module holds only this
    process's experts, and `dispatch(x, indices, gate values, run)` sends each token to its expert's
    process and back; `run` computes the experts held here.
    """

    def __init__(self, config: ModelConfig, limit: float | None) -> None:
        super().__init__()
        self.limit = limit
        self.dispatch: Callable[[Tensor, Tensor, Tensor, RunExperts], Tensor] | None = None
        experts = config.n_routed_experts
        width = config.moe_intermediate_size
        hidden = config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, x_ND: Tensor, indices_Nk: Tensor, weights_Nk: Tensor) -> Tensor:
        """The sum over each token's chosen experts: [N, D]."""
        if self.dispatch is not None:
            return self.dispatch(x_ND, indices_Nk, weights_Nk, self.run)
        return self.run(x_ND, indices_Nk, weights_Nk)

    def run(self, x_ND: Tensor, indices_Nk: Tensor, weights_Nk: Tensor) -> Tensor:
        """The same for the experts that this module holds, numbered from 0."""
        return routed_experts(
            x_ND, indices_Nk, weights_Nk, self.gate_up_proj, self.down_proj, self.limit
        )


class MixtureOfExperts(nn.Module):
    """Routed experts plus shared experts; the shared ones are one SwiGLU of their total width."""

    def __init__(self, config: ModelConfig, hashed: bool) -> None:
        super().__init__()
        limit = config.swiglu_limit if config.is_v4 else None
        self.gate = Router(config, hashed)
        self.experts = Experts(config, limit)
        shared = config.moe_intermediate_size * config.n_shared_experts
        self.shared_experts = MLP(config.hidden_size, shared, limit) if shared else None

    def forward(
        self, x: Tensor, tokens: Tensor | None, pinned_Nk: Tensor | None = None
    ) -> tuple[Tensor, RouterChoice]:
        """[..., D] to [..., D], and the router's choice for the flattened tokens. `tokens` [...]
        are their ids; `pinned_Nk` as in `Router`.
        """
        x_ND = x.flatten(0, -2)
        choice = self.gate(x_ND, None if tokens is None else tokens.flatten(), pinned_Nk)
        out_ND: Tensor = self.experts(x_ND, choice.indices_Nk, choice.weights_Nk)
        if self.shared_experts is not None:
            out_ND = out_ND + self.shared_experts(x_ND)
        return out_ND.view_as(x), choice
