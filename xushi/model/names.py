"""The names of tensors on disk: transformers' module names, which this model also uses in memory,
and DeepSeek's own.

Published V2, V3 and V3.2 files use transformers' names; DeepSeek's script that converts them for
its inference code writes DeepSeek's names. Published V4 files use DeepSeek's names; transformers
writes a mixture of both. Experts are stacked in memory and single tensors on disk. A tensor's
canonical name is transformers' module name with the expert's number; MTP layers are numbered after
the trunk's (`model.layers.<num_hidden_layers + depth>`).

Not here: the scales of quantised weights, except their names (quantised.py).
"""

import re
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

from torch import Tensor

from xushi.model.config import ModelConfig

Naming = Literal["published", "transformers"]

# DeepSeek's names within a layer, mapped to transformers'. An equal ending `.weight` or `.bias` is
# left out.
_COMMON = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn.gate": "mlp.gate",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    **{
        f"ffn.{kind}{one}": f"mlp.{kind}{other}"
        for kind in ("experts.*.", "shared_experts.", "")
        for one, other in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj"))
    },
}
_LATENT = _COMMON | {
    "attn.wq": "self_attn.q_proj",
    "attn.wq_a": "self_attn.q_a_proj",
    "attn.q_norm": "self_attn.q_a_layernorm",
    "attn.wq_b": "self_attn.q_b_proj",
    "attn.wkv_a": "self_attn.kv_a_proj_with_mqa",
    "attn.kv_norm": "self_attn.kv_a_layernorm",
    "attn.wkv_b": "self_attn.kv_b_proj",
    "attn.wo": "self_attn.o_proj",
    **{
        f"attn.indexer.{part}": f"self_attn.indexer.{part}"
        for part in ("wq_b", "wk", "k_norm", "weights_proj")
    },
}
_COMPRESSOR = {"wkv": "kv_proj", "wgate": "gate_proj", "ape": "position_bias", "norm": "kv_norm"}
_V4 = _COMMON | {
    "attn.wq_a": "self_attn.q_a_proj",
    "attn.q_norm": "self_attn.q_a_norm",
    "attn.wq_b": "self_attn.q_b_proj",
    "attn.wkv": "self_attn.kv_proj",
    "attn.kv_norm": "self_attn.kv_norm",
    "attn.wo_a": "self_attn.o_a_proj",
    "attn.wo_b": "self_attn.o_b_proj",
    "attn.attn_sink": "self_attn.sinks",
    "ffn.gate.tid2eid": "mlp.gate.tid2eid",
    **{
        f"attn.compressor.{one}": f"self_attn.compressor.{other}"
        for one, other in _COMPRESSOR.items()
    },
    **{
        f"attn.indexer.compressor.{one}": f"self_attn.compressor.indexer.{other}"
        for one, other in _COMPRESSOR.items()
    },
    "attn.indexer.wq_b": "self_attn.compressor.indexer.q_b_proj",
    "attn.indexer.weights_proj": "self_attn.compressor.indexer.scorer.weights_proj",
    **{
        f"hc_{block}_{part}": f"{block}_hc.{part}"
        for block in ("attn", "ffn")
        for part in ("fn", "base", "scale")
    },
    # only in MTP layers
    **{f"hc_head_{part}": f"hc_head.hc_{part}" for part in ("fn", "base", "scale")},
}
_V4_WRITTEN = {other: one for one, other in _V4.items()}
# Names that are read but never written: transformers' name of kv_norm, and an MTP layer's copies of
# embedding and head.
_V4_READ = _V4 | {
    "attn.norm": "self_attn.kv_norm",
    "embed": "embed_tokens",
    "emb.tok_emb": "embed_tokens",
    "head": "shared_head.head",
}
_TOP = {
    "embed": "model.embed_tokens",
    "head": "lm_head",
    "norm": "model.norm",
    **{f"hc_head_{part}": f"model.hc_head.hc_{part}" for part in ("fn", "base", "scale")},
}
_TOP_WRITTEN = {other: one for one, other in _TOP.items()}

_LAYER = re.compile(r"(?:model\.)?(layers|mtp)\.(0|[1-9][0-9]{0,5})\.(.+)")
_EXPERT = re.compile(r"(.*\.experts)\.(0|[1-9][0-9]{0,8})\.(.+)")
# V4's `_keep_in_fp32_modules_strict` in transformers, and the norms that only MTP layers have.
_FLOAT32_PARTS = frozenset(
    (
        "attn_hc",
        "ffn_hc",
        "hc_head",
        "sinks",
        "position_bias",
        "e_score_correction_bias",
        "q_a_norm",
        "kv_norm",
        "input_layernorm",
        "post_attention_layernorm",
        "norm",
        "enorm",
        "hnorm",
    )
)


