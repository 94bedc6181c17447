"""Which tensors of a checkpoint's files are loaded, under which canonical names, and which are left
out: MTP layers that nobody wants, and known leftovers.

Not here: whether the tensors fit the model (weights.py), tensor names (names.py).
"""

import dataclasses
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xushi.base.errors import BadInput
from xushi.base.published_files import FROM_ELSEWHERE, shown
from xushi.model.config import ModelConfig
from xushi.model.config_keys import OTHER_DRAFTS
from xushi.model.names import canonical_name, layer_of
from xushi.model.shards import Stored, same_bytes

# Tensors that other programs wrote and that a model computes from its config.
_COMPUTED = re.compile(r".*\.rotary_emb\.(?:inv_freq|cos_cached|sin_cached)")
_STACKED = re.compile(r".*\.experts\.(gate_up_proj|down_proj)(?:\.weight)?(_scale_inv)?")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# The matrix that only an MTP layer has: V3's, and V4's.
_OF_MTP = (".eh_proj.weight", ".e_proj.weight")


@dataclass
class Contents:
    """`weights` and `scales` by the weight's canonical name, and the config that they are for, with
    fewer MTP layers than config.json says if files have fewer. `notes`: what the user should know.
    """

    config: ModelConfig
    weights: dict[str, Stored] = field(default_factory=dict)
    scales: dict[str, Stored] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def sort_tensors(
    stored: dict[str, Stored],
    config: ModelConfig,
    table: dict[str, Any],
    directory: Path,
    mtp: bool | None,
    fp8_rows: int,
) -> Contents:
    """Sort the tensors of the files in `directory`. `table` is config.json; `mtp` as in
    `load_pretrained`; `fp8_rows`: the rows of an FP8 block.
    """
    contents = Contents(config)
    left_out: Counter[str] = Counter()
    other_drafts = config.is_v4 and any(key.startswith(OTHER_DRAFTS) for key in table)
    for name, tensor in stored.items():
        if _COMPUTED.fullmatch(name):
            left_out[f"*.{name.rpartition('.rotary_emb.')[2]}"] += 1
        elif other_drafts and name.startswith("mtp."):
            left_out["mtp.*, draft models of another kind than MTP"] += 1
        else:
            for part in _unstacked(tensor, config, fp8_rows):
                _add(part, contents)
    _choose_mtp(contents, directory, mtp, other_drafts, left_out)
    _leave_out_tied_head(contents, left_out)
    if left_out:
        counted = "; ".join(f"{count} x {what}" for what, count in sorted(left_out.items()))
        contents.notes.append(f"{directory}: tensors that are not read: {counted}")
    return contents


def _unstacked(tensor: Stored, config: ModelConfig, fp8_rows: int) -> list[Stored]:
    """A tensor as transformers stacks experts, `[E, 2F, D]` or `[E, D, F]`, or their scales, as
    those of each expert's matrices; another tensor as it is.
    """
    found = _STACKED.fullmatch(tensor.name)
    if found is None or len(tensor.shape) != 3:
        return [tensor]
    experts, rows, columns = tensor.shape
    gated, scale = found[1] == "gate_up_proj", found[2] or ""
    if experts != config.n_routed_experts or (gated and rows % 2 and not scale):
        raise BadInput(
            f"{tensor.file}: {shown(tensor.name)} has shape {list(tensor.shape)}, config.json says "
            f"n_routed_experts={config.n_routed_experts}",
            FROM_ELSEWHERE,
        )
    width = config.moe_intermediate_size
    if gated and scale and rows != 2 * width and (rows % 2 or width % fp8_rows):
        raise BadInput(
            f"{tensor.file}: {shown(tensor.name)} has shape {list(tensor.shape)}: FP8 blocks of "
            f"{fp8_rows} rows lie across gate_proj and up_proj, which have {width} rows each",
            "use a checkpoint whose experts are single tensors (transformers: save_pretrained with "
            "save_original_format=True), or one in bfloat16",
        )
    prefix = tensor.name[: found.start(1)]
    matrices = ("gate_proj", "up_proj") if gated else ("down_proj",)
    rows //= len(matrices)
    size = tensor.size // (experts * len(matrices))
    return [
        dataclasses.replace(
            tensor,
            name=f"{prefix}{expert}.{matrix}.weight{scale}",
            shape=(rows, columns),
            begin=tensor.begin + (expert * len(matrices) + number) * size,
            size=size,
        )
        for expert in range(experts)
        for number, matrix in enumerate(matrices)
    ]


def _add(tensor: Stored, contents: Contents) -> None:
    canonical, is_scale = canonical_name(tensor.name, contents.config)
    found = contents.scales if is_scale else contents.weights
    if canonical in found:
        raise BadInput(
            f"{tensor.file} holds {shown(tensor.name)}, which is another name of "
            f"{shown(found[canonical].name)}",
            "remove the file that does not belong to this checkpoint",
        )
    found[canonical] = tensor


def _choose_mtp(
    contents: Contents,
    directory: Path,
    mtp: bool | None,
    other_drafts: bool,
    left_out: Counter[str],
) -> None:
    """Leave out MTP layers that config.json does not ask for or that are not wanted, and take them
    from the config if the files have none.
    """
    config = contents.config
    trunk, asked = config.num_hidden_layers, config.num_nextn_predict_layers
    beyond = {name for name in contents.weights if (layer_of(name) or 0) >= trunk}
    extra = _mtp_layers(contents, beyond)
    if mtp and not (asked and extra):
        missing = "files hold no MTP layers" if asked else "config.json says that there are none"
        raise BadInput(
            f"{directory}: MTP layers were asked for, and its {missing}",
            "load it with mtp=False or without that choice",
        )
    if asked and not beyond and mtp is None and not other_drafts:
        contents.notes.append(
            f"{directory} is loaded without MTP: config.json says num_nextn_predict_layers="
            f"{asked}, and the files hold no MTP layers"
        )
    wanted = asked if beyond and mtp is not False else 0
    if wanted < asked:
        contents.config = config.without_mtp()
    unwanted = {layer for layer in extra if layer >= trunk + wanted}
    for tensors in (contents.weights, contents.scales):
        for name in [name for name in tensors if layer_of(name) in unwanted]:
            del tensors[name]
            if mtp is None:
                left_out["a tensor of an MTP layer that config.json does not name"] += 1


def _mtp_layers(contents: Contents, beyond: set[str]) -> set[int]:
    """The numbers of the MTP layers among the tensors `beyond` the trunk. The layers of a longer
    trunk are none: they belong to another config.json.
    """
    return {
        layer_of(name) or 0
        for name in beyond
        if name.endswith(_OF_MTP) or contents.weights[name].name.startswith("mtp.")
    }


def _leave_out_tied_head(contents: Contents, left_out: Counter[str]) -> None:
    """Leave out the head's own copy of an embedding that is tied; it must be equal."""
    weights = contents.weights
    if not contents.config.tie_word_embeddings or not {_HEAD, _EMBEDDING} <= weights.keys():
        return
    head, embedding = weights[_HEAD], weights[_EMBEDDING]
    if not same_bytes(head, embedding):
        raise BadInput(
            f"{head.file}: {shown(head.name)} differs from {shown(embedding.name)}, but "
            "config.json says tie_word_embeddings=true",
            "set tie_word_embeddings to false in config.json if the model has a head of its own",
        )
    del weights[_HEAD]
    left_out[f"{shown(head.name)}, equal to {shown(embedding.name)}"] += 1
