"""The configs of the published models by name.

The values are those of the released config.json files (V2: arXiv:2405.04434; V3: arXiv:2412.19437).
A preset has no weights.
"""

from xushi.base.errors import BadInput
from xushi.model.config import ModelConfig, RopeScaling


def _yarn(mscale: float) -> RopeScaling:
    """The extension to 163,840 positions of the released V2, V3 and V3.2 models."""
    return RopeScaling(
        factor=40.0, original_max_position_embeddings=4096, mscale=mscale, mscale_all_dim=mscale
    )


_V2 = {
    "model_type": "deepseek_v2",
    "vocab_size": 102400,
    "num_hidden_layers": 60,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_attention_heads": 128,
    "n_shared_experts": 2,
    "n_routed_experts": 160,
    "num_experts_per_tok": 6,
    "topk_method": "group_limited_greedy",
    "n_group": 8,
    "topk_group": 3,
    "norm_topk_prob": False,
    "routed_scaling_factor": 16.0,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 163840,
    "rope_scaling": _yarn(0.707),
    "bos_token_id": 100000,
    "eos_token_id": 100001,
}

_V4 = {
    "model_type": "deepseek_v4",
    "hidden_size": 4096,
    "num_hidden_layers": 43,
    "num_attention_heads": 64,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "num_experts_per_tok": 6,
    "routed_scaling_factor": 1.5,
    "q_lora_rank": 1024,
    "index_topk": 512,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
    "max_position_embeddings": 1048576,
    "rope_scaling": RopeScaling(factor=16.0, original_max_position_embeddings=65536),
}

PRESETS = {
    "deepseek-v2": ModelConfig(**_V2),  # type: ignore[arg-type]
    "deepseek-v2-lite": ModelConfig(
        **(
            _V2
            | {  # type: ignore[arg-type]
                "num_hidden_layers": 27,
                "hidden_size": 2048,
                "intermediate_size": 10944,
                "moe_intermediate_size": 1408,
                "num_attention_heads": 16,
                "n_routed_experts": 64,
                "topk_method": "greedy",
                "n_group": 1,
                "topk_group": 1,
                "routed_scaling_factor": 1.0,
                "q_lora_rank": None,
            }
        )
    ),
    "deepseek-v3": ModelConfig(max_position_embeddings=163840, rope_scaling=_yarn(1.0)),
    "deepseek-v3.2": ModelConfig(
        model_type="deepseek_v32", max_position_embeddings=163840, rope_scaling=_yarn(1.0)
    ),
    "deepseek-v4-flash": ModelConfig(**_V4),  # type: ignore[arg-type]
    "deepseek-v4-pro": ModelConfig(
        **(
            _V4
            | {  # type: ignore[arg-type]
                "hidden_size": 7168,
                "num_hidden_layers": 61,
                "num_attention_heads": 128,
                "moe_intermediate_size": 3072,
                "n_routed_experts": 384,
                "q_lora_rank": 1536,
                "o_groups": 16,
                "routed_scaling_factor": 2.5,
                "index_topk": 1024,
                "compress_ratios": [128, 128, *[4, 128] * 29, 4, 0],
            }
        )
    ),
}


def preset(name: str) -> ModelConfig:
    """The config of a published model. An unknown name is a `XushiError` that lists the presets."""
    if name not in PRESETS:
        raise BadInput(
            f"there is no preset {name!r}, and no directory of that name",
            f"the presets are {', '.join(PRESETS)}",
        )
    return PRESETS[name]
