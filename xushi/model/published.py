"""`ModelConfig` to and from the published `config.json`, as DeepSeek writes it and as transformers
5 writes it.

A value that this architecture does not implement is a `XushiError` that names the key. Nothing is
guessed if a guess could be wrong.
"""

import os
from pathlib import Path
from typing import Any

from xushi.base.config import parse, shorten
from xushi.base.errors import BadInput
from xushi.base.model_directory import snapshot_remedy
from xushi.base.published_files import read_published_json
from xushi.model.config import ABSENT, ModelConfig
from xushi.model.config_keys import CLASSES, model_type_of, unread_keys, without_aliases
from xushi.model.published_v4 import LAYER_TYPES, REMEDY, as_v4, check_length
from xushi.model.rope_fields import rope_fields

_SCORES = {
    "deepseek_v2": "softmax",
    "deepseek_v3": "sigmoid",
    "deepseek_v32": "sigmoid",
    "deepseek_v4": "sqrtsoftplus",
}
_POSITIONS = {"deepseek_v3": 4096, "deepseek_v32": 163840}  # where the file does not say
_MOST_NAMED = 20  # keys in one message
# Keys that a V2's or V4's config.json must contain: the defaults here are V3's, and transformers'
# defaults for V2 are those of no released model.
_SHAPES = (
    "vocab_size",
    "hidden_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "n_shared_experts",
    "n_routed_experts",
    "num_experts_per_tok",
    "routed_scaling_factor",
    "q_lora_rank",
    "max_position_embeddings",
)
_SHAPES_OF = {
    "deepseek_v2": (
        *_SHAPES,
        "intermediate_size",
        "first_k_dense_replace",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
    ),
    "deepseek_v4": (
        *_SHAPES,
        "head_dim",
        "qk_rope_head_dim",
        "o_groups",
        "o_lora_rank",
        "sliding_window",
        "compress_ratios",
        "num_hash_layers",
        "index_topk",
        "index_n_heads",
        "index_head_dim",
        "swiglu_limit",
        "hc_mult",
    ),
}


