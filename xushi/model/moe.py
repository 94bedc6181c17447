"""Fine-grained mixture of experts with shared experts (DeepSeekMoE, arXiv:2401.06066; V3, arXiv:2412.19437).

Axes: B batch, T tokens, D hidden, N flat tokens, E experts, k experts per token.
"""

import torch
from torch import Tensor, nn

from xushi.model.config import ModelConfig
from xushi.model.layers import MLP
from xushi.ops import RouterChoice, routed_experts, sigmoid_router, softmax_router


class Router(nn.Module):
    """Chooses experts, by V3's rule or V2's.

    V3's `e_score_correction_bias` [E] is a float32 buffer that training moves, never the gradient; V2 has none.
    """

    e_score_correction_bias: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias",
                             torch.zeros(config.n_routed_experts) if config.has_router_bias else None)

    def forward(self, x_ND: Tensor, pinned_Nk: Tensor | None = None) -> RouterChoice:
        """Scores, choice and gate values; `pinned_Nk` replaces the choice."""
        config = self.config
        if self.e_score_correction_bias is None:
            groups = config.n_group if config.topk_method == "group_limited_greedy" else 1
            return softmax_router(x_ND, self.weight, top_k=config.num_experts_per_tok, groups=groups,
                                  top_groups=config.topk_group, scale=config.routed_scaling_factor, pinned_Nk=pinned_Nk)
        return sigmoid_router(x_ND, self.weight, self.e_score_correction_bias, top_k=config.num_experts_per_tok,
                              groups=config.n_group, top_groups=config.topk_group, normalise=config.norm_topk_prob,
                              scale=config.routed_scaling_factor, pinned_Nk=pinned_Nk)


class Experts(nn.Module):
    """The routed experts' weights, stacked: gate and up rows [E, 2F, D], down [E, D, F]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, width, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))


class MixtureOfExperts(nn.Module):
    """Routed experts plus the shared ones, which are one SwiGLU of their summed width."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = (MLP(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)
                               if config.n_shared_experts else None)

    def forward(self, x: Tensor, pinned_Nk: Tensor | None = None) -> tuple[Tensor, RouterChoice]:
        """[..., D] to [..., D], with what the router decided for the flattened tokens."""
        x_ND = x.flatten(0, -2)
        choice = self.gate(x_ND, pinned_Nk)
        out_ND = routed_experts(x_ND, choice.indices_Nk, choice.weights_Nk, self.experts.gate_up_proj,
                                self.experts.down_proj)
        if self.shared_experts is not None:
            out_ND = out_ND + self.shared_experts(x_ND)
        return out_ND.view_as(x), choice
