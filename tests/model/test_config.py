"""The config against transformers' classes, in both directions."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import DeepseekV2Config, DeepseekV3Config, DeepseekV4Config, DeepseekV32Config

from xushi.base.errors import BadInput, XushiError
from xushi.model import ModelConfig, RopeScaling, from_published, preset, to_published
from xushi.model.config_keys import unread_keys, without_aliases
from xushi.model.layers import MLP
from xushi.model.moe import MixtureOfExperts
from xushi.model.rope_fields import rope_fields

THEIRS = {
    "deepseek_v2": DeepseekV2Config,
    "deepseek_v3": DeepseekV3Config,
    "deepseek_v32": DeepseekV32Config,
    "deepseek_v4": DeepseekV4Config,
}
V2 = {"model_type": "deepseek_v2", "topk_method": "greedy"}
V4 = {
    "model_type": "deepseek_v4",
    "num_hidden_layers": 2,
    "compress_ratios": [0, 4, 128],
    "num_hash_layers": 1,
}


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    kind = draw(st.sampled_from(list(THEIRS)))
    groups, size = (
        (1, draw(st.integers(2, 9)))
        if kind == "deepseek_v4"
        else (draw(st.integers(1, 4)), draw(st.integers(2, 5)))
    )
    top_groups = draw(st.integers(1, groups))
    scaling = draw(
        st.none()
        | st.builds(
            RopeScaling,
            factor=st.floats(1, 64),
            original_max_position_embeddings=st.integers(16, 4096),
            beta_fast=st.floats(2, 64),
            beta_slow=st.floats(0.5, 1),
            **(
                {}
                if kind == "deepseek_v4"
                else {"mscale": st.floats(0, 2), "mscale_all_dim": st.floats(0, 2)}
            ),
        )
    )
    fields: dict[str, object] = {"num_nextn_predict_layers": draw(st.integers(0, 3))}
    latent = st.integers(1, 99)
    if kind == "deepseek_v2":
        fields = {
            "norm_topk_prob": False,
            "topk_method": draw(st.sampled_from(["greedy", "group_limited_greedy"])),
        }
    if kind == "deepseek_v3":
        fields |= {"rope_interleave": draw(st.booleans())}
    if kind == "deepseek_v32":
        fields |= {"index_topk": draw(st.integers(1, 99)), "index_n_heads": draw(st.integers(1, 9))}
    if kind == "deepseek_v4":
        layers, csa = draw(st.integers(1, 9)), draw(st.integers(1, 9))
        hca = draw(st.integers(10, 99))
        fields |= {
            "num_hidden_layers": layers,
            "compress_rate_csa": csa,
            "compress_rate_hca": hca,
            "compress_ratios": draw(
                st.lists(st.sampled_from([0, csa, hca]), min_size=layers, max_size=layers)
            )
            # transformers writes no entries for MTP layers
            + [0] * fields["num_nextn_predict_layers"],
            "num_hash_layers": draw(st.integers(0, layers)),
            "swiglu_limit": draw(st.floats(0.1, 20)),
            "hc_mult": draw(st.integers(1, 5)),
            "compress_rope_theta": draw(st.floats(10, 1e7)),
        }
    elif kind != "deepseek_v32":
        latent = st.none() | latent
    if kind != "deepseek_v4":
        fields |= {"n_group": groups, "topk_group": top_groups}
    return ModelConfig(
        model_type=kind,
        **fields,
        vocab_size=draw(st.integers(1, 10**6)),
        n_routed_experts=groups * size,
        num_experts_per_tok=draw(st.integers(1, top_groups * size)),
        q_lora_rank=draw(latent),
        rope_scaling=scaling,
        rope_theta=draw(st.floats(10, 1e7)),
        tie_word_embeddings=draw(st.booleans()),
        bos_token_id=draw(st.none() | st.integers(0, 9)),
        pad_token_id=draw(st.none() | st.integers(0, 9)),
    )


@given(configs())
def test_published_and_back(config: ModelConfig) -> None:
    assert from_published(json.loads(json.dumps(to_published(config))), "here") == config
    assert ModelConfig(**config.model_dump()) == config


@given(configs())
def test_transformers_reads_the_same(config: ModelConfig) -> None:
    """Into transformers' config class and back from what it writes, in transformers 5's keys."""
    theirs = THEIRS[config.model_type](**to_published(config))
    ours_alone = (
        "rope_scaling",
        "rope_theta",
        "num_nextn_predict_layers",
        "compress_ratios",
        "compress_rate_csa",
        "compress_rate_hca",
        "num_hash_layers",
    )
    for name in config.model_dump():
        if name not in ours_alone:
            assert getattr(theirs, name) == getattr(config, name), name
    written = json.loads(theirs.to_json_string(use_diff=False))
    if config.model_type == "deepseek_v4":
        assert theirs.rope_parameters["main"]["rope_theta"] == config.rope_theta
        assert theirs.rope_parameters["compress"]["rope_theta"] == config.compress_rope_theta
        assert theirs.mlp_layer_types.count("hash_moe") == config.num_hash_layers
        # So what is read back is transformers' own form.
        assert "compress_ratios" not in written
    else:
        assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    if config.model_type == "deepseek_v3":
        assert theirs.num_mtp_layers == config.num_nextn_predict_layers
    if config.model_type == "deepseek_v32":  # whose class does not know MTP, and keeps the key
        assert theirs.num_nextn_predict_layers == config.num_nextn_predict_layers
    assert from_published(written, "here") == config


def test_the_defaults_are_the_published_models() -> None:
    """DeepSeek-V3's config.json, in the fields where transformers' defaults are equal to it."""
    ours, theirs = ModelConfig(), DeepseekV3Config()
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "moe_intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "n_shared_experts",
        "n_routed_experts",
        "num_experts_per_tok",
        "n_group",
        "topk_group",
        "norm_topk_prob",
        "routed_scaling_factor",
        "first_k_dense_replace",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "rms_norm_eps",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name


def test_a_query_latent_of_zero_is_none() -> None:
    assert ModelConfig(q_lora_rank=0).q_lora_rank is None


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"hidden_size": 0}, "hidden_size"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace"),
        ({"qk_rope_head_dim": 3}, "even"),
        ({"n_group": 7}, "n_group=7"),
        ({"n_group": 256}, "at least 2"),
        ({"topk_group": 9}, "topk_group=9"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok=129"),
        ({"topk_method": "greedy"}, "noaux_tc"),
        ({"model_type": "deepseek_v2"}, "noaux_tc"),
        (V2, "norm_topk_prob"),
        (V2 | {"norm_topk_prob": False, "num_nextn_predict_layers": 2}, "num_nextn"),
        ({"model_type": "deepseek_v5"}, "model_type"),
        ({"model_type": "deepseek_v4"}, "compress_ratios"),
        (
            V2 | {"norm_topk_prob": False, "num_nextn_predict_layers": 0, "rope_interleave": False},
            "rope_interleave",
        ),
        ({"kv_lora_rank": 8} | V4, "no kv_lora_rank"),
        ({"n_group": 2} | V4, "n_group=1"),
        ({"index_topk": 8}, "deepseek_v3 has no index_topk"),
        ({"hc_mult": 2}, "no hc_mult"),
        (V4 | {"compress_ratios": [0, 4, 64]}, "contains 64"),
        (V4 | {"compress_ratios": [0, 4]}, "with 3 entries"),
        (V4 | {"compress_rate_csa": 128}, "must differ, and both are 128"),
        (V4 | {"num_hash_layers": 3}, "num_hash_layers=3"),
        (V4 | {"o_groups": 7}, "o_groups=7"),
        (V4 | {"head_dim": 32}, "head_dim=32"),
        (V4 | {"q_lora_rank": 0}, "needs q_lora"),
        ({"model_type": "deepseek_v32", "q_lora_rank": 0}, "needs q_lora_rank"),
        ({"model_type": "deepseek_v32", "index_head_dim": 32}, "index_head_dim=32"),
        (V4 | {"swiglu_limit": 0.0}, "swiglu_limit"),
        ({"rope_theta": 0.0}, "rope_theta"),
        ({"hiden_size": 8}, "hiden_size"),
        ({"hidden_size": "8"}, "hidden_size"),
        ({"norm_topk_prob": 1}, "norm_topk_prob"),
    ],
)
def test_inconsistent_values_are_refused(changes: dict, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ModelConfig(**changes)


def test_one_expert_is_a_dense_layer() -> None:
    """A mixture with a single expert equals a dense layer."""
    config = ModelConfig(
        hidden_size=16,
        moe_intermediate_size=24,
        n_routed_experts=1,
        num_experts_per_tok=1,
        n_group=1,
        topk_group=1,
        n_shared_experts=0,
        routed_scaling_factor=1.0,
    )
    generator = torch.Generator().manual_seed(0)
    mixture, dense = MixtureOfExperts(config, hashed=False), MLP(16, 24)
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.normal_(generator=generator)
        gate, up = mixture.experts.gate_up_proj[0].split(24)
        dense.gate_proj.weight.copy_(gate)
        dense.up_proj.weight.copy_(up)
        dense.down_proj.weight.copy_(mixture.experts.down_proj[0])
        x = torch.randn(50, 16, generator=generator)
        torch.testing.assert_close(mixture(x, None)[0], dense(x), rtol=1e-5, atol=1e-4)


def test_a_value_that_is_not_implemented_is_refused_by_key() -> None:
    for key, value in (("model_type", "llama"), ("scoring_func", "softmax"), ("moe_layer_freq", 2)):
        with pytest.raises(XushiError, match=key) as error:
            from_published(to_published(ModelConfig()) | {key: value}, "there/config.json")
        assert "there/config.json" in error.value.problem


def test_a_v2_must_say_its_shapes() -> None:
    """transformers' defaults for V2 are those of no released model, so no defaults are used."""
    table = to_published(ModelConfig(**V2, norm_topk_prob=False, num_nextn_predict_layers=0))
    for key in ("hidden_size", "n_routed_experts", "first_k_dense_replace", "q_lora_rank"):
        with pytest.raises(XushiError, match=key):
            from_published({name: value for name, value in table.items() if name != key}, "here")
    # V2-Lite's file has "n_group": 1; other files omit the group keys or set them to null.
    unsaid = {
        name: value
        for name, value in table.items()
        if name not in ("n_group", "topk_group", "topk_method")
    }
    assert from_published(unsaid | {"n_group": None}, "here").n_group == 1


