"""Random configs of every model_type, and random tokens, for the tests against transformers and of
decoding.
"""

import torch
from hypothesis import strategies as st
from torch import Tensor

from xushi.model import ModelConfig, RopeScaling

# The design's bounds for float32: logits max|d| / max|ref|, gradients |d| <= 1e-5 (|g| + 1e-3 |g of
# the whole model|).
TOLERANCE = 1e-5
EPS = st.sampled_from([1e-6, 1e-2])  # some norms have the config's and some a fixed one
KINDS = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4")


@st.composite
def configs(draw: st.DrawFn, kind: str) -> ModelConfig:
    """Every flag that the published configs use, with sizes that are no multiples of a block."""
    return draw(configs_of_v4() if kind == "deepseek_v4" else configs_with_latents(kind))


@st.composite
def configs_with_latents(draw: st.DrawFn, kind: str) -> ModelConfig:
    second, sparse = kind == "deepseek_v2", kind == "deepseek_v32"
    method = draw(st.sampled_from(["greedy", "group_limited_greedy"] if second else ["noaux_tc"]))
    groups = 1 if method == "greedy" else draw(st.sampled_from([1, 2, 4]))
    per_group = draw(st.sampled_from([1, 2, 4] if second and groups > 1 else [2, 3, 4]))
    top_groups = draw(st.integers(1, groups))
    layers = draw(st.integers(1, 3))
    scaling = draw(
        st.sampled_from(
            [
                None,
                RopeScaling(
                    factor=4.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=1.0
                ),
                RopeScaling(
                    factor=40.0,
                    original_max_position_embeddings=64,
                    mscale=0.707,
                    mscale_all_dim=0.5,
                    beta_fast=8.0,
                ),
                RopeScaling(factor=2.0, original_max_position_embeddings=32, mscale=0.0),
            ]
        )
    )
    rotated = draw(st.sampled_from([2, 4, 8]))
    fields = {}
    if sparse:
        fields = {
            "index_topk": draw(st.sampled_from([1, 5, 20, 1000])),
            "index_n_heads": draw(st.integers(1, 3)),
            "index_head_dim": rotated + draw(st.sampled_from([0, 2, 7])),
        }
    return ModelConfig(
        model_type=kind,
        topk_method=method,
        **fields,
        # transformers requires of V2 that the heads divide the hidden size, although nothing needs
        # it.
        vocab_size=draw(st.integers(17, 67)),
        hidden_size=draw(st.sampled_from([24, 48] if second else [16, 24, 40])),
        intermediate_size=draw(st.sampled_from([8, 33])),
        moe_intermediate_size=draw(st.sampled_from([8, 11])),
        num_hidden_layers=layers,
        num_attention_heads=draw(st.sampled_from([1, 2, 3])),
        n_shared_experts=draw(st.integers(0, 2)),
        n_routed_experts=groups * per_group,
        num_experts_per_tok=draw(st.integers(1, top_groups * per_group)),
        n_group=groups,
        topk_group=top_groups,
        norm_topk_prob=not second and draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        first_k_dense_replace=draw(st.integers(0, layers)),
        q_lora_rank=draw(st.sampled_from([6, 16] if sparse else [None, 6, 16])),
        kv_lora_rank=draw(st.sampled_from([8, 20])),
        qk_nope_head_dim=draw(st.sampled_from([4, 8])),
        qk_rope_head_dim=rotated,
        v_head_dim=draw(st.sampled_from([4, 8, 20])),
        attention_bias=draw(st.booleans()),
        max_position_embeddings=64,
        rope_theta=draw(st.sampled_from([10000.0, 500.0])),
        rope_scaling=scaling,
        rope_interleave=second or sparse or draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        num_nextn_predict_layers=0 if second else draw(st.integers(0, 2)),
        rms_norm_eps=draw(EPS),
        initializer_range=0.2,
    )


@st.composite
def configs_of_v4(draw: st.DrawFn) -> ModelConfig:
    layers, groups, mtp = (
        draw(st.integers(1, 3)),
        draw(st.sampled_from([1, 2])),
        draw(st.integers(0, 2)),
    )
    csa, hca = draw(st.sampled_from([(2, 3), (3, 5), (4, 16), (3, 1)]))
    rotated, experts = draw(st.sampled_from([2, 4, 8])), draw(st.integers(2, 8))
    return ModelConfig(
        model_type="deepseek_v4",
        vocab_size=draw(st.integers(17, 67)),
        hidden_size=draw(st.sampled_from([16, 24, 40])),
        moe_intermediate_size=draw(st.sampled_from([8, 11])),
        num_hidden_layers=layers,
        num_attention_heads=groups * draw(st.integers(1, 2)),
        n_routed_experts=experts,
        num_experts_per_tok=draw(st.integers(1, experts)),
        routed_scaling_factor=draw(st.sampled_from([1.0, 1.5])),
        q_lora_rank=draw(st.sampled_from([6, 16])),
        qk_rope_head_dim=rotated,
        head_dim=rotated + draw(st.sampled_from([0, 3, 8])),
        o_groups=groups,
        o_lora_rank=draw(st.sampled_from([3, 8])),
        sliding_window=draw(st.sampled_from([1, 4, 7, 200])),
        compress_rate_csa=csa,
        compress_rate_hca=hca,
        num_nextn_predict_layers=mtp,
        rms_norm_eps=draw(EPS),
        compress_ratios=draw(
            st.lists(st.sampled_from([0, csa, hca]), min_size=layers + mtp, max_size=layers + mtp)
        ),
        index_topk=draw(st.sampled_from([1, 5, 1000])),
        index_n_heads=draw(st.integers(1, 3)),
        index_head_dim=rotated + draw(st.sampled_from([0, 4])),
        hc_mult=draw(st.integers(1, 4)),
        hc_sinkhorn_iters=draw(st.sampled_from([1, 2, 20])),
        hc_eps=draw(st.sampled_from([1e-6, 1e-3])),
        num_hash_layers=draw(st.integers(0, layers)),
        swiglu_limit=draw(st.sampled_from([0.3, 10.0])),
        max_position_embeddings=64,
        rope_theta=draw(st.sampled_from([10000.0, 500.0])),
        compress_rope_theta=draw(st.sampled_from([160000.0, 700.0])),
        rope_scaling=draw(
            st.sampled_from(
                [
                    None,
                    RopeScaling(factor=16.0, original_max_position_embeddings=32),
                    RopeScaling(factor=2.0, original_max_position_embeddings=64, beta_fast=8.0),
                ]
            )
        ),
        tie_word_embeddings=draw(st.booleans()),
        initializer_range=0.2,
    )


def random_tokens(config: ModelConfig, seed: int, *shape: int) -> Tensor:
    return torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
