"""Multi-token prediction: further layers behind the trunk, each of which predicts one token further
ahead.

V3's form (arXiv:2412.19437, section 2.2) joins hidden state and next token's embedding by one
matrix; V4's by two, and works on all residual streams. Embedding and head are the trunk's.

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
    """A depth's hidden state [B, T, D], to which the head is applied; what the next depth takes;
    and as a layer's forward, the router's choice and the indexer's divergence.
    """

    hidden_BTD: Tensor
    carried: Tensor
    choice: RouterChoice | None
    divergence_BT: Tensor | None


class SharedHead(nn.Module):
    """V3's name for an MTP layer's own final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class JoinedPrediction(DecoderLayer):
    """V3's (eqs. 21-23). Input is eh_proj([enorm(embedding of the next token); hnorm(hidden state
    of the depth before)]), in the order of the published weights; the hidden state is the one after
    that depth's final norm, as in transformers and vLLM.
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
        """From the hidden state of the depth before and the embedding of the token that it
        predicted.
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
    """V4's: every stream of the depth before, normed, through h_proj, plus the normed embedding
    through e_proj; then a decoder layer, a head that collapses the streams, and a norm of its own
    (`mtp.N` of the published weights).
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
        """From the streams of the depth before and the embedding of the token that it predicted."""
        embedded = self.e_proj(self.enorm(embedded_BTD).to(sequences.dtype))
        joined = embedded[..., None, :] + self.h_proj(self.hnorm(carried_BTSD).to(sequences.dtype))
        streams, choice, divergence_BT = self.forward(joined.to(carried_BTSD.dtype), sequences)
        return Prediction(self.norm(self.hc_head(streams)), streams, choice, divergence_BT)


MultiTokenPredictionLayer = JoinedPrediction | StreamsPrediction


def mtp_layer(config: ModelConfig, index: int) -> MultiTokenPredictionLayer:
    """The MTP layer of this kind of model; `index` counts on from the trunk's layers."""
    return StreamsPrediction(config, index) if config.is_v4 else JoinedPrediction(config, index)
