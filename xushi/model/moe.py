"""Fine-grained mixture of experts with shared experts (DeepSeekMoE, arXiv:2401.06066; V3,
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
    """Chooses experts, by V2's rule, V3's or V4's.

    V3's and V4's `e_score_correction_bias` [E] is a float32 buffer that training moves, never the
    gradient; V2 has none. In V4's first layers the choice is fixed by the token's id: `tid2eid` [V,
    k], int64, is part of the weights.
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
        """Scores, choice and gate values; `pinned_Nk` replaces the choice but in rows of -1,
        `tokens_N` are for hashed layers.
        """
        config = self.config
        if self.tid2eid is not None:
            assert tokens_N is not None
            by_id_Nk = self.tid2eid.index_select(0, tokens_N)
            pinned_Nk = (
                by_id_Nk if pinned_Nk is None else torch.where(pinned_Nk < 0, by_id_Nk, pinned_Nk)
            )
        if config.is_v4:
            return sqrt_softplus_router(
                x_ND,
                self.weight,
                self.e_score_correction_bias,
                top_k=config.num_experts_per_tok,
                scale=config.routed_scaling_factor,
                pinned_Nk=pinned_Nk,
            )
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
        """Give every token id k distinct experts, such that all experts serve as many ids, within
        one.
        """
        if self.tid2eid is None:
            return
        vocabulary, top_k = self.tid2eid.shape
        experts = self.config.n_routed_experts
        # Rows of k neighbours on a ring of shuffled experts: distinct within a row and even over
        # rows.
        ring = torch.randperm(experts, generator=stream)
        places = torch.randperm(vocabulary, generator=stream)[:, None] * top_k + torch.arange(top_k)
        self.tid2eid.copy_(ring[places % experts])


# Rows [P, D] with the expert of each [P, 1] and its gate value [P, 1], to rows [P, D].
RunExperts = Callable[[Tensor, Tensor, Tensor], Tensor]


class Experts(nn.Module):
    """The routed experts' weights, stacked: gate and up rows [E, 2F, D], down [E, D, F].

    `dispatch` is how expert parallelism gets in: with it, the weights here are some experts' alone,
    and it brings each row to where its expert is and back. It is given x, indices, gate values, and
    how to run the experts that are here.
    """

    def __init__(self, config: ModelConfig, limit: float | None) -> None:
        super().__init__()
        self.limit = limit
        self.dispatch: Callable[[Tensor, Tensor, Tensor, RunExperts], Tensor] | None = None
        experts, width, hidden = (
            config.n_routed_experts,
            config.moe_intermediate_size,
            config.hidden_size,
        )
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, x_ND: Tensor, indices_Nk: Tensor, weights_Nk: Tensor) -> Tensor:
        """The sum over each token's chosen experts: [N, D]."""
        if self.dispatch is not None:
            return self.dispatch(x_ND, indices_Nk, weights_Nk, self.run)
        return self.run(x_ND, indices_Nk, weights_Nk)

    def run(self, x_ND: Tensor, indices_Nk: Tensor, weights_Nk: Tensor) -> Tensor:
        """The same by the experts that are here, numbered from 0."""
        return routed_experts(
            x_ND, indices_Nk, weights_Nk, self.gate_up_proj, self.down_proj, self.limit
        )


class MixtureOfExperts(nn.Module):
    """Routed experts plus the shared ones, which are one SwiGLU of their summed width."""

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
        """[..., D] to [..., D], with what the router decided for the flattened tokens, whose ids
        are `tokens` [...].
        """
        x_ND = x.flatten(0, -2)
        choice = self.gate(x_ND, None if tokens is None else tokens.flatten(), pinned_Nk)
        out_ND: Tensor = self.experts(x_ND, choice.indices_Nk, choice.weights_Nk)
        if self.shared_experts is not None:
            out_ND = out_ND + self.shared_experts(x_ND)
        return out_ND.view_as(x), choice
