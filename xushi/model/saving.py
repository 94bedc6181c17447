"""Weights out: a model to a directory in the published layouts.

Not here: tensor names (names.py), the file format (shards.py), reading (weights.py).
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from xushi.base.errors import BadInput
from xushi.base.files import disk_errors, fsync_path, write_json
from xushi.base.locks import exclusive
from xushi.model.deepseek import Deepseek
from xushi.model.names import Naming, layer_of, places, shared_copies, written_name
from xushi.model.published import to_published
from xushi.model.shards import INDEX_FILE, SINGLE_FILE, write_shard

SHARD_BYTES = 4 * 2**30
# A save's files: while they are written; complete, beside an older checkpoint; while they replace
# it.
_PARTIAL = ".saving.partial"
COMPLETE = ".saving.complete"
_MOVING = ".saving.moving"
_LOCK = ".saving.lock"


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

    Once all files are complete they replace an older checkpoint in `path`; what a kill leaves
    undone, the next load or save there finishes. Memory: one tensor beyond the model.
    """
    directory = Path(path)
    if names not in get_args(Naming):
        raise BadInput(
            f"{directory} cannot be written with the names {names!r}",
            f"use one of {', '.join(get_args(Naming))}",
        )
    config = model.config if mtp else model.config.without_mtp()
    table = to_published(config) | {
        "torch_dtype": str(model.model.embed_tokens.weight.dtype).removeprefix("torch.")
    }
    shards = _divide(published_tensors(model, mtp, names), shard_bytes)
    with disk_errors(directory):
        finish_save(directory)
        with _temporary(directory) as temporary:
            for name, tensors in shards.items():
                write_shard(temporary / name, tensors)
            if len(shards) > 1:
                write_json(temporary / INDEX_FILE, _index(shards))
            write_json(temporary / "config.json", table)
            _refuse_directories(temporary, directory)
            fsync_path(temporary)
            os.replace(temporary, directory / COMPLETE)
        finish_save(directory)


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
    temporary = directory / _PARTIAL
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


def _refuse_directories(temporary: Path, directory: Path) -> None:
    for name in os.listdir(temporary):
        if (directory / name).is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a directory", str(directory / name))


def finish_save(directory: Path) -> None:
    """Put in place what a save into `directory` has completed, if a kill kept it from doing so.

    At no moment do old and new files together look like a checkpoint: config.json is removed first
    and comes back last. Each phase has its own directory, so that it can be repeated after a kill
    without losing a new file. Several processes may do this at the same time.
    """
    if not (directory / COMPLETE).exists() and not (directory / _MOVING).exists():
        return
    with exclusive(directory / _LOCK, f"waiting for a save into {directory}") as held:
        if not held:  # another process has just finished it
            return finish_save(directory)
        if (directory / COMPLETE).exists():
            (directory / "config.json").unlink(missing_ok=True)
            fsync_path(directory)
            for old in [
                directory / INDEX_FILE,
                directory / SINGLE_FILE,
                *directory.glob("model-*-of-*.safetensors"),
            ]:
                old.unlink(missing_ok=True)
            os.replace(directory / COMPLETE, directory / _MOVING)
        if (directory / _MOVING).exists():
            for name in sorted(os.listdir(directory / _MOVING), key=lambda n: n == "config.json"):
                if name == "config.json":
                    fsync_path(directory)
                os.replace(directory / _MOVING / name, directory / name)
            (directory / _MOVING).rmdir()
            fsync_path(directory)
        (directory / _LOCK).unlink(missing_ok=True)
