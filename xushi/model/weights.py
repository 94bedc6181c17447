"""Weights in and out, in the published layouts: config.json and safetensors, sharded with an index
or not.

Only safetensors and JSON are read, from the checkpoint's own directory. What the files hold is
compared with what the config describes before the model gets any memory; then it is filled tensor
by tensor, quantised ones on the way.

Not here: the names (names.py), the file format (shards.py), FP8 and FP4 (quantised.py).
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from xushi.base.errors import BadInput, Failed, XushiError
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
    """One tensor of the files and where it goes; `block` is what each number of its scale stands
    for.
    """

    place: Place
    stored: Stored
    scale: Stored | None
    block: tuple[int, int]


def load_pretrained(
    path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Deepseek:
    """Build the model of checkpoint directory `path` in `dtype`, from whichever published layout it
    is in.

    Router biases, and in V4 the norms, sinks and hyper-connections, stay float32
    (`names.stays_float32`). FP8 and FP4 weights get their values back. Memory: the model, and one
    tensor with its scale. Whatever does not fit together, within the files or with config.json, is
    a `XushiError`, and before the model gets any memory.

    MTP layers must be there, as many as config.json says; the copies of embedding and head that
    they may hold are not read, as those of the trunk are used.
    """
    directory = Path(path)
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise BadInput(
            f"{directory} cannot be loaded as {dtype}",
            "give torch.bfloat16, float16, float32 or float64",
        )
    if os.path.lexists(directory / "config.json"):
        checked_file(directory, "config.json", LARGEST_JSON)
    config = read_config(directory)
    block = fp8_block(read_json(directory, "config.json"), str(directory / "config.json"))
    matrices = (config.num_hidden_layers + config.num_nextn_predict_layers) * (
        3 * config.n_routed_experts + 64
    )
    stored = read_headers(
        directory, min(LARGEST_JSON, 2**20 + 1024 * matrices)
    )  # weight and scale, 512 bytes each
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


def _by_canonical_name(
    stored: dict[str, Stored], config: ModelConfig, directory: Path
) -> tuple[dict[str, Stored], dict[str, Stored]]:
    """(weights, scales) of the files, each under the canonical name of the weight."""
    found: tuple[dict[str, Stored], dict[str, Stored]] = ({}, {})
    for name, tensor in stored.items():
        if is_ignored(name, config):
            continue
        canonical, is_scale = canonical_name(name, config)
        if canonical in found[is_scale]:
            raise BadInput(
                f"{tensor.file} holds {shown(name)}, which is "
                f"{shown(found[is_scale][canonical].name)} by "
                "another name",
                "remove the file that does not belong to this checkpoint",
            )
        found[is_scale][canonical] = tensor
    depth, extra = config.num_hidden_layers, config.num_nextn_predict_layers
    if (
        extra
        and found[0]
        and not any((layer_of(canonical) or 0) >= depth for canonical in found[0])
    ):
        raise BadInput(
            f"{directory} holds no MTP layers, and its config.json says "
            f"num_nextn_predict_layers={extra}",
            "set num_nextn_predict_layers to 0 in config.json (num_mtp_layers, where it says that)",
        )
    return found


def _without_memory(
    config: ModelConfig, dtype: torch.dtype, tensors: int, directory: Path
) -> Deepseek:
    """The model on the meta device, its parameters in the dtypes that they will have."""
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    if layers * 8 > tensors:  # a layer has more, so this bounds the work that a config can ask for
        raise BadInput(
            f"{directory / 'config.json'} describes {layers} layers, and the files hold {tensors} "
            "tensors",
            _ELSEWHERE,
        )
    try:
        with torch.device("meta"):
            model = Deepseek(config)
    except (
        RuntimeError,
        TypeError,
        ValueError,
        ArithmeticError,
    ) as error:  # sizes and numbers that cannot be
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
    """Every tensor of the model with what the files have for it; a `XushiError` where they and the
    config differ.
    """
    weights, scales, parts = dict(weights), dict(scales), []
    state, config = model.state_dict(), model.config
    for name, place in places(state):
        stored, scale = weights.pop(name, None), scales.pop(name, None)
        if stored is None:
            raise BadInput(
                f"{directory} lacks {written_name(name, config, 'published')}", _ELSEWHERE
            )
        if place.parameter.endswith(".tid2eid"):
            _check_table(stored, scale, place)
        else:
            check_weight(
                stored, scale, place.shape, block, config.is_v4 and place.expert is not None
            )
        parts.append(Part(place, stored, scale, block_of(stored, block)))
    for name, original in shared_copies(config).items():
        if name in weights:
            check_weight(
                weights.pop(name),
                scales.pop(name, None),
                tuple(state[original].shape),
                block,
                False,
            )
    for left in (weights, scales):
        for stored in left.values():
            raise BadInput(
                f"{stored.file} holds {shown(stored.name)}, which this config.json does not "
                "describe",
                _ELSEWHERE,
            )
    return parts


def _check_table(stored: Stored, scale: Stored | None, place: Place) -> None:
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
    except (RuntimeError, MemoryError) as error:  # PyTorch's own is a RuntimeError
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        raise _too_large(directory, str(error).partition("\n")[0]) from None


def _too_large(directory: Path, why: str) -> XushiError:
    return Failed(
        f"the model of {directory} does not fit into memory: {why}",
        "use a machine with more memory, a smaller dtype or a smaller checkpoint",
    )


def _allocate(model: Deepseek, device: torch.device | str) -> None:
    needed = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    total = inspect().memory_total
    if torch.device(device).type == "cpu" and total is not None and needed > total:
        # The system may grant what it has not, and end the process when it is used.
        raise MemoryError(f"it has {needed} bytes, the machine {total}")
    model.to_empty(device=device)
    model.make_angles(device)


def _fill(part: Part, tensor: Tensor, config: ModelConfig) -> None:
    target, values = part.place.of(tensor), part.stored.read()
    if part.scale is not None:
        dequantise(target, values, part.scale.read(), part.block)
        return
    if not values.dtype.is_floating_point and not bool(
        ((values >= 0) & (values < config.n_routed_experts)).all()
    ):
        raise BadInput(
            f"{part.stored.file}: {shown(part.stored.name)} sends a token to an expert that is "
            "not there; "
            f"config.json says n_routed_experts={config.n_routed_experts}",
            _ELSEWHERE,
        )
    target.copy_(values)


def published_tensors(
    model: Deepseek, mtp: bool = True, names: Naming = "published"
) -> Iterator[tuple[str, Tensor]]:
    """(name in a file, tensor) of every weight and router bias; experts unstacked.

    MTP layers of V3 and V3.2 come with copies of embedding and head, those of V4 without, as they
    are published.
    """
    config, state = model.config, model.state_dict()
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

    One file up to `shard_bytes`, else several with an index. transformers loads either naming; they
    differ for V4 alone: `published` is what DeepSeek's and other engines' code reads,
    `transformers` what that writes itself. With `mtp=False` the MTP layers are left out and the
    config says zero of them.

    All files are written aside first; an older checkpoint's in the same place go when these are
    whole, and config.json, without which nothing is a checkpoint, comes last. Memory: one tensor
    beyond the model.
    """
    directory, config = Path(path), model.config
    if names not in get_args(Naming):
        raise BadInput(
            f"{directory} cannot be written in the names {names!r}",
            f"the names are {' and '.join(get_args(Naming))}",
        )
    if not mtp:
        ratios = (
            None
            if config.compress_ratios is None
            else config.compress_ratios[: config.num_hidden_layers]
        )
        config = config.model_copy(
            update={"num_nextn_predict_layers": 0, "compress_ratios": ratios}
        )
    table = to_published(config) | {
        "torch_dtype": str(model.model.embed_tokens.weight.dtype).removeprefix("torch.")
    }
    shards = _divide(published_tensors(model, mtp, names), shard_bytes)
    with disk_errors(directory), _aside(directory) as aside:
        for name, tensors in shards.items():
            write_shard(aside / name, tensors)
        if len(shards) > 1:
            total = sum(
                t.numel() * t.element_size() for tensors in shards.values() for _, t in tensors
            )
            index = {
                "metadata": {"total_size": total},
                "weight_map": {t: name for name, tensors in shards.items() for t, _ in tensors},
            }
            write_json(aside / INDEX_FILE, index)
        write_json(aside / "config.json", table)
        _put_in_place(aside, directory)


def _divide(
    tensors: Iterator[tuple[str, Tensor]], shard_bytes: int
) -> dict[str, list[tuple[str, Tensor]]]:
    """File names and what goes into each: tensors in their order, as many as `shard_bytes` allow,
    one at least.
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
def _aside(directory: Path) -> Iterator[Path]:
    """A directory within `directory`, gone afterwards, whatever happens; what a kill left there
    goes too.
    """
    aside = directory / ".saving.partial"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise BadInput(
            f"{directory} cannot be written: {error.filename} is in the way",
            "give a directory that is free, or one with a checkpoint to replace",
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _put_in_place(aside: Path, directory: Path) -> None:
    """Move whole files in, so that at no moment old and new ones together look like a checkpoint."""
    (directory / "config.json").unlink(missing_ok=True)
    fsync_path(directory)
    for old in [
        directory / INDEX_FILE,
        directory / SINGLE_FILE,
        *directory.glob("model-*-of-*.safetensors"),
    ]:
        old.unlink(missing_ok=True)
    for name in sorted(os.listdir(aside), key=lambda name: name == "config.json"):
        if name == "config.json":
            fsync_path(directory)
        os.replace(aside / name, directory / name)
    fsync_path(directory)
