"""What `xushi inspect` shows: all counts of a model as flat keys, and a table of its layers."""

from collections import Counter
from itertools import pairwise
from typing import Any

from xushi.model.config import ModelConfig
from xushi.plan.layers import expert_parameters, layer_parts
from xushi.plan.parameters import PARTS, count_parameters
from xushi.plan.reach import kv_cache_bytes, kv_cache_bytes_per_token
from xushi.plan.work import decode_flops_per_token, train_flops_per_token

# The parts of a layer that the table adds up into one column.
COLUMNS = {
    "attention": ("attention", "indexers", "compressors"),
    "feed_forward": ("dense_mlp", "routers", "routed_experts", "shared_experts"),
    "hyper_connections": ("hyper_connections",),
}


def inspect_model(config: ModelConfig, context: int, mtp: bool) -> dict[str, Any]:
    """Architecture, parameters, cache in bf16 and FLOPs at `context` tokens, under flat dotted
    keys.

    `mtp`: training includes the MTP layers. "layers" is a list with one table per decoder layer and
    then per MTP layer; its columns and the norms add up to the layer's parameters.
    "kv_cache.bytes_per_token" is what one more token of a long context adds; in V4 that is its
    share of compressed entries. "kv_cache.bytes_at_context" also includes V4's sliding window.
    """
    count = count_parameters(config)
    return {
        "model_type": config.model_type,
        **_architecture(config),
        "parameters.total": count.total,
        "parameters.active": count.active,
        "parameters.active_without_embedding": count.active_without_embedding,
        "parameters.mtp": count.mtp,
        **{f"parameters.{part}": getattr(count, part) for part in PARTS},
        "context": context,
        "kv_cache.bytes_per_token": kv_cache_bytes_per_token(config),
        "kv_cache.bytes_at_context": kv_cache_bytes(config, context),
        "flops.train_per_token": train_flops_per_token(config, context, mtp),
        "flops.decode_per_token": decode_flops_per_token(config, context),
        "layers": [
            _layer(config, layer)
            for layer in range(config.num_hidden_layers + config.num_nextn_predict_layers)
        ],
    }


def group_layers(layers: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Group equal layers: (their numbers, such as "0 to 2" or "3 to 41 by 2"; the first one's
    table) for each group.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for table in layers:
        groups.setdefault(
            tuple(value for key, value in table.items() if key != "layer"), []
        ).append(table["layer"])
    return [(_span(members), layers[members[0]]) for members in groups.values()]


def _span(numbers: list[int]) -> str:
    """Ascending numbers as text; consecutive numbers and even steps as "first to last"."""
    steps = {after - before for before, after in pairwise(numbers)}
    if len(numbers) > 2 and len(steps) == 1 and steps != {1}:
        return f"{numbers[0]} to {numbers[-1]} by {steps.pop()}"
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][-1] == number - 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    return ", ".join(
        str(span[0]) if len(span) == 1 else f"{span[0]} to {span[-1]}" for span in spans
    )


def _architecture(config: ModelConfig) -> dict[str, Any]:
    layers = range(config.num_hidden_layers)

    def counted(kinds: Counter[str]) -> str:
        return ", ".join(f"{count} {kind}" for kind, count in kinds.items())

    return {
        "architecture.layers": config.num_hidden_layers,
        "architecture.mtp_layers": config.num_nextn_predict_layers,
        "architecture.hidden_size": config.hidden_size,
        "architecture.streams": config.hc_mult if config.is_v4 else 1,
        "architecture.vocab_size": config.vocab_size,
        "architecture.attention_layers": counted(
            Counter(_attention_kind(config, layer) for layer in layers)
        ),
        "architecture.attention_heads": config.num_attention_heads,
        "architecture.feed_forward_layers": counted(
            Counter(_feed_forward_kind(config, layer) for layer in layers)
        ),
        "architecture.routed_experts": config.n_routed_experts,
        "architecture.experts_per_token": config.num_experts_per_tok,
        "architecture.shared_experts": config.n_shared_experts,
    }


def _attention_kind(config: ModelConfig, layer: int) -> str:
    """The papers' names. MLA: latent attention; DSA: MLA on chosen tokens; SWA: sliding window;
    CSA: compressed sparse; HCA: heavily compressed.
    """
    if not config.is_v4:
        return "DSA" if config.has_indexer else "MLA"
    return {0: "SWA", config.compress_rate_csa: "CSA", config.compress_rate_hca: "HCA"}[
        config.compress_ratio(layer)
    ]


def _feed_forward_kind(config: ModelConfig, layer: int) -> str:
    if not config.is_moe(layer):
        return "dense"
    return "hash-routed experts" if config.is_hash_routed(layer) else "experts"


def _layer(config: ModelConfig, layer: int) -> dict[str, Any]:
    parts = layer_parts(config, layer)
    held = {
        column: sum(parts[part].total for part in members) for column, members in COLUMNS.items()
    }
    idle = (config.n_routed_experts - config.num_experts_per_tok) * expert_parameters(config)
    kind = f"{_attention_kind(config, layer)}, {_feed_forward_kind(config, layer)}"
    return {
        "layer": layer,
        "kind": kind + (", MTP" if layer >= config.num_hidden_layers else ""),
        **held,
        "active": sum(held.values()) - (idle if config.is_moe(layer) else 0),
    }
