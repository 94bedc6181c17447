"""Counting against transformers' own model on the meta device, and against DeepSeek's published totals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from xushi.model.config import ModelConfig
from xushi.plan import count_parameters
from xushi.plan.parameters import mtp_layer_parameters


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    def size(low: int = 1, high: int = 24) -> int:
        return draw(st.integers(low, high))

    groups, layers = size(1, 3), size(1, 4)
    experts = groups * size(2, 4)
    chosen_groups = size(1, groups)
    return ModelConfig(
        vocab_size=size(8, 64), hidden_size=size(), intermediate_size=size(), moe_intermediate_size=size(),
        num_hidden_layers=layers, num_attention_heads=size(1, 4), n_shared_experts=size(1, 3),
        n_routed_experts=experts, n_group=groups, topk_group=chosen_groups,
        num_experts_per_tok=size(1, chosen_groups * experts // groups), first_k_dense_replace=size(0, layers + 1),
        q_lora_rank=draw(st.none() | st.integers(1, 24)), kv_lora_rank=size(), qk_nope_head_dim=size(),
        qk_rope_head_dim=2 * size(1, 8), v_head_dim=size(), attention_bias=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()), num_nextn_predict_layers=size(0, 2))


def oracle(config: ModelConfig) -> DeepseekV3ForCausalLM:
    table = config.to_published()
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**table))
    model.tie_weights()
    return model


def size_of(model: DeepseekV3ForCausalLM, *words: str) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if any(word in name for word in words))


@settings(max_examples=25)
@given(configs())
def test_counts_equal_transformers(config):
    count, model = count_parameters(config), oracle(config)
    assert count.total == sum(parameter.numel() for parameter in model.parameters())
    assert count.attention == size_of(model, ".self_attn.")
    assert count.routed_experts == size_of(model, ".mlp.experts.")
    assert count.shared_experts == size_of(model, ".shared_experts.")
    assert count.routers == size_of(model, ".mlp.gate.weight")
    assert count.embedding == size_of(model, "embed_tokens")
    assert count.head == (0 if config.tie_word_embeddings else size_of(model, "lm_head"))
    assert count.norms == size_of(model, "input_layernorm", "post_attention_layernorm", "model.norm.")
    assert count.dense_mlp == count.total - sum([count.attention, count.routed_experts, count.shared_experts,
                                                 count.routers, count.embedding, count.head, count.norms])


@given(configs())
def test_active_parameters(config):
    count = count_parameters(config)
    assert 0 < count.active_without_embedding <= count.active <= count.total <= count.total_with_mtp
    everything = config.model_copy(update={"num_experts_per_tok": config.n_routed_experts})
    assert count_parameters(everything).active == count.total
    # A token of a model with k experts in each layer passes through as much as there is where k is all there are.
    k = config.num_experts_per_tok
    if k > 1:
        lone = config.model_copy(update={"n_routed_experts": k, "n_group": 1, "topk_group": 1})
        assert count_parameters(lone).total - count_parameters(lone).routers == count.active - count.routers


@given(configs())
def test_mtp_layer_is_a_decoder_layer_with_its_joints(config):
    deeper = config.model_copy(update={"num_hidden_layers": config.num_hidden_layers + 1})
    decoder = count_parameters(deeper).total - count_parameters(config).total
    joints = config.hidden_size * 2 * config.hidden_size + 3 * config.hidden_size
    assert mtp_layer_parameters(config, config.num_hidden_layers) == decoder + joints


@settings(max_examples=10)
@given(configs())
def test_counts_equal_our_own_model(config):
    from xushi.model.deepseek import Deepseek

    with torch.device("meta"):
        model = Deepseek(config)
    assert count_parameters(config).total_with_mtp == sum(parameter.numel() for parameter in model.parameters())


def test_published_totals_of_v3():
    count = count_parameters(ModelConfig())
    assert count.total == pytest.approx(671.026e9, rel=1e-6)
    assert count.active == pytest.approx(37.55e9, rel=1e-4)
    assert count.active_without_embedding == pytest.approx(36.63e9, rel=2e-4)
    # The published files repeat embedding and head beside the MTP layer: 685B on the hub's page.
    assert count.total_with_mtp + 2 * count.embedding == pytest.approx(684.5e9, rel=1e-4)


def test_published_total_of_v3_is_transformers_own():
    assert count_parameters(ModelConfig()).total == sum(p.numel() for p in oracle(ModelConfig()).parameters())


def test_a_tied_head_is_counted_once_and_stays_active():
    tied = count_parameters(ModelConfig(tie_word_embeddings=True))
    untied = count_parameters(ModelConfig())
    assert tied.total == untied.total - untied.embedding
    assert tied.active_without_embedding == tied.active == untied.active_without_embedding
