"""Weights in, from the published layouts: config.json and safetensors, in one file or in
shards with an index.

Only safetensors and JSON of the checkpoint's own directory are read. The headers of the files are
compared with config.json before the model gets any memory. Then the model is filled tensor by
tensor, and quantised tensors are converted on the way.

Not here: tensor names (names.py), the file format (shards.py), FP8 and FP4 (quantised.py), writing
(saving.py).
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xushi.base.errors import BadInput, Failed
from xushi.base.files import disk_errors
from xushi.base.progress import say
from xushi.base.published_files import DAMAGED, FROM_ELSEWHERE, LARGEST_JSON, shown
from xushi.model.building import allocate, model_without_memory
from xushi.model.config import ModelConfig
from xushi.model.contents import sort_tensors
from xushi.model.deepseek import Deepseek
from xushi.model.formats import refuse_adapter, refuse_other_quantisations, refuse_other_tensors
from xushi.model.names import (
    Place,
    places,
    shared_copies,
    written_name,
)
from xushi.model.published import from_published, read_table, unread_note
from xushi.model.quantised import block_of, check_weight, dequantise, fp8_block
from xushi.model.saving import finish_save
from xushi.model.shards import Stored, read_headers


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
    mtp: bool | None = None,
) -> Deepseek:
    """Build the model of checkpoint directory `path` in `dtype` (None: float32), from any of the
    published layouts.

    Router biases, and V4's norms, sinks and hyper-connections, stay float32
    (`names.stays_float32`). FP8 and FP4 weights are converted. Memory: the model, and one tensor
    with its scale. If the files contradict each other or config.json, a `XushiError` is raised
    before the model gets any memory.

    `mtp`: None loads the MTP layers if both config.json and the files have them; what is left out
    is said on standard error. True demands them, False leaves them out. The copies of embedding and
    head that an MTP layer may have are not read, since the trunk's are used.
    """
    directory = Path(path)
    dtype = dtype or torch.float32
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise BadInput(
            f"{directory} cannot be loaded as {dtype}",
            "give torch.bfloat16, float16, float32 or float64",
        )
    model, parts = _checked(directory, dtype, mtp)
    with _memory_errors(directory):
        allocate(model, device)
        state = model.state_dict()
        with torch.no_grad():
            for part in sorted(parts, key=lambda each: (each.stored.file, each.stored.begin)):
                _fill(part, state[part.place.parameter], model.config)
    return model


def settle_directory(directory: Path) -> None:
    """Finish what a killed save left in a directory. An adapter alone is a `XushiError`."""
    with disk_errors(directory):
        finish_save(directory)
    refuse_adapter(directory)


def open_directory(directory: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The config of a checkpoint directory, and the table in its config.json, after
    `settle_directory`. Another format is refused by its name.
    """
    settle_directory(directory)
    table = read_table(directory)
    config = from_published(table, str(directory / "config.json"))
    refuse_other_quantisations(directory, table)
    return config, table


def _checked(directory: Path, dtype: torch.dtype, mtp: bool | None) -> tuple[Deepseek, list[Part]]:
    """The model without memory and the parts to load, after all checks. Says what is left out."""
    config, table = open_directory(directory)
    block = fp8_block(table, str(directory / "config.json"))
    stored, notes = read_headers(directory, _largest_header(config))
    refuse_other_tensors(stored, directory)
    contents = sort_tensors(stored, config, table, directory, mtp, block[0])
    model = _without_memory(contents.config, dtype, len(stored), directory)
    parts = _match(model, contents.weights, contents.scales, block, directory)
    for note in (unread_note(directory, table, config), *notes, *contents.notes):
        if note:
            say(note)
    return model, parts


def _largest_header(config: ModelConfig) -> int:
    """Bytes that a file's header may have: 1 MiB, and 512 for each matrix and for its scale."""
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    matrices = layers * (3 * config.n_routed_experts + 64)
    return min(LARGEST_JSON, 2**20 + 1024 * matrices)


def _without_memory(
    config: ModelConfig, dtype: torch.dtype, tensors: int, directory: Path
) -> Deepseek:
    """The model on the meta device, with its parameters' final dtypes. `tensors`: how many the
    files hold.
    """
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    # Every layer has more than 8 tensors, stacked or not, so this bounds the work that a config can
    # cause.
    if layers * 8 > tensors:
        raise BadInput(
            f"{directory / 'config.json'} describes {layers} layers, but the files hold only "
            f"{tensors} tensors",
            FROM_ELSEWHERE,
        )
    try:
        return model_without_memory(config, dtype)
    except (RuntimeError, TypeError, ValueError, ArithmeticError) as error:  # impossible sizes
        raise BadInput(
            f"{directory / 'config.json'} describes a model that cannot be built: "
            f"{shown(str(error).partition(chr(10))[0])}",
            DAMAGED,
        ) from None


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
                f"{directory} lacks {written_name(name, config, 'published')}", FROM_ELSEWHERE
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
            FROM_ELSEWHERE,
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
            FROM_ELSEWHERE,
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
            FROM_ELSEWHERE,
        )
    target.copy_(values)
