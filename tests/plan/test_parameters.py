"""Counts against transformers' classes and our own model on the meta device, and against DeepSeek's
published totals.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from xushi.model import Deepseek, ModelConfig, preset, to_published
from xushi.plan import count_parameters
from xushi.plan.parameters import PARTS, mtp_layer_parameters

KINDS = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4")


@st.composite
def configs(draw: st.DrawFn, kinds: tuple[str, ...] = KINDS) -> ModelConfig:
    kind = draw(st.sampled_from(kinds))

    def size(low: int = 1, high: int = 24) -> int:
        return draw(st.integers(low, high))

    layers, heads, depths = size(1, 4), size(1, 4), size(0, 2)
    fields = {
        "model_type": kind,
        "vocab_size": size(8, 64),
        "moe_intermediate_size": size(),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_size": size(),
        "qk_rope_head_dim": 2 * size(1, 8),
        "tie_word_embeddings": draw(st.booleans()),
        "q_lora_rank": size(),
        "num_nextn_predict_layers": depths,
    }
    if kind in ("deepseek_v32", "deepseek_v4"):
        fields |= {
            "index_n_heads": size(1, 3),
            "index_head_dim": fields["qk_rope_head_dim"] + size(0, 9),
        }
    if kind == "deepseek_v4":
        return ModelConfig(
            **fields | draw(fields_of_v4(layers, heads, depths, fields["qk_rope_head_dim"]))
        )
    groups = size(1, 3)
    experts = groups * size(2, 4)
    chosen_groups = size(1, groups)
    fields |= {
        "intermediate_size": size(),
        "n_shared_experts": size(1, 3),
        "n_routed_experts": experts,
        "n_group": groups,
        "topk_group": chosen_groups,
        "num_experts_per_tok": size(1, chosen_groups * experts // groups),
        "first_k_dense_replace": size(0, layers + 1),
        "kv_lora_rank": size(),
        "qk_nope_head_dim": size(),
        "v_head_dim": size(),
        "attention_bias": draw(st.booleans()),
    }
    if kind != "deepseek_v32":
        fields |= {"q_lora_rank": draw(st.none() | st.integers(1, 24))}
    if (
        kind == "deepseek_v2"
    ):  # transformers asks that its heads divide the hidden size, which nothing in it needs
        fields |= {
            "topk_method": "group_limited_greedy",
            "norm_topk_prob": False,
            "num_nextn_predict_layers": 0,
            "hidden_size": heads * size(),
        }
    return ModelConfig(**fields)


@st.composite
def fields_of_v4(
    draw: st.DrawFn, layers: int, heads: int, depths: int, rotated: int
) -> dict[str, object]:
    csa, hca = draw(st.sampled_from([(4, 128), (2, 3), (3, 1)]))
    groups = draw(st.sampled_from([g for g in range(1, heads + 1) if heads % g == 0]))
    experts = draw(st.integers(2, 9))
    return {
        "n_routed_experts": experts,
        "num_experts_per_tok": draw(st.integers(1, experts)),
        "o_groups": groups,
        "o_lora_rank": draw(st.integers(1, 9)),
        "head_dim": rotated + draw(st.integers(0, 9)),
        "compress_rate_csa": csa,
        "compress_rate_hca": hca,
        "hc_mult": draw(st.integers(1, 4)),
        "num_hash_layers": draw(st.integers(0, layers)),
        "compress_ratios": draw(
            st.lists(
                st.sampled_from([0, csa, hca]), min_size=layers + depths, max_size=layers + depths
            )
        ),
    }


def oracle(config: ModelConfig) -> nn.Module:
    table = {
        k: v for k, v in to_published(config).items() if k not in ("architectures", "torch_dtype")
    }
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**table))
    model.tie_weights()
    return model


def size_of(model: nn.Module, *words: str, without: tuple[str, ...] = ()) -> int:
    return sum(
        p.numel()
        for name, p in model.named_parameters()
        if any(word in name for word in words) and not any(word in name for word in without)
    )


@settings(max_examples=60)
@given(configs())
def test_counts_equal_transformers(config):
    count, model = count_parameters(config), oracle(config)
    assert count.total == sum(parameter.numel() for parameter in model.parameters())
    assert count.indexers == size_of(model, ".indexer.")
    assert count.compressors == size_of(model, ".compressor.", without=(".indexer.",))
    assert count.attention == size_of(model, ".self_attn.", without=(".indexer.", ".compressor."))
    assert count.hyper_connections == size_of(model, ".attn_hc.", ".ffn_hc.", "hc_head.")
    assert count.routed_experts == size_of(model, ".mlp.experts.")
    assert count.shared_experts == size_of(model, ".shared_experts.")
    assert count.routers == size_of(model, ".mlp.gate.weight")
    assert count.embedding == size_of(model, "embed_tokens")
    assert count.head == (0 if config.tie_word_embeddings else size_of(model, "lm_head"))
    assert count.norms == size_of(
        model, "input_layernorm", "post_attention_layernorm", "model.norm."
    )
    assert count.dense_mlp == count.total - sum(
        getattr(count, part) for part in PARTS if part != "dense_mlp"
    )


@given(configs())
def test_active_parameters(config):
    count = count_parameters(config)
    assert 0 < count.active_without_embedding <= count.active <= count.total <= count.total_with_mtp
    everything = config.model_copy(update={"num_experts_per_tok": config.n_routed_experts})
    assert count_parameters(everything).active == count.total
    # The active parameters of a model that chooses k experts equal the total of a model that has
    # only k experts.
    k = config.num_experts_per_tok
    if k > 1:
        lone = config.model_copy(update={"n_routed_experts": k, "n_group": 1, "topk_group": 1})
        assert (
            count_parameters(lone).total - count_parameters(lone).routers
            == count.active - count.routers
        )


@given(configs())
def test_mtp_layer_is_a_decoder_layer_with_its_joints(config):
    config = config.model_copy(update={"compress_ratios": [*(config.compress_ratios or []), 0]})
    deeper = config.model_copy(update={"num_hidden_layers": config.num_hidden_layers + 1})
    decoder = count_parameters(deeper).total - count_parameters(config).total
    joints = config.hidden_size * 2 * config.hidden_size + 3 * config.hidden_size
    if config.is_v4:
        joints += config.hc_mult * (config.hc_mult * config.hidden_size + 1) + 1
    assert mtp_layer_parameters(config, config.num_hidden_layers) == decoder + joints


@settings(max_examples=40)
@given(configs())
def test_counts_equal_our_own_model(config):
    with torch.device("meta"):
        model = Deepseek(config)
    count, extra = count_parameters(config), config.num_nextn_predict_layers
    assert count.total_with_mtp == sum(parameter.numel() for parameter in model.parameters())
    assert count.mtp == size_of(
        model, *(f".layers.{config.num_hidden_layers + depth}." for depth in range(extra))
    )


def test_published_totals_of_v3():
    count = count_parameters(ModelConfig())
    assert count.total == pytest.approx(671.026e9, rel=1e-6)
    assert count.active == pytest.approx(37.55e9, rel=1e-4)
    assert count.active_without_embedding == pytest.approx(36.63e9, rel=2e-4)
    # The published files repeat embedding and head beside the MTP layer: 685B on the hub's page.
    assert count.total_with_mtp + 2 * count.embedding == pytest.approx(684.5e9, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "active", "published"),
    [("deepseek-v4-flash", 13.800, 13), ("deepseek-v4-pro", 49.779, 49)],
)
def test_v4s_published_active_parameters_leave_out_the_embedding(name, active, published):
    count = count_parameters(preset(name))
    assert round(count.active / 1e9, 3) == active
    assert round(count.active_without_embedding / 1e9) == published != round(count.active / 1e9)


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v3.2", "deepseek-v4-flash"])
def test_published_totals_are_transformers_own(name):
    assert count_parameters(preset(name)).total == sum(
        p.numel() for p in oracle(preset(name)).parameters()
    )


def test_a_tied_head_is_counted_once_and_stays_active():
    tied = count_parameters(ModelConfig(tie_word_embeddings=True))
    untied = count_parameters(ModelConfig())
    assert tied.total == untied.total - untied.embedding
    assert tied.active_without_embedding == tied.active == untied.active_without_embedding
