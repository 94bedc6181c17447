"""The keys of a published `config.json`: other names of a field, keys that change nothing here, and
keys that nothing reads.

Not here: the meaning of the values (published.py, rope_fields.py).
"""

from typing import Any

from xushi.base.config import shorten
from xushi.base.errors import BadInput
from xushi.model.config import ABSENT, ModelConfig
from xushi.model.rope_fields import unread_rope_keys

# model_type of models whose architecture is another one's. Those in a list are what their class
# (`architectures`) says.
SAME_ARCHITECTURE = {"kimi_k2": "deepseek_v3"}
NAMED_BY_CLASS = ("deepseek_ref",)
CLASSES = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v32": "DeepseekV32ForCausalLM",
    "deepseek_v4": "DeepseekV4ForCausalLM",
}
# Keys of a V4 whose mtp.* tensors are draft models of another kind.
OTHER_DRAFTS = "dspark_"
# Other names of a field: transformers' `attribute_map`, of all its classes of this line.
_ALIASES = {"num_experts": "n_routed_experts", "num_local_experts": "n_routed_experts"}
_ALIASES_OF = {
    "deepseek_v2": _ALIASES,
    "deepseek_v3": _ALIASES | {"num_mtp_layers": "num_nextn_predict_layers"},
    "deepseek_v32": _ALIASES | {"num_mtp_layers": "num_nextn_predict_layers"},
    "deepseek_v4": _ALIASES
    | {
        "num_mtp_layers": "num_nextn_predict_layers",
        "intermediate_size": "moe_intermediate_size",
    },
}
# Keys that published.py, rope_fields.py, quantised.py and weights.py read beside the fields.
_READ = frozenset(
    (
        "architectures",
        "compress_rates",
        "hidden_act",
        "layer_types",
        "mlp_bias",
        "mlp_layer_types",
        "moe_layer_freq",
        "num_key_value_heads",
        "original_max_position_embeddings",
        "partial_rotary_factor",
        "quantization_config",
        "rope_parameters",
        "scoring_func",
    )
)
# Keys that say nothing about what the model computes, or only how it was trained or is sampled.
_HARMLESS = frozenset(
    (
        "_attn_implementation",
        "_commit_hash",
        "_name_or_path",
        "attention_dropout",
        "attn_implementation",
        "auto_map",
        "aux_loss_alpha",
        "chunk_size_feed_forward",
        "dtype",
        "ep_size",
        "expert_dtype",
        "head_dim",
        "id2label",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "name_or_path",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pretraining_tp",
        "problem_type",
        "qk_head_dim",
        "return_dict",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "scale_fmt",
        "seq_aux",
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "unsloth_fixed",
        "use_cache",
        # transformers takes sampling's settings for settings of `generate`
        "do_sample",
        "max_length",
        "max_new_tokens",
        "min_length",
        "num_beams",
        "num_return_sequences",
        "repetition_penalty",
        "temperature",
        "top_k",
        "top_p",
    )
)


def model_type_of(table: dict[str, Any], where: str, remedy: str) -> str:
    """The model_type of `table` as this package calls it. Another one is a `XushiError`."""
    # Required, since every other key has a default: those of the model with 671B parameters.
    if "model_type" not in table:
        raise BadInput(f"{where} has no model_type", f"{remedy}, or get it again")
    kind = table["model_type"]
    if isinstance(kind, str) and kind in NAMED_BY_CLASS:
        kind = _by_class(table, where, remedy)
    if not isinstance(kind, str) or SAME_ARCHITECTURE.get(kind, kind) not in CLASSES:
        raise BadInput(
            f"{where}: model_type is {shorten(kind)}; only "
            f"{', '.join([*CLASSES, *SAME_ARCHITECTURE])} are implemented",
            remedy,
        )
    return SAME_ARCHITECTURE.get(kind, kind)


def _by_class(table: dict[str, Any], where: str, remedy: str) -> str:
    kinds = {name: kind for kind, name in CLASSES.items()}
    named = table.get("architectures")
    name = named[0] if isinstance(named, list) and len(named) == 1 else None
    if not isinstance(name, str) or name not in kinds:
        raise BadInput(
            f"{where}: model_type is {table['model_type']!r} and architectures {shorten(named)}, "
            "which together name no implemented model",
            remedy,
        )
    return kinds[name]


def without_aliases(table: dict[str, Any], kind: str, where: str) -> dict[str, Any]:
    """`table` with each field under its own name. A field that has two values is a `XushiError`."""
    aliases = _ALIASES_OF[kind]
    plain = {key: value for key, value in table.items() if key not in aliases}
    origin = {key: key for key in plain}
    for alias, field in aliases.items():
        if table.get(alias) is None:
            continue
        if plain.get(field) is not None and plain[field] != table[alias]:
            raise BadInput(
                f"{where}: {alias} is {shorten(table[alias])}, but {origin[field]}, which means "
                f"the same, is {shorten(plain[field])}",
                "remove the one that does not belong to this checkpoint",
            )
        plain[field] = table[alias]
        origin.setdefault(field, alias)
    return plain


def unread_keys(table: dict[str, Any], kind: str) -> list[str]:
    """The keys of a published table, dotted, that nothing reads and that may mean something.

    A field that does not apply to this model_type counts, unless it has its fixed value.
    """
    unread = []
    for key, value in table.items():
        if key in ABSENT[kind] and key not in _ALIASES_OF[kind]:
            fixed = ABSENT[kind][key]
            if key not in _HARMLESS and value is not None and value != fixed:
                unread.append(key)
        elif kind == "deepseek_v4" and key.startswith(OTHER_DRAFTS):
            continue
        elif key not in {*ModelConfig.model_fields, *_ALIASES_OF[kind], *_READ, *_HARMLESS}:
            unread.append(key)
    return [*unread, *unread_rope_keys(table)]
