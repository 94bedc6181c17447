"""A decoder layer: attention and feed-forward, each reading from and writing to the residual.

Axes: B batch, T tokens, D hidden, N flat tokens, S streams of V4's residual.
"""

import torch
from torch import Tensor, nn

from xushi.model.attention import MultiHeadLatentAttention
from xushi.model.compressed_attention import CompressedAttention
from xushi.model.config import ModelConfig
from xushi.model.hyper_connections import HyperConnection, PlainResidual
from xushi.model.layers import MLP, RMSNorm
from xushi.model.moe import MixtureOfExperts
from xushi.model.sequences import Decoding, Sequences
from xushi.ops import RouterChoice


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). In V4 both read and write several streams
    through hyper-connections.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.self_attn = (
            CompressedAttention(config, index) if config.is_v4 else MultiHeadLatentAttention(config)
        )
        self.mlp = (
            MixtureOfExperts(config, config.is_hash_routed(index))
            if config.is_moe(index)
            else MLP(config.hidden_size, config.intermediate_size)
        )
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.is_v4)
        self.post_attention_layernorm = RMSNorm(
            config.hidden_size, config.rms_norm_eps, config.is_v4
        )
        self.attn_hc = HyperConnection(config) if config.is_v4 else PlainResidual()
        self.ffn_hc = HyperConnection(config) if config.is_v4 else PlainResidual()

    def forward(
        self, x: Tensor, sequences: Sequences, pinned_Nk: Tensor | None = None
    ) -> tuple[Tensor, RouterChoice | None, Tensor | None]:
        """Whole sequences: the residual [B, T, D] or [B, T, S, D] after the layer, the router's
        choice (None without a router) and the indexer's divergence [B, T] (None if not asked for).
        """
        h_BTD, weights = self.attn_hc.read(x)
        y_BTD, divergence_BT = self.self_attn(
            self.input_layernorm(h_BTD).to(sequences.dtype), sequences
        )
        x = self.attn_hc.write(x, y_BTD, weights)  # type: ignore[arg-type]
        x, choice = self._feed_forward(x, sequences.tokens_BT, sequences.dtype, pinned_Nk)
        return x, choice, divergence_BT

    def decode(
        self, x: Tensor, decoding: Decoding, cache: Tensor
    ) -> tuple[Tensor, RouterChoice | None]:
        """Flat tokens [N, D] or [N, S, D] against this layer's cache [slots, width]: the residual
        after the layer, and the router's choice.
        """
        h_ND, weights = self.attn_hc.read(x)
        y_ND = self.self_attn.decode(self.input_layernorm(h_ND).to(decoding.dtype), decoding, cache)
        x = self.attn_hc.write(x, y_ND, weights)  # type: ignore[arg-type]
        return self._feed_forward(x, decoding.flat.tokens_N, decoding.dtype)

    def _feed_forward(
        self, x: Tensor, tokens: Tensor, dtype: torch.dtype, pinned_Nk: Tensor | None = None
    ) -> tuple[Tensor, RouterChoice | None]:
        h, weights = self.ffn_hc.read(x)
        h = self.post_attention_layernorm(h).to(dtype)
        choice = None
        if isinstance(self.mlp, MixtureOfExperts):
            y, choice = self.mlp(h, tokens, pinned_Nk)
        else:
            y = self.mlp(h)
        return self.ffn_hc.write(x, y, weights), choice  # type: ignore[arg-type]
