"""`ModelConfig` to and from the published `config.json`, as DeepSeek writes it and as transformers
5 writes it.

A value that this architecture does not implement is a `XushiError` that names the key. Nothing is
guessed if a guess could be wrong.
"""

from pathlib import Path
from typing import Any

from xushi.base.config import parse
from xushi.base.errors import BadInput
from xushi.base.files import read_json
from xushi.model.config import ABSENT, ModelConfig, RopeScaling

_CLASSES = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v32": "DeepseekV32ForCausalLM",
    "deepseek_v4": "DeepseekV4ForCausalLM",
}
_SCORES = {
    "deepseek_v2": "softmax",
    "deepseek_v3": "sigmoid",
    "deepseek_v32": "sigmoid",
    "deepseek_v4": "sqrtsoftplus",
}
_LAYER_TYPES = ("sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention")
_REMEDY = "use a DeepSeek-V2-, V3-, V3.2- or V4-type checkpoint"
_DAMAGED = "get the file again, it is damaged"
MOST_MTP_LAYERS = 64  # a config.json with more is damaged and must not make us build a long list
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
        "architectures": [_CLASSES[config.model_type]],
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
    kinds = dict(zip(rates, _LAYER_TYPES, strict=True))
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
    kind = _model_type(table, where)
    if kind == "deepseek_v4":
        table = _as_v4(table, where)
    for key in _SHAPES_OF.get(kind, ()):
        if key not in table:
            raise BadInput(
                f"{where} has no {key}", f"get the file again; a {kind} has no default for it"
            )
    if kind == "deepseek_v2":
        table = _as_v2(table)
    _refuse_other_values(table, kind, where)
    # Values of fields that do not apply to this model_type are ignored without a check: published
    # files contain some, and they change nothing.
    known = {
        key: table[key]
        for key in ModelConfig.model_fields
        if key in table and key not in ABSENT[kind]
    }
    known |= {key: value for key, value in ABSENT[kind].items() if value is not None}
    if kind != "deepseek_v4":
        known |= _rope(table)
        known |= _dense_layers(table, where)
    if "num_mtp_layers" in table and kind != "deepseek_v2":
        known["num_nextn_predict_layers"] = table["num_mtp_layers"]
    known["rope_scaling"] = _scaling(known.get("rope_scaling"), where)
    return parse(ModelConfig, known, where)


def _model_type(table: dict[str, Any], where: str) -> str:
    # Required, since every other key has a default: those of the model with 671B parameters.
    if "model_type" not in table:
        raise BadInput(f"{where} has no model_type", f"{_REMEDY}, or get it again")
    kind = table["model_type"]
    if not isinstance(kind, str) or kind not in _CLASSES:
        raise BadInput(
            f"{where}: model_type is {kind!r}; only {', '.join(_CLASSES)} are implemented",
            _REMEDY,
        )
    return kind


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
                f"{where}: {key} is {table[key]!r}; only {value!r} is implemented", _REMEDY
            )


def _as_v2(table: dict[str, Any]) -> dict[str, Any]:
    """A published V2 table, with the defaults of DeepSeek's class for keys that are missing or
    null.
    """
    defaults = {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "norm_topk_prob": False}
    given = {k: value for k, value in table.items() if value is not None or k not in defaults}
    return defaults | given


def _as_v4(table: dict[str, Any], where: str) -> dict[str, Any]:
    """A V4 table with DeepSeek's keys, whether DeepSeek or transformers wrote it."""
    table = {
        key: value
        for key, value in table.items()
        if value is not None or key not in ("compress_ratios", "topk_method", "rope_scaling")
    }
    if "num_mtp_layers" in table:
        table["num_nextn_predict_layers"] = table["num_mtp_layers"]
    table.setdefault("num_nextn_predict_layers", 1)
    _add_compress_ratios(table, where)
    _add_hash_layers(table, where)
    width = table.get("head_dim")
    share = table.get("partial_rotary_factor")
    if (
        "qk_rope_head_dim" not in table
        and isinstance(width, int)
        and isinstance(share, float)
        and 0 < share <= 1
    ):
        table["qk_rope_head_dim"] = int(width * share)
    return _v4_rope(table, where)


def _add_compress_ratios(table: dict[str, Any], where: str) -> None:
    """Set a V4's compression rates, and compress_ratios for every layer with the MTP layers."""
    rates: Any = table.get("compress_rates") or {}
    if not isinstance(rates, dict):
        raise BadInput(f"{where}: compress_rates is {rates!r}, not a table", _DAMAGED)
    _, sparse, heavy = _LAYER_TYPES
    for key, name in (("compress_rate_csa", sparse), ("compress_rate_hca", heavy)):
        if name in rates:
            table[key] = rates[name]
    if "compress_ratios" not in table:
        table["compress_ratios"] = _ratios_of_layer_types(table, where)
    ratios: Any = table["compress_ratios"]
    layers = table.get("num_hidden_layers")
    mtp = table["num_nextn_predict_layers"]
    if (
        isinstance(ratios, list)
        and isinstance(layers, int)
        and isinstance(mtp, int)
        and len(ratios) >= layers
        and 0 <= mtp <= MOST_MTP_LAYERS
    ):
        # An MTP layer without an entry has a sliding window only. Released files also have entries
        # for draft models after those of the MTP layers.
        table["compress_ratios"] = [*ratios, *[0] * mtp][: layers + mtp]


