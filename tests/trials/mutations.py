"""Random changes to published config.json tables, and what becomes of them."""

import copy
import json
import random
from typing import Any

import torch

from xushi.base.errors import BadInput
from xushi.model import ModelConfig, from_published
from xushi.plan import count_parameters

from .published import TABLES, TOKENS, difference, ours, small, theirs

# Some tables are 61 layers deep or 1536 wide: rounding reaches 3e-5. An rms_norm_eps of 1e-5 for
# 1e-6 changes the logits by 3.5e-4.
_FAR = 1e-4
_VALUES: tuple[Any, ...] = (
    *(None, True, False, "", "yarn", "default", "deepseek_v3", [], [1, 2], {}, {"a": 1}),
    *(0, 1, 2, 3, 5, 8, -1, 10**20, 0.0, 0.5, 1.0, 2.0, 64.0, -1.5, 1e-6, float("nan")),
)
_KEYS = (
    *ModelConfig.model_fields,
    *("num_experts", "num_local_experts", "num_mtp_layers", "partial_rotary_factor", "head_dim"),
    *("mlp_layer_types", "layer_types", "compress_rates", "num_key_value_heads", "hidden_act"),
    *(
        "scoring_func",
        "moe_layer_freq",
        "mlp_bias",
        "rope_parameters",
        "anything",
        "attention_dropout",
    ),
    *("original_max_position_embeddings", "qk_head_dim", "num_heads", "dtype", "architectures"),
)
_ROPE = {
    "rope_type": ("default", "yarn", "linear", "dynamic", None, 3),
    "type": ("default", "yarn", "su", None),
    "rope_theta": (10000, 50000.0, 1, 0.5, None, "1e4"),
    "factor": (1, 4.0, 40, 0.5, None, "4"),
    "original_max_position_embeddings": (16, 16.0, 64, 16.5, None, 0),
    "beta_fast": (32, 2.0, 0, None),
    "beta_slow": (1, 0.5, 0, None),
    "mscale": (1, 0.7, 0, None),
    "mscale_all_dim": (1.0, 0.9, 0, None),
    "attention_factor": (1.0, 1.2, None),
    "truncate": (True, False, None),
    "partial_rotary_factor": (1.0, 0.5, 2 / 3, None),
    "main": ({}, {"rope_type": "default", "rope_theta": 500.0}, None),
    "compress": ({}, {"rope_type": "default", "rope_theta": 500.0}, None),
    "other": (1,),
}
_WRITTEN_BY_TRANSFORMERS: dict[str, dict[str, Any]] = {}


def _start(stream: random.Random) -> dict[str, Any]:
    """A table as DeepSeek publishes it, or as transformers 5 writes it."""
    name = stream.choice(TABLES)
    if stream.random() < 0.6:
        return small(name)
    if name not in _WRITTEN_BY_TRANSFORMERS:
        written = theirs(small(name)).config.to_json_string()
        _WRITTEN_BY_TRANSFORMERS[name] = json.loads(written)
    return copy.deepcopy(_WRITTEN_BY_TRANSFORMERS[name])


def _near(stream: random.Random, value: Any) -> Any:
    """A value like `value`."""
    if type(value) is int:
        return stream.choice(
            [value + 1, value - 1, value * 2, value // 2, float(value), str(value)]
        )
    if isinstance(value, float):
        return stream.choice([value * 2, value / 2, int(value), str(value)])
    if isinstance(value, list) and value:
        return stream.choice([value[:-1], [*value, value[-1]], value[::-1]])
    return stream.choice(_VALUES)


def mutated(stream: random.Random) -> tuple[dict[str, Any], list[str]]:
    """A table with one to three changes, and the changes in words."""
    table, said = _start(stream), []
    for _ in range(stream.choice([1, 1, 2, 3])):
        way = stream.random()
        if way < 0.35:
            place = stream.choice(["rope_scaling", "rope_parameters"])
            rope = table.get(place)
            rope = dict(rope) if isinstance(rope, dict) else {}
            inner = rope
            if isinstance(rope.get("compress"), dict) and stream.random() < 0.6:
                part = stream.choice(["main", "compress"])
                inner = rope[part] = dict(rope.get(part) or {})
            key = stream.choice(list(_ROPE))
            if stream.random() < 0.25:
                inner.pop(key, None)
            else:
                inner[key] = stream.choice(_ROPE[key])
            table[place] = rope
            said.append(f"{place} = {rope}")
            continue
        key = stream.choice(list(table) if way < 0.75 else _KEYS)
        if stream.random() < 0.2:
            table.pop(key, None)
            said.append(f"no {key}")
            continue
        near = key in table and stream.random() < 0.6
        table[key] = _near(stream, table[key]) if near else stream.choice(_VALUES)
        said.append(f"{key} = {table[key]!r}")
    return table, said


def verdict(table: dict[str, Any]) -> str:
    """What becomes of a table: "equal", "refused", "transformers refuses: ...", "WRONG ...", or why
    it was not compared.
    """
    where = "there/config.json"
    try:
        config = from_published(copy.deepcopy(table), where)
    except BadInput as error:
        lines = (error.problem, error.remedy)
        plain = where in lines[0] and all(line and "\n" not in line for line in lines)
        return "refused" if plain and "recipe" not in lines[1] else f"WRONG words: {error}"
    if count_parameters(config).total > 3_000_000:
        return "too large"
    if table.get("q_lora_rank") == 0:
        return "0 is null here"  # docs/model.md
    if config.has_indexer and config.index_topk < TOKENS.shape[1]:
        return (
            "ties"  # docs/model.md: transformers does not define which key of equal scores counts
        )
    if min(config.rope_theta, config.compress_rope_theta) < 0.1:
        return "rounding"  # the angles reach 1e5, of which float32 resolves 0.01
    try:
        reference = theirs(table)
        with torch.no_grad():
            expected = reference(TOKENS).logits
    except Exception as error:
        return f"transformers refuses: {type(error).__name__}: {error}"
    try:
        mine = ours(table, reference.state_dict())
    except RuntimeError as error:
        return f"WRONG shapes: {str(error)[:300]}"
    with torch.no_grad():
        far = difference(expected, mine(TOKENS).logits)
    return "equal" if far <= _FAR else f"WRONG logits: {far}"
