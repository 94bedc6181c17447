"""RoPE's bases and scaling from a published `config.json`, wherever the file states them.

DeepSeek and transformers 4 write `rope_theta` and `rope_scaling`; transformers 5 writes one table
`rope_parameters`, and for V4 one table for each of its two rotations. Matches transformers 5.23's
`RotaryEmbeddingConfigMixin`, except that a file whose statements contradict each other is refused.

Not here: the frequencies themselves (rotary.py, ops/rope.py).
"""

from dataclasses import dataclass
from typing import Any

from xushi.base.config import parse, shorten
from xushi.base.errors import BadInput
from xushi.base.published_files import DAMAGED
from xushi.model.config import RopeScaling

DEFAULT_THETA = 10000.0
DEFAULT_COMPRESS_THETA = 160000.0
_TABLES = ("rope_scaling", "rope_parameters")
# What a table may state beside the fields of `RopeScaling`.
_ALSO_READ = (
    "rope_type",
    "rope_theta",
    "attention_factor",
    "truncate",
    "partial_rotary_factor",
)
_SHARE = "get the file again; the rotated width and partial_rotary_factor must agree"


@dataclass(frozen=True)
class Rope:
    """The statements of one table. `compress_theta` is V4's second base."""

    theta: Any
    scaling: RopeScaling | None
    compress_theta: Any = None


def rope_fields(table: dict[str, Any], kind: str, where: str) -> dict[str, Any]:
    """The `ModelConfig` fields `rope_theta`, `rope_scaling` and, for V4, `compress_rope_theta`.

    `table` is the whole config.json; `where` names it in messages. A base stands in the table of
    RoPE, else at the top level, else it is the default. The two tables, if both are given, must
    state the same.
    """
    given = {key: _table(table, key, where) for key in _TABLES}
    stated = {key: _read(rope, key, table, kind, where) for key, rope in given.items() if rope}
    if len(stated) == 2 and stated["rope_scaling"] != stated["rope_parameters"]:
        raise BadInput(
            f"{where}: rope_scaling and rope_parameters contradict each other",
            "remove the one that does not belong to this checkpoint; a base (rope_theta) that "
            "only one of them states counts too",
        )
    rope = next(iter(stated.values())) if stated else _read({}, "", table, kind, where)
    fields = {"rope_theta": rope.theta, "rope_scaling": rope.scaling}
    if kind == "deepseek_v4":
        fields["compress_rope_theta"] = rope.compress_theta
    return fields


def unread_rope_keys(table: dict[str, Any]) -> list[str]:
    """The dotted keys of RoPE's tables that nothing reads."""
    known = {*RopeScaling.model_fields, *_ALSO_READ, "main", "compress"}
    unread = []
    for name in _TABLES:
        rope = table.get(name)
        if not isinstance(rope, dict):
            continue
        inner = {f"{key}.": rope[key] for key in ("main", "compress") if key in rope}
        for prefix, part in {"": rope, **inner}.items():
            if isinstance(part, dict):
                unread += [f"{name}.{prefix}{key}" for key in part if key not in known]
    return unread