def to_published(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` table, for transformers' class of this model_type and for other engines."""
    table = {
        "architectures": [CLASSES[config.model_type]],
        **config.model_dump(mode="json"),
        "num_key_value_heads": 1 if config.is_v4 else config.num_attention_heads,
        "hidden_act": "silu",
        "scoring_func": _SCORES[config.model_type],
        "moe_layer_freq": 1,
        "attention_dropout": 0.0,
        "torch_dtype": "float32",
        "use_cache": True,
    }
    if not config.is_v4:
        return table
    # transformers needs its own key for rates other than 4 and 128.
    rates = (0, config.compress_rate_csa, config.compress_rate_hca)
    kinds = dict(zip(rates, LAYER_TYPES, strict=True))
    table["layer_types"] = [
        kinds[config.compress_ratio(layer)] for layer in range(config.num_hidden_layers)
    ]
    if config.rope_scaling is not None:
        # V4 does not scale scores. transformers would do so if it found an mscale.
        table["rope_scaling"] = {
            key: value
            for key, value in table["rope_scaling"].items()
            if not key.startswith("mscale")
        }
    return table


def from_published(table: dict[str, Any], where: str) -> ModelConfig:
    """Read a published `config.json` table. `where` names the file in messages.

    A value that is not implemented or missing is a `XushiError` that names the key.
    """
    kind = model_type_of(table, where, REMEDY)
    table = without_aliases(table, kind, where)
    if kind == "deepseek_v4":
        table = as_v4(table, where)
    for key in _SHAPES_OF.get(kind, ()):
        if key not in table:
            raise BadInput(
                f"{where} has no {key}", f"get the file again; a {kind} has no default for it"
            )
    table = {"max_position_embeddings": _POSITIONS.get(kind)} | table | {"model_type": kind}
    if kind == "deepseek_v2":
        table = _as_v2(table)
    _refuse_other_values(table, kind, where)
    # Values of fields that do not apply to this model_type change nothing; `unread_keys` names
    # them.
    known = {
        key: table[key]
        for key in ModelConfig.model_fields
        if key in table and key not in ABSENT[kind]
    }
    known |= {key: value for key, value in ABSENT[kind].items() if value is not None}
    known |= rope_fields(table, kind, where)
    if kind != "deepseek_v4":
        known |= _dense_layers(table, kind, where)
    return parse(ModelConfig, known, where, f"correct that value in {where}, or get it again")


def _refuse_other_values(table: dict[str, Any], kind: str, where: str) -> None:
    """Raise if a key that can have only one value here has another."""
    fixed = {
        "hidden_act": "silu",
        "scoring_func": _SCORES[kind],
        "moe_layer_freq": 1,
        "mlp_bias": False,
    }
    for key, value in fixed.items():
        if table.get(key, value) != value:
            raise BadInput(
                f"{where}: {key} is {shorten(table[key])}; only {value!r} is implemented", REMEDY
            )
    _refuse_other_heads(table, kind, where)


def _refuse_other_heads(table: dict[str, Any], kind: str, where: str) -> None:
    """Raise if a key about the heads contradicts the fields that count."""
    heads = 1 if kind == "deepseek_v4" else table.get("num_attention_heads", 128)
    if table.get("num_key_value_heads") not in (None, heads):
        raise BadInput(
            f"{where}: num_key_value_heads is {shorten(table['num_key_value_heads'])}; a {kind} "
            f"has {'one' if kind == 'deepseek_v4' else 'as many as num_attention_heads'}",
            REMEDY,
        )
    # transformers' class of V3 rotates head_dim values if a file has it.
    rotated = table.get("qk_rope_head_dim", 64)
    if kind == "deepseek_v3" and table.get("head_dim") not in (None, rotated):
        raise BadInput(
            f"{where}: head_dim is {shorten(table['head_dim'])}, but qk_rope_head_dim is "
            f"{shorten(rotated)}",
            "remove head_dim if the checkpoint was made without it",
        )


def _as_v2(table: dict[str, Any]) -> dict[str, Any]:
    """A published V2 table, with the defaults of DeepSeek's class for keys that are missing or
    null.
    """
    defaults = {
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    given = {k: value for k, value in table.items() if value is not None or k not in defaults}
    return defaults | given


def _dense_layers(table: dict[str, Any], kind: str, where: str) -> dict[str, Any]:
    """first_k_dense_replace from transformers 5's list mlp_layer_types, if given."""
    types = table.get("mlp_layer_types")
    if not isinstance(types, list):
        return {}
    check_length(types, "mlp_layer_types", table, where)
    dense = types.count("dense")
    if types != ["dense"] * dense + ["sparse"] * (len(types) - dense):
        raise BadInput(
            f"{where}: mlp_layer_types must be dense layers followed by sparse ones",
            "only models whose first layers are dense are implemented",
        )
    # V3.2's class obeys the list alone and may write its default for the other key. The classes of
    # V2 and V3 do not know the list.
    first = table.get("first_k_dense_replace", 3)
    if kind != "deepseek_v32" and isinstance(first, int) and min(first, len(types)) != dense:
        given = "first_k_dense_replace" in table
        raise BadInput(
            f"{where}: mlp_layer_types has {dense} dense layers, and first_k_dense_replace is "
            f"{first}{'' if given else ', its default, which the class of this model takes'}",
            "remove the one that does not belong to this checkpoint"
            if given
            else f"add first_k_dense_replace: {dense} if the checkpoint was made with it",
        )
    return {"first_k_dense_replace": dense}


def read_table(directory: Path) -> dict[str, Any]:
    """The table in config.json of a checkpoint directory."""
    file = directory / "config.json"
    if not os.path.lexists(file):
        raise BadInput(
            f"{file} does not exist",
            snapshot_remedy(directory) or "give a directory in the Hugging Face layout",
        )
    return read_published_json(directory, "config.json")


def read_config(path: str | Path) -> ModelConfig:
    """The `ModelConfig` of a checkpoint directory's config.json."""
    directory = Path(path)
    return from_published(read_table(directory), str(directory / "config.json"))


def unread_note(directory: Path, table: dict[str, Any], config: ModelConfig) -> str | None:
    """What the user should know of keys in config.json, `table`, that nothing reads."""
    unread = unread_keys(table, config.model_type)
    if not unread:
        return None
    more = f" and {len(unread) - _MOST_NAMED} more" if len(unread) > _MOST_NAMED else ""
    named = ", ".join(map(shorten, unread[:_MOST_NAMED]))
    return f"{directory / 'config.json'}: nothing reads {named}{more}"