def _ratios_of_layer_types(table: dict[str, Any], where: str) -> list[Any]:
    """compress_ratios from transformers' layer_types."""
    kinds: Any = table.get("layer_types")
    if not isinstance(kinds, list):
        # transformers' default is the schedule of no released model.
        raise BadInput(
            f"{where} has neither compress_ratios nor layer_types",
            "add the model's own schedule; there is no default that fits them all",
        )
    window, sparse, heavy = _LAYER_TYPES
    ratio = {
        window: 0,
        sparse: table.get("compress_rate_csa", 4),
        heavy: table.get("compress_rate_hca", 128),
    }
    if unknown := [kind for kind in kinds if not isinstance(kind, str) or kind not in ratio]:
        raise BadInput(
            f"{where}: layer_types contains {unknown[0]!r}, which is not implemented", _REMEDY
        )
    return [ratio[kind] for kind in kinds]


def _add_hash_layers(table: dict[str, Any], where: str) -> None:
    """Set num_hash_layers from transformers' mlp_layer_types, if given."""
    types = table.get("mlp_layer_types")
    if not isinstance(types, list):
        return
    hashed = types.count("hash_moe")
    if types != ["hash_moe"] * hashed + ["moe"] * (len(types) - hashed):
        raise BadInput(
            f"{where}: mlp_layer_types must be hash_moe layers followed by moe layers", _REMEDY
        )
    table["num_hash_layers"] = hashed


def _v4_rope(table: dict[str, Any], where: str) -> dict[str, Any]:
    """The table with DeepSeek's keys for both rotations: rope_theta, which is not scaled, and
    compress_rope_theta, to which rope_scaling applies.
    """
    rope = table.get("rope_parameters")
    if (
        isinstance(rope, dict)
        and isinstance(rope.get("main"), dict)
        and isinstance(rope.get("compress"), dict)
    ):
        main = rope["main"]
        compress = rope["compress"]
        if main.get("rope_type", "default") != "default":
            raise BadInput(
                f"{where}: rope_parameters.main has rope_type {main['rope_type']!r}; only "
                "'default' "
                "is implemented",
                _REMEDY,
            )
        table |= {
            "rope_theta": main.get("rope_theta"),
            "compress_rope_theta": compress.get("rope_theta"),
            "rope_scaling": compress if compress.get("rope_type", "default") != "default" else None,
        }
    scaling = table.get("rope_scaling")
    if isinstance(scaling, dict):
        # V4's YaRN scales only the frequencies; transformers writes an attention_factor of 1.
        if scaling.get("attention_factor", 1.0) != 1.0:
            raise BadInput(
                f"{where}: rope_scaling.attention_factor is {scaling['attention_factor']!r}; a "
                "deepseek_v4 must have 1.0",
                _REMEDY,
            )
        table["rope_scaling"] = {
            key: value
            for key, value in scaling.items()
            if key not in ("attention_factor", "mscale", "mscale_all_dim")
        }
    return table


def _rope(table: dict[str, Any]) -> dict[str, Any]:
    """rope_theta and rope_scaling from transformers 5's rope_parameters, if given."""
    rope = table.get("rope_parameters")
    if not isinstance(rope, dict):
        return {}
    return {
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_scaling": rope if rope.get("rope_type", "default") != "default" else None,
    }


def _dense_layers(table: dict[str, Any], where: str) -> dict[str, Any]:
    """first_k_dense_replace from transformers 5's list mlp_layer_types, if given."""
    types = table.get("mlp_layer_types")
    if not isinstance(types, list):
        return {}
    dense = types.count("dense")
    if types != ["dense"] * dense + ["sparse"] * (len(types) - dense):
        raise BadInput(
            f"{where}: mlp_layer_types has dense layers after sparse ones",
            "only models whose first layers are dense are implemented",
        )
    return {"first_k_dense_replace": dense}


def _scaling(scaling: Any, where: str) -> Any:
    """rope_scaling with the fields of `RopeScaling` only; raises for what is not implemented."""
    if not isinstance(scaling, dict):
        return scaling
    kind = scaling.get("type", scaling.get("rope_type"))
    if kind != "yarn":
        raise BadInput(f"{where}: rope_scaling of type {kind!r} is not implemented", "use yarn")
    for key, published in (("attention_factor", None), ("truncate", True)):
        if scaling.get(key, published) != published:
            raise BadInput(
                f"{where}: rope_scaling.{key} is {scaling[key]!r}, which is not implemented",
                "use a checkpoint without it, like the published ones",
            )
    return {"type": "yarn"} | {
        key: value
        for key, value in scaling.items()
        if key in RopeScaling.model_fields and key != "type"
    }


def read_config(path: str | Path) -> ModelConfig:
    """The `ModelConfig` of a checkpoint directory's config.json."""
    file = Path(path) / "config.json"
    table = read_json(file, "give a directory in the Hugging Face layout, its files undamaged")
    return from_published(table, str(file))
