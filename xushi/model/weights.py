"""Weights in and out in the published layouts: config.json and safetensors, in one file or in
shards with an index.

Only safetensors and JSON of the checkpoint's own directory are read. The headers of the files are
compared with config.json before the model gets any memory. Then the model is filled tensor by
tensor, and quantised tensors are converted on the way.

Not here: tensor names (names.py), the file format (shards.py), FP8 and FP4 (quantised.py).
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from xushi.base.errors import BadInput, Failed
from xushi.base.files import disk_errors, fsync_path, write_json
from xushi.base.machine import inspect
from xushi.model.config import ModelConfig
from xushi.model.deepseek import Deepseek
from xushi.model.names import (
    Naming,
    Place,
    canonical_name,
    is_ignored,
    layer_of,
    places,
    shared_copies,
    stays_float32,
    written_name,
)
from xushi.model.published import read_config, to_published
from xushi.model.quantised import block_of, check_weight, dequantise, fp8_block
from xushi.model.shards import (
    INDEX_FILE,
    LARGEST_JSON,
    Stored,
    checked_file,
    read_headers,
    read_json,
    shown,
    write_shard,
)

SINGLE_FILE = "model.safetensors"
SHARD_BYTES = 4 * 2**30
_ELSEWHERE = "the weights do not belong to this config.json; get both from one place"


@dataclass(frozen=True)
class Part:
    """One tensor of the files and its place in the model. `block`: rows and columns that share one
    number of `scale`.
    """

    place: Place
    stored: Stored
    scale: Stored | None
    block: tuple[int, int]


def load_pretrained(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Deepseek:
    """Build the model of checkpoint directory `path` in `dtype` (None: float32), from any of the
    published layouts.

    Router biases, and V4's norms, sinks and hyper-connections, stay float32
    (`names.stays_float32`). FP8 and FP4 weights are converted. Memory: the model, and one tensor
    with its scale. If the files contradict each other or config.json, a `XushiError` is raised
    before the model gets any memory.

    The files must hold as many MTP layers as config.json says. The copies of embedding and head
    that an MTP layer may have are not read, since the trunk's are used.
    """
    directory = Path(path)
    dtype = dtype or torch.float32
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise BadInput(
            f"{directory} cannot be loaded as {dtype}",
            "give torch.bfloat16, float16, float32 or float64",
        )
    if os.path.lexists(directory / "config.json"):
        checked_file(directory, "config.json", LARGEST_JSON)
    config = read_config(directory)
    block = fp8_block(read_json(directory, "config.json"), str(directory / "config.json"))
    stored = read_headers(directory, _largest_header(config))
    weights, scales = _by_canonical_name(stored, config, directory)
    model = _without_memory(config, dtype, len(stored), directory)
    parts = _match(model, weights, scales, block, directory)
    with _memory_errors(directory):
        _allocate(model, device)
        state = model.state_dict()
        with torch.no_grad():
            for part in sorted(parts, key=lambda each: (each.stored.file, each.stored.begin)):
                _fill(part, state[part.place.parameter], config)
    return model


def _largest_header(config: ModelConfig) -> int:
    """Bytes that a file's header may have: 1 MiB, and 512 for each matrix and for its scale."""
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    matrices = layers * (3 * config.n_routed_experts + 64)
    return min(LARGEST_JSON, 2**20 + 1024 * matrices)


def _by_canonical_name(
    stored: dict[str, Stored], config: ModelConfig, directory: Path
) -> tuple[dict[str, Stored], dict[str, Stored]]:
    """(weights, scales) of the files, each under the weight's canonical name."""
    weights: dict[str, Stored] = {}
    scales: dict[str, Stored] = {}
    for name, tensor in stored.items():
        if is_ignored(name, config):
            continue
        canonical, is_scale = canonical_name(name, config)
        found = scales if is_scale else weights
        if canonical in found:
            raise BadInput(
                f"{tensor.file} holds {shown(name)}, which is another name of "
                f"{shown(found[canonical].name)}",
                "remove the file that does not belong to this checkpoint",
            )
        found[canonical] = tensor
    mtp = config.num_nextn_predict_layers
    has_mtp = any((layer_of(name) or 0) >= config.num_hidden_layers for name in weights)
    if mtp and weights and not has_mtp:
        raise BadInput(
            f"{directory} holds no MTP layers, but its config.json says "
            f"num_nextn_predict_layers={mtp}",
            "set num_nextn_predict_layers to 0 in config.json (or num_mtp_layers, if it has that)",
        )
    return weights, scales