def test_a_v4_must_say_its_schedule() -> None:
    """transformers' default schedule is that of no released model: 29 CSA and 32 HCA layers for
    V4-Pro.
    """
    table = to_published(preset("deepseek-v4-pro"))
    unsaid = {
        key: value for key, value in table.items() if key not in ("compress_ratios", "layer_types")
    }
    with pytest.raises(XushiError, match="compress_ratios"):
        from_published(unsaid, "here")
    ratios = from_published(table, "here").compress_ratios
    assert (ratios.count(4), ratios.count(128), ratios.count(0)) == (30, 31, 1)
    theirs = DeepseekV4Config(**{k: v for k, v in unsaid.items() if k != "compress_rates"})
    assert theirs.layer_types.count("compressed_sparse_attention") == 29


def test_a_v4s_schedule_may_be_longer_than_its_layers() -> None:
    """Released files also have entries for draft models."""
    table = to_published(preset("deepseek-v4-flash"))
    longer = table | {"compress_ratios": [*table["compress_ratios"], 0, 0]}
    shorter = table | {"compress_ratios": table["compress_ratios"][:43]}
    for changed in (longer, shorter):
        assert from_published(changed, "here") == preset("deepseek-v4-flash")


def test_v4_scales_frequencies_alone() -> None:
    """YaRN's temperature would be 1.277 at factor 16. V4 has none, and a file with another is
    refused.
    """
    model = preset("deepseek-v4-flash")
    table = to_published(model)
    assert "mscale" not in table["rope_scaling"] and "mscale_all_dim" not in table["rope_scaling"]
    theirs = DeepseekV4Config(**table)
    assert theirs.rope_parameters["compress"]["attention_factor"] == 1.0
    with pytest.raises(XushiError, match="attention_factor"):
        from_published(
            table | {"rope_scaling": table["rope_scaling"] | {"attention_factor": 1.277}}, "here"
        )


