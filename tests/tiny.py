"""Models that take a millisecond: a V3 for tests to change with `model_copy`, and V4's own fields."""

from xushi.model import ModelConfig

TINY = ModelConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    moe_intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    q_lora_rank=None,
    kv_lora_rank=8,
    qk_nope_head_dim=4,
    qk_rope_head_dim=4,
    v_head_dim=4,
    max_position_embeddings=32,
    num_nextn_predict_layers=1,
    initializer_range=0.1,
)
# Three layers, one of each kind of attention.
TINY_V4 = {
    "q_lora_rank": 6,
    "head_dim": 12,
    "o_groups": 2,
    "o_lora_rank": 5,
    "sliding_window": 5,
    "compress_rate_csa": 2,
    "compress_rate_hca": 3,
    "compress_ratios": [0, 2, 3],
    "index_topk": 2,
    "index_n_heads": 2,
    "index_head_dim": 6,
    "hc_mult": 3,
    "hc_sinkhorn_iters": 4,
    "num_hash_layers": 1,
    "swiglu_limit": 0.5,
}