def _table(table: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    """RoPE's table under `key`; {} if there is none."""
    rope = table.get(key)
    if rope is None:
        return {}
    if not isinstance(rope, dict):
        raise BadInput(
            f"{where}: {key} is {shorten(rope)}, which is not a table",
            DAMAGED,
        )
    return rope


def _read(rope: dict[str, Any], name: str, table: dict[str, Any], kind: str, where: str) -> Rope:
    """What the table `rope`, called `name`, states together with the top level of `table`."""
    theta = table.get("rope_theta", DEFAULT_THETA)
    if kind == "deepseek_v4":
        return _read_v4(rope, name, table, where)
    if nested := [key for key, value in rope.items() if isinstance(value, dict)]:
        raise BadInput(
            f"{where}: {name}.{nested[0]} is a table; a {kind} has one rotation for all layers",
            "get the file again; only a deepseek_v4 has several",
        )
    for key, place in (("partial_rotary_factor", table), (f"{name}.partial_rotary_factor", rope)):
        share = place.get("partial_rotary_factor")
        if share is not None and share != 1:
            raise BadInput(
                f"{where}: {key} is {shorten(share)}; a {kind} rotates all of qk_rope_head_dim",
                _SHARE,
            )
    return Rope(_stated(rope, theta), _scaling(rope, name, table, kind, where))


def _read_v4(rope: dict[str, Any], name: str, table: dict[str, Any], where: str) -> Rope:
    """V4's two rotations: `main`, which is not scaled, and `compress`, which may be.

    In a single table only the scaling counts: the bases stand at the top level.
    """
    theta = table.get("rope_theta", DEFAULT_THETA)
    _check_share(table, "", table, where)
    parts = {key: rope[key] for key in ("main", "compress") if key in rope}
    if not parts:
        if _stated(rope, theta) != theta:
            raise BadInput(
                f"{where}: {name}.rope_theta is {shorten(rope['rope_theta'])}, rope_theta is "
                f"{shorten(theta)}, and it is not clear which of a deepseek_v4's two bases the "
                "first means",
                f"state both as rope_theta and compress_rope_theta, and remove {name}.rope_theta",
            )
        _check_share(rope, f"{name}.", table, where)
        scaling = _scaling(rope, name, table, "deepseek_v4", where)
        return Rope(theta, scaling, table.get("compress_rope_theta", DEFAULT_COMPRESS_THETA))
    for key in ("main", "compress"):
        if not isinstance(parts.get(key), dict):
            raise BadInput(
                f"{where}: {name}.{key} is missing or not a table; a deepseek_v4 has the tables "
                "main and compress",
                DAMAGED,
            )
        _check_share(parts[key], f"{name}.{key}.", table, where)
    main, compress = parts["main"], parts["compress"]
    if _scaling(main, f"{name}.main", table, "deepseek_v4", where) is not None:
        raise BadInput(
            f"{where}: {name}.main is scaled; only a deepseek_v4's compress is",
            "use a checkpoint whose main rotation has rope_type default, like the published ones",
        )
    if compress.get("rope_theta") is None:
        raise BadInput(
            f"{where}: {name}.compress has no rope_theta",
            "add the base of the compressed layers; DeepSeek's is 160000",
        )
    scaling = _scaling(compress, f"{name}.compress", table, "deepseek_v4", where)
    return Rope(_stated(main, theta), scaling, compress["rope_theta"])


def _stated(rope: dict[str, Any], theta: Any) -> Any:
    """The base that the table `rope` states, or `theta` where it states none."""
    return theta if rope.get("rope_theta") is None else rope["rope_theta"]


def _check_share(rope: dict[str, Any], name: str, table: dict[str, Any], where: str) -> None:
    """Raise if the table's share of rotated values is not qk_rope_head_dim of head_dim."""
    share = rope.get("partial_rotary_factor")
    width, rotated = table.get("head_dim"), table.get("qk_rope_head_dim")
    if share is None or not isinstance(width, int) or not isinstance(rotated, int):
        return
    if not isinstance(share, int | float) or not 0 < share <= 1 or int(width * share) != rotated:
        raise BadInput(
            f"{where}: {name}partial_rotary_factor is {shorten(share)}, but qk_rope_head_dim is "
            f"{rotated} of head_dim {width}",
            _SHARE,
        )


def _scaling(
    rope: dict[str, Any], name: str, table: dict[str, Any], kind: str, where: str
) -> RopeScaling | None:
    """The scaling that the table `rope` states; None if it states none."""
    types = [rope[key] for key in ("rope_type", "type") if key in rope]
    if len(types) == 2 and types[0] != types[1]:
        raise BadInput(
            f"{where}: {name}.rope_type is {shorten(types[0])}, and {name}.type is "
            f"{shorten(types[1])}",
            "remove the one that does not belong to this checkpoint",
        )
    if not types and "factor" in rope:
        raise BadInput(
            f"{where}: {name} has a factor and no rope_type",
            f'add "rope_type": "yarn" if the checkpoint was made with it, else remove {name}',
        )
    if not types or types[0] == "default":
        return None
    if types[0] != "yarn":
        raise BadInput(
            f"{where}: {name} is of type {shorten(types[0])}, which is not implemented",
            "use a checkpoint without scaling or with yarn, like the published ones",
        )
    # A V4 has no temperature; transformers writes 1, and computes one where a table of its own form
    # does not state it.
    unsaid = None if kind != "deepseek_v4" or name.endswith(".compress") else 1.0
    for key, value, missing in (
        ("attention_factor", 1.0 if kind == "deepseek_v4" else None, unsaid),
        ("truncate", True, True),
    ):
        if rope.get(key, missing) != value:
            raise BadInput(
                f"{where}: {name}.{key} is {shorten(rope.get(key))}; only {value} is implemented",
                f"use a checkpoint with {value}, like the published ones",
            )
    return _yarn(rope, name, table, kind, where)


def _yarn(
    rope: dict[str, Any], name: str, table: dict[str, Any], kind: str, where: str
) -> RopeScaling:
    """YaRN's fields, with transformers' meaning of null and of what is missing."""
    fields = {key: rope[key] for key in RopeScaling.model_fields if key in rope} | {"type": "yarn"}
    for key in ("mscale", "mscale_all_dim"):
        if kind == "deepseek_v4":  # it scales only the frequencies
            fields.pop(key, None)
        elif fields.get(key, 0) is None:
            fields[key] = 0.0
    for key in ("beta_fast", "beta_slow"):
        if fields.get(key, 0) in (None, 0):
            fields.pop(key, None)
    length = "original_max_position_embeddings"
    lengths = [place[length] for place in (rope, table) if length in place]
    if len(lengths) == 2 and lengths[0] != lengths[1]:
        raise BadInput(
            f"{where}: {name}.{length} is {shorten(lengths[0])}, and {length} is "
            f"{shorten(lengths[1])}",
            "remove the one that does not belong to this checkpoint",
        )
    fields[length] = lengths[0] if lengths else table.get("max_position_embeddings")
    if isinstance(fields[length], float) and fields[length].is_integer():
        fields[length] = int(fields[length])
    return parse(
        RopeScaling, fields, f"{where}: {name}", f"correct that value in {where}, or get it again"
    )
