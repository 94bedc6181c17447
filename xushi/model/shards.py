"""safetensors files in and out: headers are checked before any data is read, and tensors are read
and written one at a time.

The format (github.com/huggingface/safetensors): 8 bytes with the header's length, a JSON header
with each tensor's dtype, shape and offsets, then the data without gaps. The safetensors library is
not used for reading, because the checks must come before any allocation, and because a
memory-mapped file counts as memory once it is read.

Not here: which tensors a model has (names.py), what quantised tensors mean (quantised.py).
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xushi.base.errors import BadInput
from xushi.base.published_files import (
    DAMAGED,
    UNTRUSTED,
    checked_file,
    parse_json,
    read_published_json,
    reading,
    shown,
)

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
CHUNK = 2**24  # bytes that are compared at a time
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # of its bytes in the file
    size: int  # in bytes

    def read(self) -> Tensor:
        """Read the tensor into newly allocated memory."""
        raw = torch.empty(self.size, dtype=torch.uint8)
        left = raw.numpy().data
        with reading(self.file), open(self.file, "rb", buffering=0) as stream:
            stream.seek(self.begin)
            while len(left):
                count = stream.readinto(left)
                if not count:
                    raise BadInput(
                        f"{self.file} cannot be read: it ends within {shown(self.name)}", DAMAGED
                    )
                left = left[count:]
        return raw.view(self.dtype).view(self.shape)


def same_bytes(first: Stored, second: Stored) -> bool:
    """Whether two tensors are the same, bit by bit. Neither is held in memory as a whole."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with reading(first.file), open(first.file, "rb") as one, open(second.file, "rb") as other:
        one.seek(first.begin)
        other.seek(second.begin)
        for done in range(0, first.size, CHUNK):
            count = min(CHUNK, first.size - done)
            if one.read(count) != other.read(count):
                return False
    return True


def read_header(file: Path, size: int, limit: int) -> list[Stored]:
    """The tensors of a safetensors file of `size` bytes, in the order of their data. The header may
    have at most `limit` bytes.
    """
    with reading(file), open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 2 <= length <= size - 8:
            raise BadInput(
                f"{file} cannot be read: its header should have {length} bytes, the file has "
                f"{size}",
                DAMAGED,
            )
        if length > limit:
            raise BadInput(
                f"{file} cannot be read: its header has {length} bytes, the limit for this "
                f"config.json is {limit}",
                UNTRUSTED,
            )
        raw = stream.read(length)
    table = parse_json(raw, str(file))
    table.pop("__metadata__", None)
    entries = [_entry(file, name, entry, 8 + length) for name, entry in table.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.size))
    _check_gapless(file, entries, 8 + length, size)
    return entries


def _check_gapless(file: Path, entries: list[Stored], begin: int, size: int) -> None:
    """Raise unless `entries` fill bytes `begin` to `size` of the file without gap or overlap."""
    end = begin
    for entry in entries:
        if entry.begin != end:
            fault = "overlaps" if entry.begin < end else "leaves a gap after"
            raise BadInput(
                f"{file} cannot be read: {shown(entry.name)} {fault} the tensor before it",
                DAMAGED,
            )
        end += entry.size
    if end != size:
        raise BadInput(
            f"{file} cannot be read: its header describes {end} bytes, the file has {size}",
            DAMAGED,
        )


