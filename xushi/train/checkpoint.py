"""Checkpoints: tensors in safetensors, everything else in a JSON manifest with the files' hashes,
renamed into place.

A checkpoint is intact if its manifest has its own hash and every file has the hash given there.
Training continues from the newest intact one. Each process writes its shards into files of its own,
and the manifest says where in the whole tensor each belongs, so that any number of processes can
read them. A thread writes while training continues.
"""

import contextlib
import json
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from xushi.base.errors import BadInput, Failed
from xushi.base.files import (
    aside_of,
    directory_in_place,
    disk_errors,
    sha256_file,
    sha256_json,
    write_json,
)
from xushi.base.progress import say
from xushi.train.boxes import Box
from xushi.train.team import Team

FORMAT = 3
KEEP = 2  # the one before the newest stays, in case the newest is damaged
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-\d{9}")
_LEFT_BY_A_KILL = re.compile(r"\.step-\d{9}\.(partial|old)")

Result = TypeVar("Result")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint to be written: `tensors` by group ("model", "optimizer") and name, and `state`,
    which is JSON-able.

    `boxes[name]` places a shard in its whole tensor; a name without a box is a full tensor. Each
    process passes only the shards that it saves; shards must not overlap.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    boxes: dict[str, Box] = field(default_factory=dict)


class SavedCheckpoint:
    """A checkpoint on disk whose files have been checked: `step`, `state`, and tensors to read."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.step = int(manifest["step"])
        self.state = dict(manifest["state"])
        self._places: dict[str, dict[str, list[tuple[str, Box]]]] = {}
        for file, entry in manifest["files"].items():
            group = self._places.setdefault(entry["group"], {})
            for name, place in entry["tensors"].items():
                box = Box(tuple(place["shape"]), tuple(place["start"]), tuple(place["size"]))
                group.setdefault(name, []).append((file, box))

    def names(self, group: str) -> list[str]:
        """The tensors of a group."""
        return sorted(self._places.get(group, {}))

    def read(self, group: str, name: str, box: Box | None = None) -> Tensor:
        """A tensor, or the block of it that `box` names. Raises KeyError if there is no such
        tensor.
        """
        places = self._places[group][name]
        wanted = box or Box.whole(places[0][1].shape)
        if wanted.shape != places[0][1].shape:
            raise BadInput(
                f"checkpoint {self.path}: {name} is {list(places[0][1].shape)} and the model's is "
                f"{list(wanted.shape)}",
                "it is another model's; choose another run directory",
            )
        result: Tensor | None = None
        for file, held in places:
            common = held.common(wanted)
            if common is None:
                continue
            with safe_open(self.path / file, framework="pt") as opened:
                part: Tensor = (
                    opened.get_slice(name)[common.within(held)]
                    if common.size
                    else opened.get_tensor(name)
                )
            if common.size == wanted.size:
                return part
            result = part.new_empty(wanted.size) if result is None else result
            result[common.within(wanted)] = part
        if result is None:  # an empty block: only the dtype is read
            with safe_open(self.path / places[0][0], framework="pt") as opened:
                result = opened.get_tensor(name).new_empty(wanted.size)
        return result

    @property
    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All tensors, each put together from its shards."""
        return {
            group: {name: self.read(group, name) for name in self.names(group)}
            for group in sorted(self._places)
        }


def save_checkpoint(
    directory: Path,
    checkpoint: Checkpoint,
    keep: int = KEEP,
    keep_every: int = 0,
    team: Team | None = None,
) -> None:
    """Write `directory`/step-<step>, then remove older checkpoints and what killed writers left.

    The newest `keep` up to this step stay, and those of every `keep_every` steps. Directories of
    later steps were skipped as damaged: they are not counted here and are replaced when training
    gets there. What cannot be removed is told and stays. With a `team` all its processes call this,
    each with its shards; an error of one is raised in all.
    """
    team = team or Team()
    path = directory / f"step-{checkpoint.step:09d}"
    with contextlib.ExitStack() as stack:
        _together(
            team, lambda: stack.enter_context(directory_in_place(path)) if team.rank == 0 else None
        )
        entries = _together(team, lambda: _write_parts(aside_of(path), checkpoint, team))

        def publish() -> None:
            if team.rank == 0:
                files = {file: entry for found in entries for file, entry in found.items()}
                manifest = {
                    "format": FORMAT,
                    "step": checkpoint.step,
                    "state": checkpoint.state,
                    "files": files,
                }
                write_json(aside_of(path) / MANIFEST, manifest | {"sha256": sha256_json(manifest)})
                stack.close()

        _together(team, publish)
    if team.rank == 0:
        _prune(path, keep, keep_every)


def _prune(newest: Path, keep: int, keep_every: int) -> None:
    """Remove older checkpoints than `newest`, and what killed writers left."""
    directory = newest.parent
    up_to_it = [path for path in _newest_first(directory) if path.name <= newest.name]
    old = [path for path in up_to_it[keep:] if not keep_every or _step(path) % keep_every]
    left = [path for path in directory.glob(".step-*") if _LEFT_BY_A_KILL.fullmatch(path.name)]
    for path in [*old, *left]:
        try:
            shutil.rmtree(path)
        except OSError as error:  # the new checkpoint is complete, and that counts
            say(f"{path} is not needed any more and cannot be removed: {error}")


