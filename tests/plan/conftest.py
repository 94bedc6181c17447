"""Small configs of every model_type, with every part active."""

from collections.abc import Callable

import pytest

from xushi.model import ModelConfig


@pytest.fixture(scope="session")
def small_of() -> Callable[..., ModelConfig]:
    """A small config of a model_type; keywords replace fields."""

    def make(kind: str, **changes: object) -> ModelConfig:
        fields: dict[str, object] = {
            "model_type": kind,
            "vocab_size": 256,
            "hidden_size": 64,
            "moe_intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "q_lora_rank": 32,
            "qk_rope_head_dim": 8,
        }
        if kind == "deepseek_v4":
            fields |= {
                "head_dim": 24,
                "o_groups": 2,
                "o_lora_rank": 12,
                "sliding_window": 10,
                "compress_rate_csa": 4,
                "compress_rate_hca": 16,
                "compress_ratios": [0, 4, 16, 4],
                "index_topk": 3,
                "index_n_heads": 2,
                "index_head_dim": 12,
                "hc_mult": 3,
                "num_hash_layers": 1,
            }
        else:
            fields |= {
                "intermediate_size": 160,
                "n_group": 2,
                "topk_group": 1,
                "first_k_dense_replace": 1,
                "kv_lora_rank": 24,
                "qk_nope_head_dim": 16,
                "v_head_dim": 20,
            }
        if kind == "deepseek_v32":
            fields |= {"index_topk": 11, "index_n_heads": 2, "index_head_dim": 12}
        if kind == "deepseek_v2":
            fields |= {
                "topk_method": "group_limited_greedy",
                "norm_topk_prob": False,
                "num_nextn_predict_layers": 0,
            }
        return ModelConfig(**fields | changes)

    return make
