"""Changes to a checkpoint's files, for tests that load it again."""

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from xushi.model.shards import INDEX_FILE, SINGLE_FILE

from .conftest import tensors_in


def shard(directory: Path, parts: int) -> None:
    """Split a checkpoint's single file into several with an index, like published checkpoints."""
    tensors = tensors_in(directory / SINGLE_FILE)
    (directory / SINGLE_FILE).unlink()
    names = [f"model-{i + 1:05}-of-{parts:05}.safetensors" for i in range(parts)]
    weight_map = {tensor: names[i % parts] for i, tensor in enumerate(sorted(tensors))}
    for name in names:
        save_file(
            {t: tensors[t] for t, place in weight_map.items() if place == name}, directory / name
        )
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def change(directory: Path, **replacements: Tensor | None) -> None:
    """Rewrite the single file with some tensors replaced; None removes a tensor."""
    tensors = tensors_in(directory / SINGLE_FILE) | replacements
    save_file(
        {name: tensor for name, tensor in tensors.items() if tensor is not None},
        directory / SINGLE_FILE,
    )


def edit_config(directory: Path, **changes: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


def move_and_link(directory: Path, place: Path, name: str = SINGLE_FILE) -> None:
    (directory / name).rename(place)
    (directory / name).symlink_to(place)