def _without_memory(
    config: ModelConfig, dtype: torch.dtype, tensors: int, directory: Path
) -> Deepseek:
    """The model on the meta device, with its parameters' final dtypes. `tensors`: how many the
    files hold.
    """
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    # Every layer has more than 8 tensors, so this bounds the work that a config can cause.
    if layers * 8 > tensors:
        raise BadInput(
            f"{directory / 'config.json'} describes {layers} layers, but the files hold only "
            f"{tensors} tensors",
            _ELSEWHERE,
        )
    try:
        with torch.device("meta"):
            model = Deepseek(config)
    except (RuntimeError, TypeError, ValueError, ArithmeticError) as error:  # impossible sizes
        raise BadInput(
            f"{directory / 'config.json'} describes a model that cannot be built: "
            f"{shown(str(error).partition(chr(10))[0])}",
            "get the file again, it is damaged",
        ) from None
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if stays_float32(name, config) else dtype)
    return model


def _match(
    model: Deepseek,
    weights: dict[str, Stored],
    scales: dict[str, Stored],
    block: tuple[int, int],
    directory: Path,
) -> list[Part]:
    """The parts to load, one for each tensor of the model; a `XushiError` if files and config
    differ.
    """
    weights = dict(weights)
    scales = dict(scales)
    parts = []
    config = model.config
    state = model.state_dict()
    for name, place in places(state):
        stored = weights.pop(name, None)
        scale = scales.pop(name, None)
        if stored is None:
            raise BadInput(
                f"{directory} lacks {written_name(name, config, 'published')}", _ELSEWHERE
            )
        if place.parameter.endswith(".tid2eid"):
            _check_table(stored, scale, place)
        else:
            may_be_fp4 = config.is_v4 and place.expert is not None
            check_weight(stored, scale, place.shape, block, may_be_fp4)
        parts.append(Part(place, stored, scale, block_of(stored, block)))
    for name, original in shared_copies(config).items():
        if name in weights:
            shape = tuple(state[original].shape)
            check_weight(weights.pop(name), scales.pop(name, None), shape, block, False)
    for stored in (*weights.values(), *scales.values()):
        raise BadInput(
            f"{stored.file} holds {shown(stored.name)}, which this config.json does not describe",
            _ELSEWHERE,
        )
    return parts


def _check_table(stored: Stored, scale: Stored | None, place: Place) -> None:
    """Check a hash layer's table of experts by token id."""
    if (
        stored.dtype not in (torch.int32, torch.int64)
        or stored.shape != place.shape
        or scale is not None
    ):
        raise BadInput(
            f"{stored.file}: {shown(stored.name)} is {stored.dtype} of shape {list(stored.shape)}; "
            f"config.json asks for whole numbers of shape {list(place.shape)}",
            _ELSEWHERE,
        )


@contextlib.contextmanager
def _memory_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # PyTorch raises RuntimeError when out of memory
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        reason = str(error).partition("\n")[0]
        raise Failed(
            f"the model of {directory} does not fit into memory: {reason}",
            "use a machine with more memory, a smaller dtype or a smaller checkpoint",
        ) from None


def _allocate(model: Deepseek, device: torch.device | str) -> None:
    needed = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    total = inspect().memory_total
    if torch.device(device).type == "cpu" and total is not None and needed > total:
        # Linux may promise memory that it does not have and kill the process that uses it.
        raise MemoryError(f"it has {needed} bytes, the machine {total}")
    model.to_empty(device=device)
    model.make_angles(device)


def _fill(part: Part, tensor: Tensor, config: ModelConfig) -> None:
    target = part.place.of(tensor)
    values = part.stored.read()
    if part.scale is not None:
        dequantise(target, values, part.scale.read(), part.block)
        return
    if not values.dtype.is_floating_point and not bool(
        ((values >= 0) & (values < config.n_routed_experts)).all()
    ):
        raise BadInput(
            f"{part.stored.file}: {shown(part.stored.name)} sends a token to an expert that does "
            f"not exist; config.json says n_routed_experts={config.n_routed_experts}",
            _ELSEWHERE,
        )
    target.copy_(values)


