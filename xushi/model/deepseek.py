"""DeepSeek-V2 and V3 as published: decoder layers over MLA and experts, the head, and multi-token prediction layers.

The residual stream is kept in the weights' dtype and every block computes in `compute_dtype` (equal unless training
asks for bfloat16). Not here: losses (objective.py), files (weights.py), sampling (engine).

Axes: B batch, T tokens, D hidden, V vocabulary, N flat tokens, M tokens whose logits are wanted.
"""

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xushi.base.seeds import derive
from xushi.model.attention import MultiHeadLatentAttention, RotaryAngles
from xushi.model.cache import FlatTokens, LatentCache
from xushi.model.config import ModelConfig
from xushi.model.layers import MLP, Linear, RMSNorm
from xushi.model.moe import MixtureOfExperts, Router
from xushi.ops import RouterChoice
from xushi.ops.attention import segment_mask


@dataclass(frozen=True)
class Logits:
    """`logits` [B, T, V] in the weights' dtype."""

    logits: Tensor


@dataclass(frozen=True)
class Hidden:
    """The trunk's output after the final norm [B, T, D] and each MoE layer's routing, first layer first."""

    hidden_BTD: Tensor
    routing: list[RouterChoice]


@dataclass(frozen=True)
class Decoded:
    """Logits [M, V] of the wanted tokens, float32, and on request the experts [MoE layers, M, k] they went to."""

    logits_MV: Tensor
    routed_experts: Tensor | None


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.self_attn = MultiHeadLatentAttention(config)
        self.mlp = MixtureOfExperts(config) if config.is_moe(index) else MLP(config.hidden_size,
                                                                             config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def feed_forward(self, x: Tensor, dtype: torch.dtype, pinned_Nk: Tensor | None = None
                     ) -> tuple[Tensor, RouterChoice | None]:
        """The second half of the layer."""
        h = self.post_attention_layernorm(x).to(dtype)
        if isinstance(self.mlp, MixtureOfExperts):
            y, choice = self.mlp(h, pinned_Nk)
            return x + y, choice
        return x + self.mlp(h), None

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, dtype: torch.dtype,
                pinned_Nk: Tensor | None = None) -> tuple[Tensor, RouterChoice | None]:
        """Whole sequences."""
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD).to(dtype), cos, sin, mask)
        return self.feed_forward(x_BTD, dtype, pinned_Nk)

    def decode(self, x_ND: Tensor, cos: Tensor, sin: Tensor, flat: FlatTokens, entries: Tensor, dtype: torch.dtype
               ) -> tuple[Tensor, RouterChoice | None]:
        """Flat tokens against this layer's cache entries."""
        x_ND = x_ND + self.self_attn.decode(self.input_layernorm(x_ND).to(dtype), cos, sin, flat, entries)
        return self.feed_forward(x_ND, dtype)


class SharedHead(nn.Module):
    """An MTP layer's own final norm; its head and embedding are the trunk's (V3, section 2.2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class MultiTokenPredictionLayer(DecoderLayer):
    """One further depth of prediction (V3, arXiv:2412.19437, eqs. 21-23).

    Input is eh_proj([enorm(embedding of the next token); hnorm(hidden state of the depth before)]), in the order of
    the published weights; the hidden state is the one after that depth's final norm, as in transformers and vLLM.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__(config, index)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.shared_head = SharedHead(config)

    def predict(self, hidden_BTD: Tensor, embedded_BTD: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None,
                dtype: torch.dtype) -> tuple[Tensor, RouterChoice | None]:
        """The hidden state [B, T, D] from which this depth's token is predicted."""
        joined = torch.cat((self.enorm(embedded_BTD), self.hnorm(hidden_BTD)), dim=-1).to(dtype)
        x_BTD, choice = self.forward(self.eh_proj(joined).to(hidden_BTD.dtype), cos, sin, mask, dtype)
        return self.shared_head.norm(x_BTD), choice