def test_fields_that_do_not_apply_are_not_written() -> None:
    """So a recipe's hash does not change when another model_type gets a field."""
    assert not {"hc_mult", "index_topk"} & set(ModelConfig().model_dump())
    assert not {"kv_lora_rank", "n_group"} & set(preset("deepseek-v4-flash").model_dump())


@pytest.mark.parametrize(
    "changes",
    [
        {"num_nextn_predict_layers": 10**12},
        {"compress_rates": [4, 128]},
        {"compress_ratios": None, "layer_types": [[0]]},
        {"qk_rope_head_dim": None},
        {"head_dim": None},
        {"partial_rotary_factor": float("nan")},
        {"compress_ratios": "0"},
        {"num_hidden_layers": None},
        {"rope_parameters": {"main": {}, "compress": {}}},
        {"mlp_layer_types": [1]},
        {"rope_scaling": {"type": "yarn", "factor": "16"}},
    ],
)
def test_a_damaged_v4_config_is_reported(changes: dict) -> None:
    table = to_published(preset("deepseek-v4-flash")) | changes
    if "partial_rotary_factor" in changes:
        del table["qk_rope_head_dim"]
    with pytest.raises(XushiError) as error:
        from_published(table, "there/config.json")
    assert "there/config.json" in error.value.problem and "\n" not in error.value.problem


