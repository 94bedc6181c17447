"""`ModelConfig` to and from the published `config.json`, as DeepSeek and as transformers 5 write
it.

What an architecture is not gets a `XushiError` that names the key; nothing is guessed where a guess
could be wrong.
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
MOST_MTP_LAYERS = 64  # beyond it a config.json is damaged, and may not make a list of that length
# What a V2's or V4's config.json must say itself: our defaults are V3's, and transformers' for V2
# are no released model's.
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
    """The `config.json` that transformers' class of this kind and other engines read."""
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
    if config.is_v4:
        # transformers knows other rates than 4 and 128 in its own terms only.
        kinds = dict(
            zip((0, config.compress_rate_csa, config.compress_rate_hca), _LAYER_TYPES, strict=True)
        )
        table["layer_types"] = [
            kinds[config.compress_ratio(i)] for i in range(config.num_hidden_layers)
        ]
        if (
            config.rope_scaling is not None
        ):  # V4 scales no scores; a factor that says so would be read as one that does
            table["rope_scaling"] = {
                k: v for k, v in table["rope_scaling"].items() if not k.startswith("mscale")
            }
    return table


def from_published(table: dict[str, Any], where: str) -> ModelConfig:
    """Read a published `config.json` table; what this architecture is not gets a `XushiError`
    naming the key.
    """
    if (
        "model_type" not in table
    ):  # every other key has a default, those of the model with 671B parameters
        raise BadInput(f"{where} has no model_type", f"{_REMEDY}, or get it again")
    kind = table["model_type"]
    if not isinstance(kind, str) or kind not in _CLASSES:
        raise BadInput(
            f"{where}: model_type is {kind!r}, and only {', '.join(_CLASSES)} are implemented",
            _REMEDY,
        )
    table = _as_v4(table, where) if kind == "deepseek_v4" else table
    for key in _SHAPES_OF.get(kind, ()):
        if key not in table:
            raise BadInput(
                f"{where} has no {key}", f"get the file again; a {kind} has no default for it"
            )
    if kind == "deepseek_v2":
        table = _as_v2(table)
    fixed = {
        "hidden_act": "silu",
        "scoring_func": _SCORES[kind],
        "moe_layer_freq": 1,
        "mlp_bias": False,
    }
    for key, value in fixed.items():
        if table.get(key, value) != value:
            raise BadInput(
                f"{where}: {key} is {table[key]!r}, and only {value!r} is implemented", _REMEDY
            )
    # What a kind has not is left out unasked where its value is another kind's habit and changes
    # nothing.
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


def _as_v2(table: dict[str, Any]) -> dict[str, Any]:
    """A published V2 table with what it leaves to its class."""
    unsaid = {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "norm_topk_prob": False}
    said = {key: value for key, value in table.items() if value is not None or key not in unsaid}
    return unsaid | said


