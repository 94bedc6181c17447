"""Checkpoints: tensors in safetensors, everything else in a JSON manifest with the files' hashes, renamed into place.

A checkpoint counts if its manifest is there and every file has the hash that stands in it; the newest that counts is
the one training goes on from. While training goes on, a thread writes them.
"""

import json
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from xushi.base.errors import XushiError
from xushi.base.files import directory_in_place, sha256_file, write_json
from xushi.base.progress import say

FORMAT = 2
KEEP = 2  # the one before the newest stays, in case the newest is damaged
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """One saved moment: `tensors` by group ("model", "optimizer") and name, `state` JSON-able."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save_checkpoint(directory: Path, checkpoint: Checkpoint, keep: int = KEEP, keep_every: int = 0) -> None:
    """Write `directory`/step-<step> and remove all but the newest `keep` up to it and every `keep_every` steps'.

    What claims to be newer was passed over as damaged; it counts for nothing here and is replaced in its turn.
    """
    path = directory / f"step-{checkpoint.step:09d}"
    with directory_in_place(path) as aside:
        hashes = {}
        for group, tensors in checkpoint.tensors.items():
            save_file({name: t.detach().contiguous() for name, t in tensors.items()}, aside / f"{group}.safetensors")
            hashes[f"{group}.safetensors"] = sha256_file(aside / f"{group}.safetensors")
        write_json(aside / MANIFEST, {"format": FORMAT, "step": checkpoint.step, "state": checkpoint.state,
                                      "sha256": hashes})
    for old in [other for other in _newest_first(directory) if other.name <= path.name][keep:]:
        if not keep_every or _step(old) % keep_every:
            shutil.rmtree(old)


class CheckpointWriter:
    """Writes checkpoints in a thread of its own, one at a time; use as a context manager.

    What is saved is copied first, so that training may go on at once. A checkpoint that cannot be written (a full
    disk) leaves those before it as they are, and training goes on; only if the last one of all could not be written
    is that a `XushiError`, on leaving.
    """

    def __init__(self, directory: Path, keep: int = KEEP, keep_every: int = 0) -> None:
        self.directory, self.keep, self.keep_every = directory, keep, keep_every
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, checkpoint: Checkpoint) -> None:
        """Begin to write a checkpoint, after the one before it has been written."""
        self._wait()
        if self._error is not None:
            say(f"{self._error}\ntraining goes on; the next checkpoint is tried at step {checkpoint.step}")
            self._error = None
        copied = Checkpoint(checkpoint.step, {group: {name: tensor.detach().clone() for name, tensor in tensors.items()}
                                              for group, tensors in checkpoint.tensors.items()}, checkpoint.state)
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

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
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
            save_checkpoint(self.directory, checkpoint, self.keep, self.keep_every)
        except BaseException as error:  # it is raised or told where the training is
            self._error = error


def latest_checkpoint(directory: Path, up_to: int | None = None) -> Checkpoint | None:
    """The newest checkpoint that is whole, of step `up_to` at most, or None where there is none at all.

    A damaged one is passed over with a word to the person; if there are only damaged ones, that is a `XushiError`.
    """
    candidates = [path for path in _newest_first(directory) if up_to is None or _step(path) <= up_to]
    for path in candidates:
        problem, manifest = _inspect(path)
        if not problem:
            tensors = {name.removesuffix(".safetensors"): load_file(path / name) for name in manifest["sha256"]}
            return Checkpoint(manifest["step"], tensors, manifest["state"])
        say(f"checkpoint {path} is damaged ({problem}); trying the one before it")
    if candidates:
        raise XushiError(f"no checkpoint in {directory} is whole: {candidates[0].name} {problem}",
                         f"remove {directory} and run the same command again: this stage starts over", 1)
    return None


def _newest_first(directory: Path) -> list[Path]:
    return sorted(directory.glob("step-*"), reverse=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _inspect(path: Path) -> tuple[str, dict[str, Any]]:
    """What is wrong with a checkpoint ("" if nothing), and its manifest's step, state and sha256."""
    try:
        manifest: Mapping[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:  # before anything else is read: another format may have other keys
            raise XushiError(f"checkpoint {path} has format {manifest['format']}, this version of xushi reads format "
                             f"{FORMAT}", "use the version of xushi that wrote it, or another run directory")
        step, state, hashes = int(manifest["step"]), dict(manifest["state"]), dict(manifest["sha256"])
    except FileNotFoundError:
        return f"has no {MANIFEST}", {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read: {error!r}", {}
    for name, expected in hashes.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing", {}
        if sha256_file(file) != expected:
            return f"{name} does not have the hash in {MANIFEST}", {}
    return "", {"step": step, "state": state, "sha256": hashes}