def test_null_is_no_value_of_another_name() -> None:
    table = to_published(ModelConfig(n_routed_experts=64))
    for nulls in ({"num_experts": None}, {"num_local_experts": None, "num_experts": 64}):
        assert from_published(table | nulls, "here").n_routed_experts == 64
    renamed = table | {"n_routed_experts": None, "num_experts": 64}
    assert from_published(renamed, "here").n_routed_experts == 64
    rope = {"rope_theta": 5000.0, "rope_scaling": None}
    rope["rope_parameters"] = {"rope_theta": None, "rope_type": "default"}
    assert from_published(table | rope, "here").rope_theta == 5000.0


def test_dense_layers_against_a_default_are_said_to_be_so() -> None:
    table = to_published(ModelConfig(num_hidden_layers=4))
    del table["first_k_dense_replace"]
    with pytest.raises(BadInput, match="is 3, its default") as caught:
        from_published(table | {"mlp_layer_types": ["dense"] * 2 + ["sparse"] * 2}, "here")
    assert "add first_k_dense_replace: 2" in caught.value.remedy


def test_keys_of_ropes_tables_that_nothing_reads_are_named() -> None:
    """Those of each of V4's two rotations, too."""
    rope = {
        "main": {"rope_type": "default", "odd": 1},
        "compress": {"rope_theta": 7.0, "ntk": 2},
        "other": 3,
    }
    table = to_published(preset("deepseek-v4-flash")) | {"rope_parameters": rope}
    assert unread_keys(table, "deepseek_v4") == [
        "rope_parameters.other",
        "rope_parameters.main.odd",
        "rope_parameters.compress.ntk",
    ]


def test_a_share_of_rotated_values_is_refused_in_ropes_table_too() -> None:
    for table in ("rope_scaling", "rope_parameters"):
        with pytest.raises(XushiError, match=rf"here: {table}\.partial_rotary_factor is 0\.5"):
            rope_fields({table: {"partial_rotary_factor": 0.5}}, "deepseek_v3", "here")


def test_two_other_names_of_a_field_must_agree() -> None:
    table = {"num_experts": 4, "num_local_experts": 4}
    assert without_aliases(table, "deepseek_v3", "here") == {"n_routed_experts": 4}
    with pytest.raises(XushiError, match="num_local_experts is 5, but num_experts, which means"):
        without_aliases(table | {"num_local_experts": 5}, "deepseek_v3", "here")
