"""The lightning indexer, which chooses the keys that a query attends to (DeepSeek-V3.2,
arXiv:2512.02556, section 2.1): tokens in V3.2, compressed entries in V4's sparse layers.

Matches transformers' `DeepseekV32Indexer` and `DeepseekV4Indexer`. DeepSeek's own code also
multiplies queries and keys by a Hadamard matrix, which changes no score, and rounds them to FP8 for
speed. Both are left out.

Axes: D hidden, C query latent, J index heads, I index width, R rotated width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xushi.model.compressor import Compressor
from xushi.model.config import ModelConfig
from xushi.model.layers import Linear
from xushi.ops import apply_rope, rotate_tail

KEY_NORM_EPS = 1e-6


class LayerNorm(nn.Module):
    """Layer norm over the last axis, in float32 or wider; weight and bias [width]."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to the same, in x's dtype."""
        wide = torch.promote_types(x.dtype, torch.float32)
        normed = F.layer_norm(
            x.to(wide), self.weight.shape, self.weight.to(wide), self.bias.to(wide), self.eps
        )
        return normed.to(x.dtype)


class LightningIndexer(nn.Module):
    """V3.2's indexer: narrow queries with many heads, one narrow key per token, and a weight per
    head. `ops.index_scores` computes the scores.

    Queries come from the attention's normed query latent. The rotated part comes first and is
    rotated in halves; in the attention it comes last and is rotated in pairs.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.index_n_heads
        self.width = config.index_head_dim
        self.rotated = config.qk_rope_head_dim
        assert config.q_lora_rank is not None
        self.wq_b = Linear(config.q_lora_rank, self.heads * self.width)
        self.wk = Linear(config.hidden_size, self.width)
        self.k_norm = LayerNorm(self.width, KEY_NORM_EPS)
        self.weights_proj = Linear(config.hidden_size, self.heads)

    def queries(
        self, x: Tensor, q_latent: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x [..., D] and q_latent [..., C] to queries [..., J, I] and the heads' weights [..., J],
        float32 at least.
        """
        q = self._rotate(
            self.wq_b(q_latent).unflatten(-1, (self.heads, self.width)),
            cos[..., None, :],
            sin[..., None, :],
        )
        return q, _head_weights(self.weights_proj, x, self.heads)

    def keys(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [..., D] to keys [..., I], which the cache stores with the latent."""
        return self._rotate(self.k_norm(self.wk(x)), cos, sin)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rotated, rest = torch.split(x, [self.rotated, self.width - self.rotated], dim=-1)
        return torch.cat((apply_rope(rotated, cos, sin, interleaved=False), rest), dim=-1)


class Scorer(nn.Module):
    """Holds the projection to V4's head weights under its published name."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weights_proj = Linear(config.hidden_size, config.index_n_heads)


class CompressedIndexer(Compressor):
    """V4's indexer. Its keys are the entries of its own compressor over the same windows. Queries
    and keys are rotated in pairs, as everywhere in V4.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, config.compress_rate_csa, config.index_head_dim)
        self.heads = config.index_n_heads
        assert config.q_lora_rank is not None
        self.q_b_proj = Linear(config.q_lora_rank, self.heads * self.width)
        self.scorer = Scorer(config)

    def queries(
        self, x: Tensor, q_latent: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x [..., D] and q_latent [..., C] to queries [..., J, I] and the heads' weights [..., J],
        float32 at least.
        """
        q = self.q_b_proj(q_latent).unflatten(-1, (self.heads, self.width))
        q = rotate_tail(q, cos[..., None, :], sin[..., None, :])
        return q, _head_weights(self.scorer.weights_proj, x, self.heads)


def _head_weights(projection: Linear, x: Tensor, heads: int) -> Tensor:
    """The heads' weights [..., J], scaled by 1 / sqrt(J), in float32 or wider."""
    weights: Tensor = projection(x).to(torch.promote_types(x.dtype, torch.float32)) * heads**-0.5
    return weights
