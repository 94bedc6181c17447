"""V4's compressor: every `rate` tokens become one entry of keys and values (DeepSeek-V4, sections
2.3.1 and 2.3.2).

Heavily compressed attention (HCA) pools a window's own tokens. Compressed sparse attention (CSA)
pools two windows: each token projects to two series, and the entry of window w takes the first
series of window w - 1 and the second of w.

Axes: ... any leading axes, M tokens of a window and of the one before it (2 * rate), C width of an
entry.
"""

import torch
from torch import Tensor, nn

from xushi.model.config import ModelConfig
from xushi.model.layers import Linear, RMSNorm
from xushi.ops import compress_windows, rotate_tail


class Compressor(nn.Module):
    """Parameter names are transformers' (`DeepseekV4HCACompressor`, `DeepseekV4CSACompressor`)."""

    def __init__(self, config: ModelConfig, rate: int, width: int) -> None:
        super().__init__()
        self.rate, self.width = rate, width
        self.overlaps = rate == config.compress_rate_csa
        series = 2 if self.overlaps else 1
        self.kv_proj = Linear(config.hidden_size, series * width)
        self.gate_proj = Linear(config.hidden_size, series * width)
        self.position_bias = nn.Parameter(torch.empty(rate, series * width))
        self.kv_norm = RMSNorm(width, config.rms_norm_eps, wide_weight=True)

    def project(self, x: Tensor) -> Tensor:
        """[..., D] to what a token gives to its windows' entries, values before gates: [..., 2 *
        series * C].
        """
        return torch.cat((self.kv_proj(x), self.gate_proj(x)), dim=-1)

    def entries(
        self, projected_MP: Tensor, has_previous: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """The entries of windows [..., C] from their tokens' projections [..., 2 * rate, P].

        `has_previous` [...] says whether the window before exists; cos and sin [..., R/2] are of
        the window's first position.
        """
        values, gates = projected_MP.chunk(2, dim=-1)
        bias = self.position_bias
        if not self.overlaps:
            entry = compress_windows(values[..., self.rate :, :], gates[..., self.rate :, :] + bias)
        else:

            def joined(
                x: Tensor,
            ) -> Tensor:  # the first series of the window before, the second of the window itself
                return torch.cat(
                    (x[..., : self.rate, : self.width], x[..., -self.rate :, self.width :]), dim=-2
                )

            exists = has_previous[..., None].expand(*has_previous.shape, self.rate)
            exists = torch.cat((exists, torch.ones_like(exists)), dim=-1)
            entry = compress_windows(joined(values), joined(gates) + joined(bias), exists)
        return rotate_tail(self.kv_norm(entry), cos, sin)
