"""The residual: a single stream to which blocks add, or V4's several streams (mHC,
arXiv:2512.24880).

In both kinds `read` gives a block its input and `write` adds its output.

Axes: ... any leading axes, S streams, D hidden.
"""

import torch
from torch import Tensor, nn

from xushi.model.config import ModelConfig
from xushi.ops import collapse_streams, expand_streams, rms_norm, stream_weights


class PlainResidual(nn.Module):
    """x + block(x)."""

    def read(self, x_D: Tensor) -> tuple[Tensor, None]:
        """The stream itself."""
        return x_D, None

    def write(self, x_D: Tensor, y_D: Tensor, weights: None) -> Tensor:
        """The stream with a block's output added."""
        return x_D + y_D


def _projected(streams_SD: Tensor, fn: Tensor, eps: float) -> Tensor:
    """fn times all streams of a token, normalised as one vector; in float32 or wider."""
    wide = torch.promote_types(streams_SD.dtype, torch.float32)
    return rms_norm(streams_SD.flatten(-2).to(wide), None, eps) @ fn.to(wide).T


class HyperConnection(nn.Module):
    """One block's weights for reading, mixing and writing the streams, computed from the streams.

    Matches transformers' `DeepseekV4HyperConnection`; parameter names are its own.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        parts = (2 + config.hc_mult) * config.hc_mult
        self.fn = nn.Parameter(torch.empty(parts, config.hc_mult * config.hidden_size))
        self.base = nn.Parameter(torch.empty(parts))
        self.scale = nn.Parameter(torch.empty(3))

    def read(self, streams_SD: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """A block's input [..., D], and the weights for `write`: [..., S] and [..., S, S]."""
        config = self.config
        projected = _projected(streams_SD, self.fn, config.rms_norm_eps)
        read_S, write_S, mix_SS = stream_weights(
            projected,
            self.scale,
            self.base,
            config.hc_mult,
            config.hc_sinkhorn_iters,
            config.hc_eps,
        )
        return collapse_streams(streams_SD, read_S), (write_S, mix_SS)

    def write(self, streams_SD: Tensor, y_D: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
        """The streams with the block's output y_D added: [..., S, D]."""
        return expand_streams(streams_SD, y_D, *weights)


class HyperHead(nn.Module):
    """Collapses the streams into one before the final norm; it does not mix them, so it needs no
    Sinkhorn iterations.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.hc_fn = nn.Parameter(torch.empty(config.hc_mult, config.hc_mult * config.hidden_size))
        self.hc_base = nn.Parameter(torch.empty(config.hc_mult))
        self.hc_scale = nn.Parameter(torch.empty(1))

    def forward(self, streams_SD: Tensor) -> Tensor:
        """[..., S, D] to [..., D]."""
        projected = _projected(streams_SD, self.hc_fn, self.config.rms_norm_eps)
        return collapse_streams(
            streams_SD, (projected * self.hc_scale + self.hc_base).sigmoid() + self.config.hc_eps
        )