def _together(team: Team, action: Callable[[], Result]) -> list[Result]:
    """The results of all processes' `action`; if one of them fails, all do."""
    result: Result | None = None
    error: Exception | None = None
    try:
        result = action()
    except Exception as caught:
        error = caught
    outcomes = team.gather(
        (result if team.size > 1 else None, None if error is None else str(error))
    )
    if error is not None:
        raise error
    for rank, (_, text) in enumerate(outcomes):
        if text is not None:
            problem, _, remedy = text.partition("\n")
            raise Failed(
                f"process {rank}: {problem}",
                remedy or "correct it there and run the same command again",
            )
    return [found for found, _ in outcomes] if team.size > 1 else [result]  # type: ignore[list-item]


def _write_parts(aside: Path, checkpoint: Checkpoint, team: Team) -> dict[str, Any]:
    """Write this process's tensors; returns the manifest's entries of the files."""
    entries = {}
    with disk_errors(aside):
        for group, tensors in checkpoint.tensors.items():
            mine = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
            part = "" if team.size == 1 else f"-{team.rank:05d}-of-{team.size:05d}"
            file = f"{group}{part}.safetensors"
            save_file(mine, aside / file)
            boxes = {
                name: checkpoint.boxes.get(name) or Box.whole(tensor.shape)
                for name, tensor in mine.items()
            }
            entries[file] = {
                "sha256": sha256_file(aside / file),
                "group": group,
                "tensors": {
                    name: {"shape": box.shape, "start": box.start, "size": box.size}
                    for name, box in boxes.items()
                },
            }
    return entries


class CheckpointWriter:
    """Writes checkpoints in a thread of its own, one at a time; use as a context manager.

    Tensors are copied first, so that training can continue at once. A checkpoint that cannot be
    written (a full disk) leaves the earlier ones as they are, and training continues; if the last
    checkpoint could not be written, leaving the context raises its error. With a `team`, all its
    processes save the same steps.
    """

    def __init__(
        self, directory: Path, keep: int = KEEP, keep_every: int = 0, team: Team | None = None
    ) -> None:
        self.directory = directory
        self.keep = keep
        self.keep_every = keep_every
        self.team = team
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, checkpoint: Checkpoint) -> None:
        """Start writing a checkpoint once the one before it has been written."""
        self._wait()
        if self._error is not None:
            say(
                f"{self._error}\ntraining goes on; the next checkpoint is tried at step "
                f"{checkpoint.step}"
            )
            self._error = None
        copied = Checkpoint(
            checkpoint.step,
            {
                group: {name: tensor.detach().clone() for name, tensor in tensors.items()}
                for group, tensors in checkpoint.tensors.items()
            },
            checkpoint.state,
            checkpoint.boxes,
        )
        # Not a daemon: an interpreter that ends in order lets it finish.
        self._thread = threading.Thread(target=self._write, args=(copied,), name="xushi-checkpoint")
        self._thread.start()

    def finish(self) -> None:
        """Wait until the last one is written; raises its error if it could not be."""
        self._wait()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None or kind is KeyboardInterrupt:
            self.finish()
        else:
            self._wait()
            if self._error is not None:  # the error being raised says more, and is not replaced
                say(f"the last checkpoint was not written: {self._error}")

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, checkpoint: Checkpoint) -> None:
        try:
            save_checkpoint(self.directory, checkpoint, self.keep, self.keep_every, self.team)
        except BaseException as error:  # raised or reported in the training's own thread
            self._error = error


def latest_checkpoint(directory: Path, up_to: int | None = None) -> SavedCheckpoint | None:
    """The newest intact checkpoint, of step `up_to` at most; None if there are no checkpoints.

    Damaged ones are reported and skipped. Raises `Failed` if all are damaged.
    """
    candidates = [
        path for path in _newest_first(directory) if up_to is None or _step(path) <= up_to
    ]
    for path in candidates:
        problem, manifest = _inspect(path)
        if not problem:
            return SavedCheckpoint(path, manifest)
        say(f"checkpoint {path} is damaged ({problem}); trying the one before it")
    if candidates:
        raise Failed(
            f"no checkpoint in {directory} is intact: {candidates[0].name} {problem}",
            f"remove {directory} and run the same command again: this stage starts over",
        )
    return None


def _newest_first(directory: Path) -> list[Path]:
    """The checkpoints in a directory. What else lies there is somebody's own, under any name."""
    found = [path for path in directory.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted((path for path in found if path.is_dir()), reverse=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _inspect(path: Path) -> tuple[str, dict[str, Any]]:
    """What is damaged in a checkpoint ("" if nothing), and its manifest."""
    try:
        manifest: Mapping[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if (
            manifest["format"] != FORMAT
        ):  # before anything else is read: another format may have other keys
            raise BadInput(
                f"checkpoint {path} has format {manifest['format']}, this version of xushi reads "
                "format "
                f"{FORMAT}",
                "use the version of xushi that wrote it, or another run directory",
            )
        found = {key: manifest[key] for key in ("format", "step", "state", "files")}
        if manifest["sha256"] != sha256_json(found):
            return f"{MANIFEST} does not have its own hash", {}
    except FileNotFoundError:
        return f"has no {MANIFEST}", {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {error!r}", {}
    for name, entry in found["files"].items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing", {}
        if sha256_file(file) != entry["sha256"]:
            return f"{name} does not have the hash in {MANIFEST}", {}
    return "", found