class Trunk(nn.Module):
    """Embedding, decoder layers and final norm; MTP layers follow the decoder layers, as in the published files."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=torch.empty(
            config.vocab_size, config.hidden_size))
        depth, extra = config.num_hidden_layers, config.num_nextn_predict_layers
        self.layers = nn.ModuleList([DecoderLayer(config, i) for i in range(depth)]
                                    + [MultiTokenPredictionLayer(config, depth + i) for i in range(extra)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Deepseek(nn.Module):
    """The whole model. Parameters are uninitialised until `initialise` or `load_pretrained`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)
        self.angles = RotaryAngles(config)
        self.compute_dtype: torch.dtype | None = None

    @property
    def head_VD(self) -> Tensor:
        """The output matrix, the embedding itself where the two are tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def decoder_layers(self) -> list[DecoderLayer]:
        """The layers of the trunk, without MTP's."""
        return [cast(DecoderLayer, layer) for layer in self.model.layers[:self.config.num_hidden_layers]]

    @property
    def mtp_layers(self) -> list[MultiTokenPredictionLayer]:
        """The MTP layers, depth 1 first."""
        return [cast(MultiTokenPredictionLayer, layer) for layer in self.model.layers[self.config.num_hidden_layers:]]

    def routers(self) -> dict[str, Router]:
        """Every router by its layer's number as text, MTP layers included."""
        return {str(index): layer.mlp.gate for index, layer in enumerate(self.model.layers)
                if isinstance(layer.mlp, MixtureOfExperts)}

    def initialise(self, seed: int) -> "Deepseek":
        """Normal weights of std `initializer_range`, unit norms, zero biases; each tensor from its own named stream."""
        for name, parameter in self.named_parameters():
            with torch.no_grad():
                if name.endswith("bias"):
                    parameter.zero_()
                elif parameter.dim() == 1:
                    parameter.fill_(1.0)
                else:
                    stream = torch.Generator().manual_seed(derive(seed, "initialise", name) >> 1)
                    parameter.copy_(torch.empty(parameter.shape).normal_(0.0, self.config.initializer_range,
                                                                         generator=stream))
        for router in self.routers().values():
            if router.e_score_correction_bias is not None:
                router.e_score_correction_bias.zero_()
        return self

    def hidden(self, tokens_BT: Tensor, positions_BT: Tensor | None = None, segments_BT: Tensor | None = None,
               pinned: list[Tensor] | None = None) -> Hidden:
        """Run the trunk. Without positions and segments each row is one document from position 0.

        `pinned` holds one [B*T, k] choice per MoE layer and replaces the routers' own.
        """
        if positions_BT is None:
            positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
        mask = None if segments_BT is None else segment_mask(segments_BT)
        cos, sin = self.angles(positions_BT)
        x_BTD = F.embedding(tokens_BT, self.model.embed_tokens.weight)
        dtype = self.compute_dtype or x_BTD.dtype
        routing: list[RouterChoice] = []
        for layer in self.decoder_layers:
            is_moe = isinstance(layer.mlp, MixtureOfExperts)
            x_BTD, choice = layer(x_BTD, cos, sin, mask, dtype, pinned[len(routing)] if pinned and is_moe else None)
            if choice is not None:
                routing.append(choice)
        return Hidden(self.model.norm(x_BTD), routing)

    def forward(self, tokens_BT: Tensor, positions_BT: Tensor | None = None, segments_BT: Tensor | None = None,
                pinned: list[Tensor] | None = None) -> Logits:
        """Token ids [B, T] to logits [B, T, V]."""
        x_BTD = self.hidden(tokens_BT, positions_BT, segments_BT, pinned).hidden_BTD
        dtype = self.compute_dtype or x_BTD.dtype
        return Logits(F.linear(x_BTD.to(dtype), self.head_VD.to(dtype)))

    @torch.no_grad()
    def decode(self, flat: FlatTokens, cache: LatentCache, routing: bool = False) -> Decoded:
        """The inference forward: flat tokens of many sequences against the latent cache, prefill and decode mixed."""
        cos, sin = self.angles(flat.positions_N)
        x_ND = F.embedding(flat.tokens_N, self.model.embed_tokens.weight)
        dtype = self.compute_dtype or x_ND.dtype
        experts: list[Tensor] = []
        for layer, entries in zip(self.decoder_layers, cache.layers, strict=True):
            x_ND, choice = layer.decode(x_ND, cos, sin, flat, entries, dtype)
            if routing and choice is not None:
                experts.append(choice.indices_Nk.index_select(0, flat.wanted_M))
        x_MD = self.model.norm(x_ND.index_select(0, flat.wanted_M)).to(dtype)
        logits_MV = F.linear(x_MD, self.head_VD.to(dtype)).float()
        return Decoded(logits_MV, torch.stack(experts) if experts else None)
