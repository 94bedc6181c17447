"""V4's compressor: turns every window of `rate` tokens into one entry, which is key and value
(DeepSeek-V4, sections 2.3.1 and 2.3.2).

In heavily compressed attention (HCA) an entry pools the tokens of its window. In compressed sparse
attention (CSA) it pools two windows: each token projects to two series, and the entry of window w
pools the first series of window w - 1 and the second series of window w.

Axes: ... any leading axes, M tokens of a window and of the one before it (2 * rate), P width of a
token's projections, C width of an entry.
"""

import torch
from torch import Tensor, nn

from xushi.model.config import ModelConfig
from xushi.model.layers import Linear, RMSNorm
from xushi.ops import compress_windows, rotate_tail


class Compressor(nn.Module):
    """Parameter names are those of transformers' `DeepseekV4HCACompressor` and
    `DeepseekV4CSACompressor`.
    """

    def __init__(self, config: ModelConfig, rate: int, width: int) -> None:
        super().__init__()
        self.rate = rate
        self.width = width
        self.overlaps = rate == config.compress_rate_csa
        series = 2 if self.overlaps else 1
        self.kv_proj = Linear(config.hidden_size, series * width)
        self.gate_proj = Linear(config.hidden_size, series * width)
        self.position_bias = nn.Parameter(torch.empty(rate, series * width))
        self.kv_norm = RMSNorm(width, config.rms_norm_eps, wide_weight=True)

    def project(self, x: Tensor) -> Tensor:
        """[..., D] to a token's projections for its windows' entries, values and then gates: [...,
        2 * series * C].
        """
        return torch.cat((self.kv_proj(x), self.gate_proj(x)), dim=-1)

    def entries(
        self, projected_MP: Tensor, has_previous: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """The entries of windows [..., C] from their tokens' projections [..., 2 * rate, P].

        `has_previous` [...] is True if the window before exists. cos and sin [..., R/2] are those
        of the window's first position.
        """
        values, gates = projected_MP.chunk(2, dim=-1)
        bias = self.position_bias
        if self.overlaps:
            exists = has_previous[..., None].expand(*has_previous.shape, self.rate)
            exists = torch.cat((exists, torch.ones_like(exists)), dim=-1)
            gates = self._joined(gates) + self._joined(bias)
            entry = compress_windows(self._joined(values), gates, exists)
        else:
            entry = compress_windows(values[..., self.rate :, :], gates[..., self.rate :, :] + bias)
        return rotate_tail(self.kv_norm(entry), cos, sin)

    def _joined(self, x: Tensor) -> Tensor:
        """The first series of the window before, followed by the second series of the window."""
        first = x[..., : self.rate, : self.width]
        second = x[..., -self.rate :, self.width :]
        return torch.cat((first, second), dim=-2)
