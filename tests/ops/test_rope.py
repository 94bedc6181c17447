"""Frequencies against transformers', rotations against products of complex numbers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Config,
    DeepseekV3RotaryEmbedding,
    apply_rotary_pos_emb,
    apply_rotary_pos_emb_interleave,
    yarn_get_mscale,
)

from xushi.model import ModelConfig, RopeScaling
from xushi.model.attention import MultiHeadLatentAttention
from xushi.model.rotary import RotaryAngles
from xushi.ops import apply_rope, rope_frequencies, rotate_tail
from xushi.ops.rope import yarn_frequencies, yarn_mscale


def their_config(width: int, parameters: dict) -> DeepseekV3Config:
    return DeepseekV3Config(
        qk_rope_head_dim=width,
        head_dim=width,
        rope_parameters=parameters,
        max_position_embeddings=163840,
    )


@given(
    width=st.integers(1, 64).map(lambda half: 2 * half),
    theta=st.sampled_from([100.0, 1e4, 5e5, 1e6]),
)
def test_default_frequencies(width: int, theta: float) -> None:
    config = their_config(width, {"rope_type": "default", "rope_theta": theta})
    expected, factor = DeepseekV3RotaryEmbedding.compute_default_rope_parameters(config)
    assert factor == 1.0 and torch.equal(rope_frequencies(width, theta), expected)


@st.composite
def scalings(draw: st.DrawFn) -> dict:
    return {
        "factor": draw(st.sampled_from([1.0, 1.5, 4.0, 40.0])),
        "original_max_position_embeddings": draw(st.sampled_from([16, 64, 4096])),
        "beta_fast": draw(st.sampled_from([2.0, 8.0, 32.0])),
        "beta_slow": draw(st.sampled_from([0.5, 1.0])),
        "mscale": draw(st.sampled_from([0.0, 0.707, 1.0])),
        "mscale_all_dim": draw(st.sampled_from([0.0, 0.5, 1.0])),
    }


@given(
    width=st.integers(1, 64).map(lambda half: 2 * half),
    theta=st.sampled_from([100.0, 1e4, 1e6]),
    scaling=scalings(),
)
def test_yarn_frequencies_and_temperatures(width: int, theta: float, scaling: dict) -> None:
    parameters = {"rope_type": "yarn", "rope_theta": theta, **scaling}
    expected, factor = ROPE_INIT_FUNCTIONS["yarn"](their_config(width, parameters))
    got = yarn_frequencies(
        width,
        theta,
        scaling["factor"],
        scaling["original_max_position_embeddings"],
        scaling["beta_fast"],
        scaling["beta_slow"],
    )
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)

    config = ModelConfig(
        hidden_size=8,
        num_attention_heads=1,
        qk_rope_head_dim=width,
        rope_theta=theta,
        rope_scaling=RopeScaling(**scaling),
    )
    angles = RotaryAngles(width, theta, config.rope_scaling)
    assert angles.magnitude == pytest.approx(factor, rel=1e-12)
    with torch.device("meta"):
        scale = MultiHeadLatentAttention(config).scale
    temperature = (
        yarn_get_mscale(scaling["factor"], scaling["mscale_all_dim"])
        if scaling["mscale_all_dim"]
        else 1.0
    )
    assert scale == pytest.approx(config.qk_head_dim**-0.5 * temperature**2, rel=1e-12)


@given(factor=st.floats(0.1, 100.0), mscale=st.floats(0.0, 2.0))
def test_yarn_mscale(factor: float, mscale: float) -> None:
    assert yarn_mscale(factor, mscale) == pytest.approx(yarn_get_mscale(factor, mscale), rel=1e-12)


@given(
    seed=st.integers(0, 2**31),
    pairs=st.integers(1, 9),
    length=st.integers(1, 6),
    heads=st.integers(1, 3),
)
def test_rotation_is_a_complex_product(seed: int, pairs: int, length: int, heads: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(length, heads, 2 * pairs, generator=g, dtype=torch.float64)
    angle = torch.rand(length, 1, pairs, generator=g, dtype=torch.float64) * 20
    turn = torch.polar(torch.ones_like(angle), angle)
    for interleaved in (True, False):
        first, second = (
            (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :pairs], x[..., pairs:])
        )
        turned = torch.complex(first.contiguous(), second.contiguous()) * turn
        got = apply_rope(x, angle.cos(), angle.sin(), interleaved)
        torch.testing.assert_close(got, torch.cat((turned.real, turned.imag), -1))


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotation_is_transformers_own(interleaved: bool) -> None:
    config = their_config(8, {"rope_type": "default", "rope_theta": 1e4})
    g = torch.Generator().manual_seed(13)
    q_BHTR = torch.randn(2, 3, 7, 8, generator=g)
    k_BHTR = torch.randn(2, 1, 7, 8, generator=g)
    positions = torch.randint(0, 5000, (2, 7), generator=g)
    cos, sin = DeepseekV3RotaryEmbedding(config)(q_BHTR, positions)
    theirs = (apply_rotary_pos_emb_interleave if interleaved else apply_rotary_pos_emb)(
        q_BHTR, k_BHTR, cos, sin
    )
    our_cos, our_sin = RotaryAngles(8, 1e4, None)(positions)
    for x, expected in zip((q_BHTR, k_BHTR), theirs, strict=True):
        got = apply_rope(x, our_cos[:, None], our_sin[:, None], interleaved)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@given(shift=st.integers(0, 1000), apart=st.integers(0, 50))
def test_products_depend_on_distance_alone(shift: int, apart: int) -> None:
    g = torch.Generator().manual_seed(14)
    q, k = (torch.randn(6, generator=g, dtype=torch.float64) for _ in range(2))
    frequencies = rope_frequencies(6, 1e4).double()

    def product(query: int, key: int) -> Tensor:
        turned = [
            apply_rope(v, (p * frequencies).cos(), (p * frequencies).sin(), True)
            for v, p in ((q, query), (k, key))
        ]
        return turned[0] @ turned[1]

    torch.testing.assert_close(product(shift + apart, shift), product(apart, 0))
    assert math.isclose(product(0, 0), q @ k)


def test_their_width_is_the_rotated_one() -> None:
    """The comparisons above give transformers the width as `head_dim`; the model's own config must
    give the same width.
    """
    assert DeepseekV3Config(qk_rope_head_dim=16).head_dim == 16


@given(seed=st.integers(0, 2**31), pairs=st.integers(1, 4), rest=st.integers(0, 5))
def test_the_tail_turns_in_place_and_back(seed: int, pairs: int, rest: int) -> None:
    """V4 rotates the last values in adjacent pairs and keeps their order. Rotating back restores
    them.
    """
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3, rest + 2 * pairs, generator=g, dtype=torch.float64)
    angle = torch.rand(3, pairs, generator=g, dtype=torch.float64) * 20
    got = rotate_tail(x, angle.cos(), angle.sin())
    assert torch.equal(got[:, :rest], x[:, :rest])
    turn = torch.polar(torch.ones_like(angle), angle)
    turned = torch.view_as_complex(x[:, rest:].reshape(3, pairs, 2).clone()) * turn
    torch.testing.assert_close(got[:, rest:], torch.view_as_real(turned).flatten(1))
    torch.testing.assert_close(rotate_tail(got, angle.cos(), -angle.sin()), x)