def published_tensors(
    model: Deepseek, mtp: bool = True, names: Naming = "published"
) -> Iterator[tuple[str, Tensor]]:
    """(name in a file, tensor) of every weight and router bias; each expert's matrices by
    themselves.

    MTP layers of V3 and V3.2 come with copies of embedding and head and those of V4 without, as
    they are published.
    """
    config = model.config
    state = model.state_dict()
    for name, place in places(state):
        if mtp or (layer_of(name) or 0) < config.num_hidden_layers:
            yield written_name(name, config, names), place.of(state[place.parameter])
    if mtp and not config.is_v4:
        for name, original in shared_copies(config).items():
            yield name, state[original]


def save_pretrained(
    model: Deepseek,
    path: str | Path,
    mtp: bool = True,
    names: Naming = "published",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write config.json and the weights, in their dtypes, into directory `path` (made if missing).

    Weights go into one file if they fit into `shard_bytes`, else into shards with an index. The two
    namings differ only for V4: `published` is what DeepSeek's code and other engines read,
    `transformers` is what transformers writes; transformers loads both. With `mtp=False` the MTP
    layers are left out and config.json says that there are none.

    All files are first written to a temporary directory. An older checkpoint in `path` is removed
    once they are complete. config.json is moved in last: without it a directory does not count as a
    checkpoint. Memory: one tensor beyond the model.
    """
    directory = Path(path)
    if names not in get_args(Naming):
        raise BadInput(
            f"{directory} cannot be written with the names {names!r}",
            f"use one of {', '.join(get_args(Naming))}",
        )
    config = model.config if mtp else _without_mtp(model.config)
    table = to_published(config) | {
        "torch_dtype": str(model.model.embed_tokens.weight.dtype).removeprefix("torch.")
    }
    shards = _divide(published_tensors(model, mtp, names), shard_bytes)
    with disk_errors(directory), _temporary(directory) as temporary:
        for name, tensors in shards.items():
            write_shard(temporary / name, tensors)
        if len(shards) > 1:
            write_json(temporary / INDEX_FILE, _index(shards))
        write_json(temporary / "config.json", table)
        _put_in_place(temporary, directory)


def _without_mtp(config: ModelConfig) -> ModelConfig:
    ratios = config.compress_ratios
    if ratios is not None:
        ratios = ratios[: config.num_hidden_layers]
    return config.model_copy(update={"num_nextn_predict_layers": 0, "compress_ratios": ratios})


def _index(shards: dict[str, list[tuple[str, Tensor]]]) -> dict[str, Any]:
    tensors = [tensor for shard in shards.values() for _, tensor in shard]
    return {
        "metadata": {"total_size": sum(t.numel() * t.element_size() for t in tensors)},
        "weight_map": {name: file for file, shard in shards.items() for name, _ in shard},
    }


def _divide(
    tensors: Iterator[tuple[str, Tensor]], shard_bytes: int
) -> dict[str, list[tuple[str, Tensor]]]:
    """The tensors of each file, by file name. A file gets as many as fit into `shard_bytes`, in
    order, and at least one.
    """
    shards: list[list[tuple[str, Tensor]]] = [[]]
    size = 0
    for name, tensor in tensors:
        own = tensor.numel() * tensor.element_size()
        if shards[-1] and size + own > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((name, tensor))
        size += own
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {
        f"model-{i + 1:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards)
    }


@contextlib.contextmanager
def _temporary(directory: Path) -> Iterator[Path]:
    """A temporary directory within `directory`, always removed at the end. Removes first what a
    killed process left there.
    """
    temporary = directory / ".saving.partial"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise BadInput(
            f"{directory} cannot be written: {error.filename} is in the way",
            "give a new directory, or one with a checkpoint to replace",
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put_in_place(temporary: Path, directory: Path) -> None:
    """Move the complete files in. At no moment do old and new files together look like a
    checkpoint, because config.json is removed first and comes back last.
    """
    (directory / "config.json").unlink(missing_ok=True)
    fsync_path(directory)
    for old in [
        directory / INDEX_FILE,
        directory / SINGLE_FILE,
        *directory.glob("model-*-of-*.safetensors"),
    ]:
        old.unlink(missing_ok=True)
    for name in sorted(os.listdir(temporary), key=lambda name: name == "config.json"):
        if name == "config.json":
            fsync_path(directory)
        os.replace(temporary / name, directory / name)
    fsync_path(directory)
