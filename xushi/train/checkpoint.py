"""Checkpoints: tensors in safetensors, everything else in a JSON manifest with the files' hashes,
renamed into place.

A checkpoint counts if its manifest is there, with its own hash, and every file has the hash that
stands in it; the newest that counts is the one training goes on from. Each process writes the parts
of tensors that it holds into files of its own, and the manifest says where in the whole they
belong, so that any number of processes can read them. While training goes on, a thread writes.
"""

import contextlib
import json
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
from xushi.base.files import directory_in_place, disk_errors, sha256_file, sha256_json, write_json
from xushi.base.progress import say
from xushi.train.boxes import Box
from xushi.train.team import Team

FORMAT = 3
KEEP = 2  # the one before the newest stays, in case the newest is damaged
MANIFEST = "manifest.json"

Result = TypeVar("Result")


@dataclass(frozen=True)
class Checkpoint:
    """One moment to be saved: `tensors` by group ("model", "optimizer") and name, `state`
    JSON-able.

    `boxes` says of which whole a tensor is a part, by its name; one that is not there is whole.
    Each of several processes gives what it is to save: no part is another's too.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    boxes: dict[str, Box] = field(default_factory=dict)


class SavedCheckpoint:
    """One moment on disk, whose files have been checked: `step`, `state`, and tensors to read."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.step, self.state = path, int(manifest["step"]), dict(manifest["state"])
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
        """A tensor, or the part of it that `box` says. Raises KeyError if it is not there."""
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
                piece: Tensor = (
                    opened.get_slice(name)[common.within(held)]
                    if common.size
                    else opened.get_tensor(name)
                )
            if common.size == wanted.size:
                return piece
            result = piece.new_empty(wanted.size) if result is None else result
            result[common.within(wanted)] = piece
        if result is None:  # nothing is wanted of it but its dtype
            with safe_open(self.path / places[0][0], framework="pt") as opened:
                result = opened.get_tensor(name).new_empty(wanted.size)
        return result

    @property
    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All tensors, whole."""
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
    """Write `directory`/step-<step> and remove all but the newest `keep` up to it and every
    `keep_every` steps'.

    What claims to be newer was passed over as damaged; it counts for nothing here and is replaced
    in its turn. With a `team` all its processes call this, each with its parts; an error of one is
    an error of all.
    """
    team = team or Team()
    path = directory / f"step-{checkpoint.step:09d}"
    with contextlib.ExitStack() as stack:
        _together(
            team, lambda: stack.enter_context(directory_in_place(path)) if team.rank == 0 else None
        )
        entries = _together(team, lambda: _write_parts(_aside(path), checkpoint, team))

        def publish() -> None:
            if team.rank == 0:
                files = {file: entry for found in entries for file, entry in found.items()}
                manifest = {
                    "format": FORMAT,
                    "step": checkpoint.step,
                    "state": checkpoint.state,
                    "files": files,
                }
                write_json(_aside(path) / MANIFEST, manifest | {"sha256": sha256_json(manifest)})
                stack.close()

        _together(team, publish)
    if team.rank == 0:
        for old in [other for other in _newest_first(directory) if other.name <= path.name][keep:]:
            if not keep_every or _step(old) % keep_every:
                shutil.rmtree(old)


def _aside(path: Path) -> Path:
    """Where `directory_in_place` has what becomes `path`."""
    return path.with_name(f".{path.name}.partial")


def _together(team: Team, action: Callable[[], Result]) -> list[Result]:
    """What each process's `action` returned; if one of them failed, all do."""
    result, error = None, None
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
                remedy or "mend it there and run the same command again",
            )
    return [found for found, _ in outcomes] if team.size > 1 else [result]  # type: ignore[list-item]


def _write_parts(aside: Path, checkpoint: Checkpoint, team: Team) -> dict[str, Any]:
    """Write this process's tensors; the manifest's entries of the files."""
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

    What is saved is copied first, so that training may go on at once. A checkpoint that cannot be
    written (a full disk) leaves those before it as they are, and training goes on; only if the last
    one of all could not be written is that a `XushiError`, on leaving. With a `team`, all its
    processes save the same steps.
    """

    def __init__(
        self, directory: Path, keep: int = KEEP, keep_every: int = 0, team: Team | None = None
    ) -> None:
        self.directory, self.keep, self.keep_every, self.team = directory, keep, keep_every, team
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, checkpoint: Checkpoint) -> None:
        """Begin to write a checkpoint, after the one before it has been written."""
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
        """Wait until the last one is written; if it could not be, that is its error."""
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
            self._wait()  # the error on its way says more than one of saving

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, checkpoint: Checkpoint) -> None:
        try:
            save_checkpoint(self.directory, checkpoint, self.keep, self.keep_every, self.team)
        except BaseException as error:  # it is raised or told where the training is
            self._error = error


def latest_checkpoint(directory: Path, up_to: int | None = None) -> SavedCheckpoint | None:
    """The newest checkpoint that is whole, of step `up_to` at most, or None where there is none at
    all.

    A damaged one is passed over with a word to the person; if there are only damaged ones, that is
    a `XushiError`.
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
            f"no checkpoint in {directory} is whole: {candidates[0].name} {problem}",
            f"remove {directory} and run the same command again: this stage starts over",
        )
    return None


def _newest_first(directory: Path) -> list[Path]:
    return sorted(directory.glob("step-*"), reverse=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _inspect(path: Path) -> tuple[str, dict[str, Any]]:
    """What is wrong with a checkpoint ("" if nothing), and its manifest."""
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
