"""Everything that can be counted about a model from its config alone, as flat keys and a table of layers."""

from typing import Any

from xushi.model.config import ModelConfig
from xushi.plan.parameters import (
    attention_parameters,
    count_parameters,
    expert_parameters,
    feed_forward_parameters,
)
from xushi.plan.work import decode_flops_per_token, kv_cache_bytes_per_token, train_flops_per_token

PARTS = ("embedding", "head", "attention", "dense_mlp", "routers", "routed_experts", "shared_experts", "norms")


def inspect_model(config: ModelConfig, context: int, mtp: bool) -> dict[str, Any]:
    """Parameters, latent cache in bf16 and FLOPs at `context` tokens; `mtp` counts its layers in training.

    Flat dotted keys; "layers" is a list with one table per decoder layer, MTP layers after them.
    """
    count = count_parameters(config)
    per_token = kv_cache_bytes_per_token(config)
    depths = config.num_nextn_predict_layers
    return {
        "model_type": config.model_type,
        "parameters.total": count.total,
        "parameters.active": count.active,
        "parameters.active_without_embedding": count.active_without_embedding,
        "parameters.mtp": count.mtp,
        **{f"parameters.{part}": getattr(count, part) for part in PARTS},
        "context": context,
        "kv_cache.bytes_per_token": per_token,
        "kv_cache.bytes_at_context": per_token * context,
        "flops.train_per_token": train_flops_per_token(config, context, mtp),
        "flops.decode_per_token": decode_flops_per_token(config, context),
        "layers": [_layer(config, layer) for layer in range(config.num_hidden_layers + depths)],
    }


def _layer(config: ModelConfig, layer: int) -> dict[str, Any]:
    attention, feed_forward = attention_parameters(config), feed_forward_parameters(config, layer)
    idle = (config.n_routed_experts - config.num_experts_per_tok) * expert_parameters(config)
    return {"layer": layer, "kind": ("mixture of experts" if config.is_moe(layer) else "dense")
            + (", MTP" if layer >= config.num_hidden_layers else ""),
            "attention": attention, "feed_forward": feed_forward,
            "active": attention + feed_forward - (idle if config.is_moe(layer) else 0)}
