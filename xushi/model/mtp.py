"""Multi-token prediction (MTP): layers after the trunk, each of which predicts one token further
ahead.

V3 (arXiv:2412.19437, section 2.2) joins the hidden state and the next token's embedding with one
matrix. V4 uses two matrices and works on all residual streams. Embedding and head are the trunk's.

Axes: B batch, T tokens, D hidden, S streams.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xushi.model.config import ModelConfig
from xushi.model.decoder import DecoderLayer
from xushi.model.hyper_connections import HyperHead
from xushi.model.layers import Linear, RMSNorm
from xushi.model.sequences import Sequences
from xushi.ops import RouterChoice


@dataclass(frozen=True)
class Prediction:
    """The result of one MTP depth."""

    hidden_BTD: Tensor  # input of the head
    carried: Tensor  # input of the next depth: the same, or V4's streams [B, T, S, D]
    choice: RouterChoice | None  # of the layer's router
    divergence_BT: Tensor | None  # of the layer's indexer, if asked for


class SharedHead(nn.Module):
    """Holds an MTP layer's own final norm under its published name in V3."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class JoinedPrediction(DecoderLayer):
    """V3's MTP layer (eqs. 21-23).

    Its input is eh_proj([enorm(embedding of the next token); hnorm(hidden state of the previous
    depth)]), in the order of the published weights. That hidden state is taken after the previous
    depth's final norm, as in transformers and vLLM.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__(config, index)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.shared_head = SharedHead(config)

    def predict(
        self, carried_BTD: Tensor, embedded_BTD: Tensor, sequences: Sequences
    ) -> Prediction:
        """From the previous depth's hidden state and the embedding of the token which that depth
        predicts.
        """
        joined = torch.cat((self.enorm(embedded_BTD), self.hnorm(carried_BTD)), dim=-1).to(
            sequences.dtype
        )
        x_BTD, choice, divergence_BT = self.forward(
            self.eh_proj(joined).to(carried_BTD.dtype), sequences
        )
        hidden_BTD = self.shared_head.norm(x_BTD)
        return Prediction(hidden_BTD, hidden_BTD, choice, divergence_BT)


class StreamsPrediction(DecoderLayer):
    """V4's MTP layer (`mtp.N` of the published weights).

    Its input streams are h_proj(hnorm(stream of the previous depth)) + e_proj(enorm(embedding of
    the next token)). After the decoder layer come a hyper-head of its own, which collapses the
    streams, and a norm of its own.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__(config, index)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps, wide_weight=True)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps, wide_weight=True)
        self.e_proj = Linear(config.hidden_size, config.hidden_size)
        self.h_proj = Linear(config.hidden_size, config.hidden_size)
        self.hc_head = HyperHead(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, wide_weight=True)

    def predict(
        self, carried_BTSD: Tensor, embedded_BTD: Tensor, sequences: Sequences
    ) -> Prediction:
        """From the previous depth's streams and the embedding of the token which that depth
        predicts.
        """
        embedded = self.e_proj(self.enorm(embedded_BTD).to(sequences.dtype))
        joined = embedded[..., None, :] + self.h_proj(self.hnorm(carried_BTSD).to(sequences.dtype))
        streams, choice, divergence_BT = self.forward(joined.to(carried_BTSD.dtype), sequences)
        return Prediction(self.norm(self.hc_head(streams)), streams, choice, divergence_BT)


MultiTokenPredictionLayer = JoinedPrediction | StreamsPrediction


def mtp_layer(config: ModelConfig, index: int) -> MultiTokenPredictionLayer:
    """The MTP layer for this model_type. `index` counts on from the trunk's last layer."""
    return StreamsPrediction(config, index) if config.is_v4 else JoinedPrediction(config, index)
