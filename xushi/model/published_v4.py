"""A V4's `config.json`, from transformers' keys to DeepSeek's.

Not here: RoPE's keys (rope_fields.py), and what all models share (published.py).
"""

from typing import Any

from xushi.base.config import shorten
from xushi.base.errors import BadInput
from xushi.base.published_files import DAMAGED

LAYER_TYPES = ("sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention")
REMEDY = "use a DeepSeek-V2-, V3-, V3.2- or V4-type checkpoint"
MOST_MTP_LAYERS = 64  # a config.json with more is damaged and must not make us build a long list


def as_v4(table: dict[str, Any], where: str) -> dict[str, Any]:
    """A V4 table with DeepSeek's keys, whether DeepSeek or transformers wrote it."""
    table = {
        key: value
        for key, value in table.items()
        if value is not None or key not in ("compress_ratios", "topk_method", "rope_scaling")
    }
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
    return table


def _add_compress_ratios(table: dict[str, Any], where: str) -> None:
    """Set a V4's compression rates, and compress_ratios for every layer with the MTP layers."""
    rates: Any = table.get("compress_rates") or {}
    if not isinstance(rates, dict):
        raise BadInput(f"{where}: compress_rates is {rates!r}, not a table", DAMAGED)
    _, sparse, heavy = LAYER_TYPES
    for key, name in (("compress_rate_csa", sparse), ("compress_rate_hca", heavy)):
        if name not in rates:
            continue
        if table.get(key, rates[name]) != rates[name]:
            raise BadInput(
                f"{where}: compress_rates.{name} is {shorten(rates[name])}, and {key} is "
                f"{shorten(table[key])}",
                "remove the one that does not belong to this checkpoint",
            )
        table[key] = rates[name]
    if "compress_ratios" not in table:
        table["compress_ratios"] = _ratios_of_layer_types(table, where)
    elif isinstance(table.get("layer_types"), list):
        _check_ratios(table, where)
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


def _check_ratios(table: dict[str, Any], where: str) -> None:
    """Raise if compress_ratios and layer_types do not state the same for the trunk's layers."""
    by_type = _ratios_of_layer_types(table, where)
    ratios, layers = table["compress_ratios"], table.get("num_hidden_layers")
    if isinstance(ratios, list) and isinstance(layers, int) and ratios[:layers] != by_type[:layers]:
        raise BadInput(
            f"{where}: compress_ratios and layer_types contradict each other",
            "remove the one that does not belong to this checkpoint",
        )


def _ratios_of_layer_types(table: dict[str, Any], where: str) -> list[Any]:
    """compress_ratios from transformers' layer_types."""
    kinds: Any = table.get("layer_types")
    if not isinstance(kinds, list):
        # transformers' default is the schedule of no released model.
        raise BadInput(
            f"{where} has neither compress_ratios nor layer_types",
            "add the model's own schedule; there is no default that fits them all",
        )
    window, sparse, heavy = LAYER_TYPES
    ratio = {
        window: 0,
        sparse: table.get("compress_rate_csa", 4),
        heavy: table.get("compress_rate_hca", 128),
    }
    if unknown := [kind for kind in kinds if not isinstance(kind, str) or kind not in ratio]:
        raise BadInput(
            f"{where}: layer_types contains {shorten(unknown[0])}, which is not implemented", REMEDY
        )
    return [ratio[kind] for kind in kinds]


def _add_hash_layers(table: dict[str, Any], where: str) -> None:
    """Set num_hash_layers from transformers' mlp_layer_types, if given."""
    types = table.get("mlp_layer_types")
    if not isinstance(types, list):
        return
    check_length(types, "mlp_layer_types", table, where)
    hashed = types.count("hash_moe")
    if types != ["hash_moe"] * hashed + ["moe"] * (len(types) - hashed):
        raise BadInput(
            f"{where}: mlp_layer_types must be hash_moe layers followed by moe layers", REMEDY
        )
    table["num_hash_layers"] = hashed


def check_length(types: list[Any], key: str, table: dict[str, Any], where: str) -> None:
    """Raise unless a list has an entry for every layer of the trunk."""
    layers = table.get("num_hidden_layers")
    if layers is not None and len(types) != layers:
        raise BadInput(
            f"{where}: {key} has {len(types)} entries, and num_hidden_layers is {shorten(layers)}",
            DAMAGED,
        )
