"""FLOPs against PyTorch's own counter on our model, and the published figures of DeepSeek-V3."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from xushi.model.cache import LatentCache
from xushi.model.config import ModelConfig
from xushi.model.deepseek import Deepseek
from xushi.plan import decode_flops_per_token, kv_cache_bytes_per_token, train_flops_per_token

SMALL = ModelConfig(
    vocab_size=96, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3,
    num_attention_heads=4, n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1,
    first_k_dense_replace=1, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10)


def test_published_figures_of_v3():
    config = ModelConfig()
    assert kv_cache_bytes_per_token(config) == 70_272
    assert train_flops_per_token(config, 4096, mtp=False) == pytest.approx(250.45e9, rel=1e-4)
    assert train_flops_per_token(config, 4096, mtp=True) == pytest.approx(260.64e9, rel=1e-4)


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"n_shared_experts": 2}, {"tie_word_embeddings": True}])
def test_forward_flops_equal_those_that_pytorch_counts(changes, monkeypatch):
    # The reference forms multiply every score, also those that the causal mask then hides: twice the causal count.
    monkeypatch.setenv("XUSHI_OPS", "reference")
    config, length = SMALL.model_copy(update=changes), 64
    model = Deepseek(config).initialise(0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(length)[None])
    assert counter.get_total_flops() / length == train_flops_per_token(config, 2 * length, mtp=False) / 3


def test_mtp_adds_a_layer_a_joint_and_a_head():
    deeper = SMALL.model_copy(update={"num_hidden_layers": SMALL.num_hidden_layers + 1})
    joint = 6 * (2 * SMALL.hidden_size**2 + SMALL.vocab_size * SMALL.hidden_size)
    assert train_flops_per_token(SMALL, 128) == train_flops_per_token(deeper, 128, mtp=False) + joint
    none = SMALL.model_copy(update={"num_nextn_predict_layers": 0})
    assert train_flops_per_token(none, 128) == train_flops_per_token(SMALL, 128, mtp=False)


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"n_shared_experts": 2}])
def test_decode_flops_equal_those_that_pytorch_counts(changes, monkeypatch):
    monkeypatch.setenv("XUSHI_OPS", "reference")
    config, context = SMALL.model_copy(update=changes), 20
    model, cache = Deepseek(config).initialise(0), LatentCache(config, 32)
    sequence = cache.allocate()
    model.decode(cache.extend([(sequence, list(range(context - 1)))]), cache)
    flat = cache.extend([(sequence, [7])])
    with FlopCounterMode(display=False) as counter:
        model.decode(flat, cache)
    assert counter.get_total_flops() == decode_flops_per_token(config, context)


def test_cache_bytes_equal_what_the_cache_holds():
    cache = LatentCache(SMALL, slots=10, dtype=torch.bfloat16)
    assert sum(layer.nbytes for layer in cache.layers) == 10 * kv_cache_bytes_per_token(SMALL)
    assert kv_cache_bytes_per_token(SMALL, 4) == 2 * kv_cache_bytes_per_token(SMALL)