def _entry(file: Path, name: str, entry: Any, data: int) -> Stored:
    """A tensor's entry in a header, checked. `data` is where the file's data begins."""

    def whole(value: Any) -> bool:
        return (
            isinstance(value, list)
            and len(value) <= 8
            and all(type(x) is int and 0 <= x < 2**63 for x in value)
        )

    where = f"{file} cannot be read: {shown(name)}"
    keys = ("dtype", "shape", "data_offsets")
    if not isinstance(entry, dict) or set(entry) != set(keys):
        raise BadInput(f"{where} is not described by dtype, shape and data_offsets", DAMAGED)
    kind, shape, offsets = (entry[key] for key in keys)
    if not isinstance(kind, str) or kind not in DTYPES:
        raise BadInput(
            f"{where} has dtype {shown(kind)}, which is not supported",
            f"use a checkpoint in {', '.join(DTYPES)}",
        )
    if not whole(shape) or not whole(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise BadInput(
            f"{where} has shape {shown(shape)} and data_offsets {shown(offsets)}", DAMAGED
        )
    size = math.prod(shape) * DTYPES[kind].itemsize
    if size != offsets[1] - offsets[0]:
        raise BadInput(
            f"{where} has shape {shape} in {kind}, which is {size} bytes, and "
            f"{offsets[1] - offsets[0]} bytes of data",
            DAMAGED,
        )
    return Stored(name, file, DTYPES[kind], tuple(shape), data + offsets[0], size)


def read_headers(directory: Path, limit: int) -> tuple[dict[str, Stored], list[str]]:
    """All tensors of a checkpoint directory by name, from its single file or from the index's
    files; and what the user should know of other files.

    A file's header may have at most `limit` bytes.
    """
    weight_map, files = _shard_names(directory)
    notes = []
    if others := sorted(_safetensors_in(directory).difference(files)):
        read = INDEX_FILE if weight_map is not None else SINGLE_FILE
        notes.append(f"{directory}: {read} counts, and {', '.join(map(shown, others))} is not read")
    found: dict[str, Stored] = {}
    for name in files:
        file, size = checked_file(directory, name)
        for stored in read_header(file, size, limit):
            if stored.name in found:
                raise BadInput(
                    f"{file} holds {shown(stored.name)}, and so does "
                    f"{found[stored.name].file.name}",
                    "remove the file that does not belong to this checkpoint",
                )
            found[stored.name] = stored
    if weight_map is not None:
        _check_index(directory / INDEX_FILE, weight_map, found)
        if absent := weight_map.keys() - found.keys():
            notes.append(
                f"{directory / INDEX_FILE} names {len(absent)} tensors that are in no file, "
                f"{shown(min(absent))} among them"
            )
    return found, notes


def _check_index(index: Path, weight_map: dict[str, Any], found: dict[str, Stored]) -> None:
    """Raise unless the index says where every tensor is. Whether one that it names and no file has
    is needed, config.json decides.
    """
    for tensor in sorted(found):
        claimed = weight_map.get(tensor)
        actual = found[tensor].file.name
        if claimed != actual:
            raise BadInput(
                f"{index} says that {shown(tensor)} is in {shown(claimed)}, but it is in {actual}",
                "get the checkpoint again, its files are of different checkpoints",
            )


def _shard_names(directory: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The index's map from tensors to files (None without an index), and the files to read."""
    if os.path.lexists(directory / INDEX_FILE):
        weight_map = _read_index(directory)
        files = sorted(set(weight_map.values()))
        if SINGLE_FILE not in files and os.path.lexists(directory / SINGLE_FILE):
            raise BadInput(
                f"{directory} holds two sets of weights: {SINGLE_FILE}, and {INDEX_FILE} with "
                f"{len(files)} files",
                "remove the set that does not belong to this config.json",
            )
        return weight_map, files
    files = sorted(_safetensors_in(directory))
    if SINGLE_FILE in files:
        return None, [SINGLE_FILE]
    if len(files) == 1:
        return None, files
    if files:
        raise BadInput(
            f"{directory} holds {len(files)} safetensors files but no {INDEX_FILE}",
            "get the index too; slices for model-parallel inference must be merged first",
        )
    if pickles := sorted(name for name in os.listdir(directory) if name.endswith(_PICKLES)):
        raise BadInput(
            f"{directory / pickles[0]} is a pickle, which can run any code and is never read",
            "get the checkpoint in safetensors",
        )
    raise BadInput(
        f"{directory / SINGLE_FILE} does not exist",
        "give a directory with safetensors weights",
    )


def _safetensors_in(directory: Path) -> set[str]:
    with reading(directory):
        names = os.listdir(directory)
    return {n for n in names if n.endswith(".safetensors") and not n.startswith(".")}


def _read_index(directory: Path) -> dict[str, str]:
    weight_map = read_published_json(directory, INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict):
        raise BadInput(f"{directory / INDEX_FILE} cannot be read: it has no weight_map", DAMAGED)
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name.endswith(".safetensors"):
            raise BadInput(
                f"{directory / INDEX_FILE} puts {shown(tensor)} into {shown(repr(name))}, but only "
                "safetensors files are read",
                "get the checkpoint in safetensors from its publisher",
            )
    return weight_map


def write_shard(file: Path, tensors: list[tuple[str, Tensor]]) -> None:
    """Write a safetensors file, one tensor at a time. Tensors may be on any device and share
    memory.
    """
    # Wider dtypes come first, so that every tensor is aligned to its own width, as the format's
    # readers prefer.
    tensors = sorted(tensors, key=lambda each: -each[1].element_size())
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors:
        begin = end
        end += tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with open(file, "wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        for _, tensor in tensors:
            stream.write(
                tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
            )
        stream.flush()
        os.fsync(stream.fileno())
