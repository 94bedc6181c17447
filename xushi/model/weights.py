"""Weights in and out, in the published Hugging Face layout: config.json and safetensors, sharded with an index or not.

Only safetensors and JSON are read. In memory experts are stacked; on disk each expert's three matrices stand alone,
as published, and MTP layers follow the decoder layers (`model.layers.<num_hidden_layers + depth - 1>`).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from xushi.base.errors import XushiError
from xushi.base.files import disk_errors, write_json
from xushi.model.attention import RotaryAngles
from xushi.model.config import read_config
from xushi.model.deepseek import Deepseek

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def published_tensors(model: Deepseek, mtp: bool = True) -> Iterator[tuple[str, Tensor]]:
    """(published name, tensor) of every weight and router bias; experts unstacked, MTP with its shared tensors."""
    config = model.config
    for name, tensor in model.state_dict().items():
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else -1
        if layer >= config.num_hidden_layers and not mtp:
            continue
        prefix, _, part = name.rpartition(".experts.")
        if part == "gate_up_proj":
            for expert, (gate, up) in enumerate(_halves(matrix) for matrix in tensor):
                yield f"{prefix}.experts.{expert}.gate_proj.weight", gate
                yield f"{prefix}.experts.{expert}.up_proj.weight", up
        elif part == "down_proj":
            for expert, matrix in enumerate(tensor):
                yield f"{prefix}.experts.{expert}.down_proj.weight", matrix
        else:
            yield name, tensor
    if mtp:
        for depth in range(config.num_nextn_predict_layers):
            layer_name = f"model.layers.{config.num_hidden_layers + depth}"
            yield f"{layer_name}.embed_tokens.weight", model.model.embed_tokens.weight.detach()
            yield f"{layer_name}.shared_head.head.weight", model.head_VD.detach()


def _halves(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = gate_up.chunk(2, dim=0)
    return gate, up


def save_pretrained(model: Deepseek, path: str | Path, mtp: bool = True) -> None:
    """Write config.json and model.safetensors into directory `path` (made if missing), in the weights' dtype.

    With `mtp=False` the MTP layers are left out and the config says zero of them.
    """
    directory = Path(path)
    published = model.config.to_published()
    if not mtp:
        published["num_nextn_predict_layers"] = 0
    published["torch_dtype"] = str(model.model.embed_tokens.weight.dtype).removeprefix("torch.")
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        # clone: safetensors refuses tensors that share memory (MTP's copies of embedding and head)
        tensors = {name: tensor.detach().clone().contiguous() for name, tensor in published_tensors(model, mtp)}
        save_file(tensors, directory / SINGLE_FILE, metadata={"format": "pt"})
    write_json(directory / "config.json", published)


def _shards(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint; an index may name files of its own directory only."""
    index = directory / INDEX_FILE
    if not index.exists():
        return [directory / SINGLE_FILE]
    try:
        weight_map: Any = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise XushiError(f"{index} cannot be read: {error!r}", "get the file again, it is damaged") from None
    for name in names:
        if name in ("", "..") or Path(name).name != name:
            raise XushiError(f"{index} names {name!r}, which is not a file of its own directory",
                             "do not trust this checkpoint; get it from its publisher")
    return [directory / name for name in names]


def load_pretrained(path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
                    ) -> Deepseek:
    """Build the model of checkpoint directory `path` and fill it, one shard's tensor at a time.

    Router biases stay float32 whatever `dtype` is. Missing, unexpected or misshapen tensors are a `XushiError`.
    """
    directory = Path(path)
    config = read_config(directory)
    with torch.device("meta"):
        model = Deepseek(config)
    try:
        model.to_empty(device=device)
    except RuntimeError as error:  # what PyTorch raises for memory that is not there
        raise XushiError(f"the model of {directory} does not fit into memory: {str(error).splitlines()[0]}",
                         "use a machine with more memory, or a smaller checkpoint", 1) from None
    model.angles = RotaryAngles(config).to(device)  # its frequencies are no weights, so no file fills them
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    targets = dict(published_tensors(model))
    filled: set[str] = set()
    for shard in _shards(directory):
        try:
            with safe_open(shard, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                    _fill(targets, filled, name, file.get_tensor(name), shard)
        except FileNotFoundError:
            raise XushiError(f"{shard} does not exist", "give a directory with safetensors weights") from None
        except (SafetensorError, OSError) as error:
            raise XushiError(f"{shard} cannot be read: {error}", "get the file again, it is damaged") from None
    optional = {name for name in targets if name.endswith((".embed_tokens.weight", ".shared_head.head.weight"))
                and name.startswith("model.layers.")}
    missing = sorted(set(targets) - filled - optional)
    if missing:
        raise XushiError(f"{directory} lacks {len(missing)} tensors, first {missing[0]}",
                         "the weights do not belong to this config.json; get both from one place")
    return model


def _fill(targets: dict[str, Tensor], filled: set[str], name: str, tensor: Tensor, shard: Path) -> None:
    if name not in targets:
        raise XushiError(f"{shard} holds {name}, which this config.json does not describe",
                         "the weights do not belong to this config.json; get both from one place")
    if targets[name].shape != tensor.shape:
        raise XushiError(f"{shard}: {name} has shape {list(tensor.shape)}, config.json asks for "
                         f"{list(targets[name].shape)}", "the weights do not belong to this config.json")
    targets[name].copy_(tensor)
    filled.add(name)