def _as_v4(table: dict[str, Any], where: str) -> dict[str, Any]:
    """A V4 table in DeepSeek's own terms, whoever wrote it."""
    table = {
        key: value
        for key, value in table.items()
        if value is not None or key not in ("compress_ratios", "topk_method", "rope_scaling")
    }
    rates: Any = table.get("compress_rates") or {}
    if not isinstance(rates, dict):
        raise BadInput(
            f"{where}: compress_rates is {rates!r}, not a table",
            "get the file again, it is damaged",
        )
    for key, name in (
        ("compress_rate_csa", _LAYER_TYPES[1]),
        ("compress_rate_hca", _LAYER_TYPES[2]),
    ):
        if name in rates:
            table[key] = rates[name]
    kinds: Any = table.get("layer_types")
    if "compress_ratios" not in table and isinstance(kinds, list):
        ratio = {
            _LAYER_TYPES[0]: 0,
            _LAYER_TYPES[1]: table.get("compress_rate_csa", 4),
            _LAYER_TYPES[2]: table.get("compress_rate_hca", 128),
        }
        if unknown := [kind for kind in kinds if not isinstance(kind, str) or kind not in ratio]:
            raise BadInput(
                f"{where}: layer_types holds {unknown[0]!r}, which is not implemented", _REMEDY
            )
        table["compress_ratios"] = [ratio[kind] for kind in kinds]
    if "compress_ratios" not in table:
        # transformers then takes another schedule than any released model's.
        raise BadInput(
            f"{where} has neither compress_ratios nor layer_types",
            "add the model's own schedule; there is no default that fits them all",
        )
    if "num_mtp_layers" in table:
        table["num_nextn_predict_layers"] = table["num_mtp_layers"]
    layers, mtp = table.get("num_hidden_layers"), table.setdefault("num_nextn_predict_layers", 1)
    ratios: Any = table["compress_ratios"]
    if (
        isinstance(ratios, list)
        and isinstance(layers, int)
        and isinstance(mtp, int)
        and len(ratios) >= layers
        and 0 <= mtp <= MOST_MTP_LAYERS
    ):
        # An MTP layer unsaid is a window's; released files go on after the MTP layers, for
        # drafters.
        table["compress_ratios"] = [*ratios, *[0] * mtp][: layers + mtp]
    if isinstance(types := table.get("mlp_layer_types"), list):
        table["num_hash_layers"] = hashed = types.count("hash_moe")
        if types != ["hash_moe"] * hashed + ["moe"] * (len(types) - hashed):
            raise BadInput(
                f"{where}: mlp_layer_types is not hash_moe layers before moe layers", _REMEDY
            )
    width, share = table.get("head_dim"), table.get("partial_rotary_factor")
    if (
        "qk_rope_head_dim" not in table
        and isinstance(width, int)
        and isinstance(share, float)
        and 0 < share <= 1
    ):
        table["qk_rope_head_dim"] = int(width * share)
    return _v4_rope(table, where)


def _v4_rope(table: dict[str, Any], where: str) -> dict[str, Any]:
    """Both rotations in DeepSeek's own terms: rope_theta unscaled, compress_rope_theta with
    rope_scaling.
    """
    rope = table.get("rope_parameters")
    if (
        isinstance(rope, dict)
        and isinstance(rope.get("main"), dict)
        and isinstance(rope.get("compress"), dict)
    ):
        main, compress = rope["main"], rope["compress"]
        if main.get("rope_type", "default") != "default":
            raise BadInput(
                f"{where}: rope_parameters.main is {main['rope_type']!r}; only default is "
                "implemented",
                _REMEDY,
            )
        table |= {
            "rope_theta": main.get("rope_theta"),
            "compress_rope_theta": compress.get("rope_theta"),
            "rope_scaling": compress if compress.get("rope_type", "default") != "default" else None,
        }
    scaling = table.get("rope_scaling")
    if isinstance(scaling, dict):
        # Here YaRN scales nothing but the frequencies; transformers says so with a factor of 1.
        if scaling.get("attention_factor", 1.0) != 1.0:
            raise BadInput(
                f"{where}: rope_scaling's attention_factor is {scaling['attention_factor']!r}; a "
                "deepseek_v4 has 1.0",
                _REMEDY,
            )
        table["rope_scaling"] = {
            key: value
            for key, value in scaling.items()
            if key not in ("attention_factor", "mscale", "mscale_all_dim")
        }
    return table


def _rope(table: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 puts theta and scaling in one table."""
    rope = table.get("rope_parameters")
    if not isinstance(rope, dict):
        return {}
    return {
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_scaling": rope if rope.get("rope_type", "default") != "default" else None,
    }


def _dense_layers(table: dict[str, Any], where: str) -> dict[str, Any]:
    """transformers 5 lists each layer's kind, and that list is what rules there."""
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
    if not isinstance(scaling, dict):
        return scaling
    kind = scaling.get("type", scaling.get("rope_type"))
    if kind != "yarn":
        raise BadInput(f"{where}: rope_scaling of type {kind!r} is not implemented", "only yarn is")
    for key, published in (("attention_factor", None), ("truncate", True)):
        if scaling.get(key, published) != published:
            raise BadInput(
                f"{where}: rope_scaling's {key} is {scaling[key]!r}, which is not implemented",
                "use a checkpoint without it, as the published ones are",
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
