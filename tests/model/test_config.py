"""The config against transformers' own reading of it, in both directions."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import DeepseekV2Config, DeepseekV3Config

from xushi.base.errors import XushiError
from xushi.model import ModelConfig, RopeScaling

V2 = {"model_type": "deepseek_v2", "topk_method": "greedy"}


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    second = draw(st.booleans())
    groups, size = draw(st.integers(1, 4)), draw(st.integers(2, 5))
    top_groups = draw(st.integers(1, groups))
    scaling = draw(st.none() | st.builds(
        RopeScaling, factor=st.floats(1, 64), original_max_position_embeddings=st.integers(16, 4096),
        beta_fast=st.floats(2, 64), beta_slow=st.floats(0.5, 1), mscale=st.floats(0, 2),
        mscale_all_dim=st.floats(0, 2)))
    kind = {"model_type": "deepseek_v2", "norm_topk_prob": False,
            "topk_method": draw(st.sampled_from(["greedy", "group_limited_greedy"])), "num_nextn_predict_layers": 0}
    if not second:
        kind = {"rope_interleave": draw(st.booleans()), "num_nextn_predict_layers": draw(st.integers(0, 3))}
    return ModelConfig(
        **kind, vocab_size=draw(st.integers(1, 10**6)), n_routed_experts=groups * size, n_group=groups,
        topk_group=top_groups,
        num_experts_per_tok=draw(st.integers(1, top_groups * size)), q_lora_rank=draw(st.none() | st.integers(1, 99)),
        rope_scaling=scaling, rope_theta=draw(st.floats(10, 1e7)), tie_word_embeddings=draw(st.booleans()),
        bos_token_id=draw(st.none() | st.integers(0, 9)), pad_token_id=draw(st.none() | st.integers(0, 9)))


@given(configs())
def test_published_and_back(config: ModelConfig) -> None:
    assert ModelConfig.from_published(json.loads(json.dumps(config.to_published())), "here") == config


@given(configs())
def test_transformers_reads_the_same(config: ModelConfig) -> None:
    """Through its config class and back from what that writes, in transformers 5's own names."""
    second = config.model_type == "deepseek_v2"
    theirs = (DeepseekV2Config if second else DeepseekV3Config)(**config.to_published())
    for name in ModelConfig.model_fields:
        if name not in ("rope_scaling", "rope_theta", "num_nextn_predict_layers", "rope_interleave"):
            assert getattr(theirs, name) == getattr(config, name), name
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    if not second:
        assert theirs.rope_interleave == config.rope_interleave
        assert theirs.num_mtp_layers == config.num_nextn_predict_layers
    assert ModelConfig.from_published(json.loads(theirs.to_json_string(use_diff=False)), "here") == config


def test_the_defaults_are_the_published_models() -> None:
    """DeepSeek-V3's config.json, as far as transformers' defaults repeat it."""
    ours, theirs = ModelConfig(), DeepseekV3Config()
    for name in ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
                 "num_attention_heads", "n_shared_experts", "n_routed_experts", "num_experts_per_tok", "n_group",
                 "topk_group", "norm_topk_prob", "routed_scaling_factor", "first_k_dense_replace", "q_lora_rank",
                 "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rms_norm_eps"):
        assert getattr(ours, name) == getattr(theirs, name), name


def test_a_query_latent_of_zero_is_none() -> None:
    assert ModelConfig(q_lora_rank=0).q_lora_rank is None


@pytest.mark.parametrize("changes, words", [
    ({"hidden_size": 0}, "hidden_size"), ({"first_k_dense_replace": -1}, "first_k_dense_replace"),
    ({"qk_rope_head_dim": 3}, "even"), ({"n_group": 7}, "n_group=7"), ({"n_group": 256}, "at least 2"),
    ({"topk_group": 9}, "topk_group=9"), ({"num_experts_per_tok": 129}, "num_experts_per_tok=129"),
    ({"topk_method": "greedy"}, "noaux_tc"), ({"model_type": "deepseek_v2"}, "noaux_tc"), (V2, "norm_topk_prob"),
    (V2 | {"norm_topk_prob": False}, "num_nextn"), ({"model_type": "deepseek_v4"}, "model_type"),
    (V2 | {"norm_topk_prob": False, "num_nextn_predict_layers": 0, "rope_interleave": False}, "rope_interleave"),
    ({"hiden_size": 8}, "hiden_size"), ({"hidden_size": "8"}, "hidden_size"), ({"norm_topk_prob": 1}, "norm_topk_prob"),
])
def test_what_cannot_be_is_refused(changes: dict, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ModelConfig(**changes)


def test_what_is_not_this_architecture_names_its_key() -> None:
    for key, value in (("model_type", "llama"), ("scoring_func", "softmax"), ("moe_layer_freq", 2)):
        with pytest.raises(XushiError, match=key) as error:
            ModelConfig.from_published(ModelConfig().to_published() | {key: value}, "there/config.json")
        assert "there/config.json" in error.value.problem


def test_a_v2_must_say_its_shapes() -> None:
    """transformers' defaults for V2 are no released model's, so none are taken."""
    table = ModelConfig(**V2, norm_topk_prob=False, num_nextn_predict_layers=0).to_published()
    for key in ("hidden_size", "n_routed_experts", "first_k_dense_replace", "q_lora_rank"):
        with pytest.raises(XushiError, match=key):
            ModelConfig.from_published({name: value for name, value in table.items() if name != key}, "here")
    # V2-Lite's file says "n_group": 1; others leave the group keys out or null.
    unsaid = {name: value for name, value in table.items() if name not in ("n_group", "topk_group", "topk_method")}
    assert ModelConfig.from_published(unsaid | {"n_group": None}, "here").n_group == 1
