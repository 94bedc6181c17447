"""Other people's checkpoints: what config.json and the files say is read as transformers reads it,
or refused with a sentence that names the file.
"""

from typing import Any

import pytest
import torch

from xushi.base.errors import BadInput
from xushi.model import from_published
from xushi.model.rope_fields import rope_fields
from xushi.model.rotary import RotaryAngles

from .published import ONE_OF_EACH, TOLERANCE, judged, rotation, small

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
NEW_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LATENT = ONE_OF_EACH[:3]
NONE = {"rope_theta": ..., "rope_scaling": ..., "rope_parameters": ..., "compress_rope_theta": ...}
# Where a config.json may state RoPE's base and scaling, for a model with one rotation.
SPELLINGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "top base": {"rope_theta": 50000},
    "top base, empty tables": {"rope_theta": 50000.0, "rope_scaling": {}, "rope_parameters": {}},
    "top base, null tables": {"rope_theta": 50000.0, "rope_scaling": None, "rope_parameters": None},
    "top base, type alone": {"rope_theta": 50000, "rope_parameters": {"rope_type": "default"}},
    "base in the new table": {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}},
    "base in the new table, no type": {"rope_parameters": {"rope_theta": 50000.0}},
    "base in the old table": {"rope_scaling": {"type": "default", "rope_theta": 50000.0}},
    "base in the old table, no type": {"rope_scaling": {"rope_theta": 50000.0}},
    "two bases": {"rope_theta": 500.0, "rope_parameters": {"rope_theta": 50000.0}},
    "a null base above": {"rope_theta": None, "rope_parameters": {"rope_theta": 50000.0}},
    "yarn and top base": {"rope_theta": 50000.0, "rope_scaling": YARN},
    "yarn without base": {"rope_scaling": YARN},
    "yarn with base": {"rope_scaling": YARN | {"rope_theta": 50000.0}},
    "yarn with both bases": {"rope_theta": 7.0, "rope_scaling": YARN | {"rope_theta": 50000.0}},
    "new yarn with base": {"rope_parameters": NEW_YARN | {"rope_theta": 50000.0}},
    "new yarn and top base": {"rope_theta": 50000.0, "rope_parameters": NEW_YARN},
    "new yarn, empty old": {"rope_scaling": {}, "rope_parameters": NEW_YARN},
    "old yarn, empty new": {"rope_scaling": YARN, "rope_parameters": {}},
    "both tables the same": {"rope_scaling": YARN, "rope_parameters": NEW_YARN},
    "both names of the type": {"rope_scaling": YARN | {"rope_type": "yarn"}},
    "mscales": {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.9}},
    "mscale alone": {"rope_scaling": YARN | {"mscale": 0.7}},
    "mscale_all_dim alone": {"rope_scaling": YARN | {"mscale_all_dim": 0.9}},
    "null mscale": {"rope_scaling": YARN | {"mscale": None, "mscale_all_dim": 0.9}},
    "null mscale_all_dim": {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": None}},
    "zero mscale": {"rope_scaling": YARN | {"mscale": 0, "mscale_all_dim": 1}},
    "betas": {"rope_scaling": YARN | {"beta_fast": 2, "beta_slow": 0.5}},
    "null betas": {"rope_scaling": YARN | {"beta_fast": None, "beta_slow": None}},
    "zero betas": {"rope_scaling": YARN | {"beta_fast": 0, "beta_slow": 0}},
    "equal betas": {"rope_scaling": YARN | {"beta_fast": 1.0, "beta_slow": 1.0}},
    "length as a float": {"rope_scaling": YARN | {"original_max_position_embeddings": 16.0}},
    "length above": {
        "original_max_position_embeddings": 16,
        "rope_scaling": {"type": "yarn", "factor": 4.0},
    },
    "length nowhere": {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    "null length": {"rope_scaling": YARN, "rope_theta": 1e6, "attention_factor": None},
    "factor below 1": {"rope_scaling": YARN | {"factor": 0.5, "mscale": 1, "mscale_all_dim": 1}},
}
# For V4, whose compressed layers have a base of their own.
SPELLINGS_V4: dict[str, dict[str, Any]] = {
    "nothing": {},
    "both bases above": {"rope_theta": 50000, "compress_rope_theta": 7000},
    "type alone": {"rope_theta": 50000.0, "rope_parameters": {"rope_type": "default"}},
    "yarn": {"rope_scaling": YARN, "compress_rope_theta": 7000.0},
    "yarn and the same base": {"rope_theta": 50.0, "rope_scaling": YARN | {"rope_theta": 50.0}},
    "yarn with null mscale": {"rope_scaling": YARN | {"mscale": None, "attention_factor": 1.0}},
    "new yarn": {"rope_theta": 50000.0, "rope_parameters": NEW_YARN},
    "two tables": {
        "rope_theta": 3.0,
        "compress_rope_theta": 5.0,
        "rope_parameters": {
            "main": {"rope_type": "default", "rope_theta": 50000.0, "partial_rotary_factor": 2 / 3},
            "compress": NEW_YARN
            | {"rope_theta": 7000.0, "partial_rotary_factor": 2 / 3, "attention_factor": 1.0},
        },
    },
    "two tables, base of one above": {
        "rope_theta": 50000.0,
        "partial_rotary_factor": 2 / 3,
        "rope_parameters": {"main": {"rope_type": "default"}, "compress": {"rope_theta": 7000.0}},
    },
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_rope_is_read_wherever_it_stands(spelling: str) -> None:
    """Frequencies and the scale of cos and sin."""
    for name in LATENT:
        table = small(name, **(NONE | SPELLINGS[spelling]))
        config, expected = from_published(table, "here"), rotation(table)
        angles = RotaryAngles(config.qk_rope_head_dim, config.rope_theta, config.rope_scaling)
        torch.testing.assert_close(angles.frequencies, expected.inv_freq, rtol=1e-6, atol=0)
        assert angles.magnitude == pytest.approx(expected.attention_scaling, rel=1e-12)


@pytest.mark.parametrize("spelling", SPELLINGS_V4)
def test_v4s_two_rotations_are_read_wherever_they_stand(spelling: str) -> None:
    table = small("deepseek-v4-flash", **(NONE | SPELLINGS_V4[spelling]))
    config, expected = from_published(table, "here"), rotation(table)
    width = config.qk_rope_head_dim
    angles = {
        "main": RotaryAngles(width, config.rope_theta, None),
        "compress": RotaryAngles(width, config.compress_rope_theta, config.rope_scaling, False),
    }
    for name, ours_alone in angles.items():
        frequencies = getattr(expected, f"{name}_inv_freq")
        torch.testing.assert_close(ours_alone.frequencies, frequencies, rtol=1e-6, atol=0)
        assert ours_alone.magnitude == getattr(expected, f"{name}_attention_scaling") == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_every_spelling_of_rope_gives_transformers_logits(name: str) -> None:
    """The softmax scale too, which depends on the same fields."""
    for spelling in (SPELLINGS_V4 if "v4" in name else SPELLINGS).values():
        assert judged(small(name, **(NONE | spelling))) <= TOLERANCE, spelling


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "default beside yarn": (
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": YARN},
        "rope_scaling and rope_parameters contradict",
    ),
    "two factors": (
        {"rope_parameters": NEW_YARN | {"factor": 8.0}, "rope_scaling": YARN},
        "contradict",
    ),
    "two bases": (
        {"rope_parameters": NEW_YARN | {"rope_theta": 50000.0}, "rope_scaling": YARN},
        "contradict",
    ),
    "two types": ({"rope_scaling": YARN | {"rope_type": "default"}}, "rope_type is 'default'"),
    "no type": ({"rope_scaling": {"factor": 4.0}}, "no rope_type"),
    "another type": ({"rope_parameters": NEW_YARN | {"rope_type": "llama3"}}, "'llama3'"),
    "null type": ({"rope_parameters": NEW_YARN | {"rope_type": None}}, "of type None"),
    "two lengths": (
        {"original_max_position_embeddings": 32, "rope_scaling": YARN},
        "original_max_position_embeddings is 16",
    ),
    "half a position": (
        {"rope_scaling": YARN | {"original_max_position_embeddings": 16.5}},
        "original_max_position_embeddings",
    ),
    "a table that is a word": ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'"),
    "a table that is a list": ({"rope_parameters": [1]}, "rope_parameters is [1]"),
    "null factor": ({"rope_scaling": YARN | {"factor": None}}, "factor"),
    "a temperature": (
        {"rope_scaling": YARN | {"attention_factor": 1.2}},
        "attention_factor is 1.2",
    ),
    "rounding off": ({"rope_scaling": YARN | {"truncate": False}}, "truncate is False"),
    "a part of the width": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "a base of 1": ({"rope_theta": 1.0, "rope_scaling": YARN}, "rope_theta=1"),
}


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_rope_that_contradicts_itself_is_refused(case: str, name: str) -> None:
    changes, words = CONTRADICTIONS[case]
    if case == "a base of 1" and "v4" in name:
        changes, words = changes | {"compress_rope_theta": 1}, "compress_rope_theta=1"
    if case == "two bases" and "v4" in name:
        words = "rope_parameters.rope_theta is 50000.0"
    with pytest.raises(BadInput) as error:
        from_published(small(name, **(NONE | changes)), "there/config.json")
    assert words in error.value.problem and "there/config.json" in error.value.problem
    assert "recipe" not in error.value.remedy and "--set" not in error.value.remedy


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"main": {}}, "rope_parameters.compress is missing"),
        ({"compress": {"rope_theta": 7.0}, "main": None}, "rope_parameters.main is missing"),
        ({"main": {}, "compress": {}}, "rope_parameters.compress has no rope_theta"),
        (
            {"main": {}, "compress": NEW_YARN | {"rope_theta": 7.0}},
            "rope_parameters.compress.attention_factor is None",
        ),
        ({"main": NEW_YARN, "compress": {"rope_theta": 7.0}}, "main is scaled"),
        (
            {"main": {"partial_rotary_factor": 0.5}, "compress": {"rope_theta": 7.0}},
            "main.partial_rotary_factor",
        ),
    ],
)
def test_v4s_tables_must_be_whole(parameters: dict, words: str) -> None:
    table = small("deepseek-v4-flash", **(NONE | {"rope_parameters": parameters}))
    with pytest.raises(BadInput) as error:
        from_published(table, "there/config.json")
    assert words in error.value.problem


def test_a_table_per_layer_type_belongs_to_v4_alone() -> None:
    table = small("deepseek-v3", **(NONE | {"rope_parameters": {"main": {}, "compress": {}}}))
    with pytest.raises(BadInput, match=r"rope_parameters\.main is a table"):
        rope_fields(table, "deepseek_v3", "there/config.json")