class Place(NamedTuple):
    """Where a tensor of a file belongs in memory: a whole parameter or buffer, or one expert's part
    of it.
    """

    parameter: str
    shape: tuple[int, ...]
    expert: int | None = None
    half: int | None = None  # half of gate_up_proj's rows: 0 is the gate, 1 is up

    def of(self, tensor: Tensor) -> Tensor:
        """This place's part of the parameter `tensor`, as a view."""
        if self.expert is None:
            return tensor
        matrix = tensor[self.expert]
        return matrix if self.half is None else matrix.chunk(2)[self.half]


def places(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Place]]:
    """(canonical name, place) of every tensor of a state dict, each expert's matrices by
    themselves.
    """
    for name, tensor in state.items():
        prefix, _, part = name.rpartition(".experts.")
        if part not in ("gate_up_proj", "down_proj"):
            yield name, Place(name, tuple(tensor.shape))
            continue
        experts, rows, columns = tensor.shape
        for expert in range(experts):
            if part == "down_proj":
                yield (
                    f"{prefix}.experts.{expert}.down_proj.weight",
                    Place(name, (rows, columns), expert),
                )
                continue
            for half, matrix in enumerate(("gate_proj", "up_proj")):
                yield (
                    f"{prefix}.experts.{expert}.{matrix}.weight",
                    Place(name, (rows // 2, columns), expert, half),
                )


def shared_copies(config: ModelConfig) -> dict[str, str]:
    """The canonical names of the copies of embedding and head that MTP layers may have, mapped to
    the originals.
    """
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    layers = (
        f"model.layers.{config.num_hidden_layers + d}"
        for d in range(config.num_nextn_predict_layers)
    )
    return {
        f"{layer}.{part}": shared
        for layer in layers
        for part, shared in (
            ("embed_tokens.weight", "model.embed_tokens.weight"),
            ("shared_head.head.weight", head),
        )
    }


def layer_of(canonical: str) -> int | None:
    """The number of the layer that a canonical name belongs to; None outside of layers."""
    found = _LAYER.fullmatch(canonical)
    return int(found[2]) if found else None


def canonical_name(name: str, config: ModelConfig) -> tuple[str, bool]:
    """(canonical name, whether it is a scale) of a tensor's name in a file, in any naming.

    A scale gets the canonical name of its weight. An unknown name is returned unchanged.
    """
    scale = False
    for suffix in (".weight_scale_inv", ".scale"):
        # V4's parameters attn_hc.scale and ffn_hc.scale are no scales of quantised weights.
        if name.endswith(suffix) and not name.endswith("_hc.scale"):
            name = name.removesuffix(suffix) + ".weight"
            scale = True
            break
    found = _LAYER.fullmatch(name)
    if found is None:
        return _translate(name.removeprefix("model."), _TOP, fallback=name), scale
    kind, number, part = found.groups()
    if kind == "mtp" and not config.is_v4:
        return name, scale
    layer = int(number) + (config.num_hidden_layers if kind == "mtp" else 0)
    return f"model.layers.{layer}.{_translate(part, _V4_READ if config.is_v4 else _LATENT)}", scale


def written_name(canonical: str, config: ModelConfig, naming: Naming) -> str:
    """A canonical name as it is written to a checkpoint: as DeepSeek publishes this model_type, or
    as transformers writes it.

    The two differ only for V4. V4's MTP layers are `mtp.<depth>` in both, since transformers has no
    names for them.
    """
    if not config.is_v4:
        return canonical
    found = _LAYER.fullmatch(canonical)
    if found is None:
        if naming == "transformers" and canonical != "lm_head.weight":
            return canonical
        return _translate(canonical, _TOP_WRITTEN)
    layer = int(found[2])
    part = _translate(found[3], _V4_WRITTEN)
    if layer >= config.num_hidden_layers:
        return f"mtp.{layer - config.num_hidden_layers}.{part}"
    if naming == "published":
        return f"layers.{layer}.{part}"
    return f"model.layers.{layer}.{'attn.norm.weight' if part == 'attn.kv_norm.weight' else part}"


def _translate(name: str, table: Mapping[str, str], fallback: str | None = None) -> str:
    """Look up `name` in a table whose names have no `.weight` or `.bias` and * for an expert's
    number.

    Returns `fallback` if it is not found (None: `name` itself).
    """
    found = _EXPERT.fullmatch(name)
    pattern, number = (f"{found[1]}.*.{found[3]}", found[2]) if found else (name, "")
    for leaf in ("", ".weight", ".bias"):
        stem = pattern.removesuffix(leaf)
        if pattern.endswith(leaf) and stem in table:
            return table[stem].replace("*", number) + leaf
    return name if fallback is None else fallback


def stays_float32(parameter: str, config: ModelConfig) -> bool:
    """Whether a parameter stays float32 when the rest of the model has another dtype."""
    return config.is_v4 and not _FLOAT32_PARTS.isdisjoint(parameter.split("."))
