"""The angles by which queries and keys are rotated, by position.

Axes: R rotated width.
"""

from torch import Tensor, nn

from xushi.model.config import RopeScaling
from xushi.ops.rope import rope_frequencies, yarn_frequencies, yarn_mscale


class RotaryAngles(nn.Module):
    """cos and sin of every position's angles, YaRN included."""

    frequencies: Tensor

    def __init__(
        self, width: int, theta: float, scaling: RopeScaling | None, rescale: bool = True
    ) -> None:
        """`width` values are rotated; `rescale`: YaRN's temperature counts too, as everywhere but
        in V4.
        """
        super().__init__()
        self.magnitude = 1.0
        if scaling is None:
            frequencies = rope_frequencies(width, theta)
        else:
            frequencies = yarn_frequencies(
                width,
                theta,
                scaling.factor,
                scaling.original_max_position_embeddings,
                scaling.beta_fast,
                scaling.beta_slow,
            )
        if scaling is not None and rescale:
            # Without both factors YaRN's own temperature applies to cos and sin; DeepSeek's two
            # cancel here (where equal) and act through the softmax scale instead.
            self.magnitude = yarn_mscale(scaling.factor, 1.0)
            if scaling.mscale and scaling.mscale_all_dim:
                self.magnitude = yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(
                    scaling.factor, scaling.mscale_all_dim
                )
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [...] to cos and sin [..., R/2]."""
        angles = positions[..., None].to(self.frequencies.dtype) * self.frequencies
        return angles.cos() * self.magnitude, angles.sin() * self.magnitude
