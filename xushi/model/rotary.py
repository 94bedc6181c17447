"""The angles by which queries and keys are rotated at each position.

Axes: R rotated width.
"""

from torch import Tensor, nn

from xushi.model.config import RopeScaling
from xushi.ops.rope import rope_frequencies, yarn_frequencies, yarn_mscale


class RotaryAngles(nn.Module):
    """cos and sin of each position's angles, with YaRN's scaling if configured."""

    frequencies: Tensor

    def __init__(
        self, width: int, theta: float, scaling: RopeScaling | None, rescale: bool = True
    ) -> None:
        """`width`: number of rotated values. `rescale`: apply YaRN's temperature too, as all models
        do except V4.
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
            # If mscale or mscale_all_dim is 0, YaRN's own temperature scales cos and sin. Otherwise
            # DeepSeek's quotient does, which is 1 if the two are equal; the attention's softmax
            # scale then contains the temperature.
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
