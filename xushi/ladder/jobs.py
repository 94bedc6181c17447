"""Runs of commands: each in a process group of its own, without a shell, with a deadline, and with
what it prints kept in the ledger's directory.

A job is named by the hash of all that decides its result, so that a run that was done is never done
again: by this entry, by another one, or after a kill.
"""

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from xushi.base.errors import BadInput, Failed
from xushi.base.files import disk_errors, sha256_file, sha256_json
from xushi.base.machine import Machine, inspect
from xushi.ladder.idea import ARM
from xushi.ladder.ledger import JobRecord, Ledger

# So that two runs at once do not take each other's cores, and sums are in the same order each time.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
# A directory that a job may keep files in: what is there stays if it is killed and run again.
DIRECTORY = "XUSHI_JOB_DIRECTORY"
SECONDS_TO_STOP = 5.0  # between asking a process to end and ending it
_SECONDS_BETWEEN_LOOKS = 0.05
_CHANGED = "changed while the idea was tried"
_LINE_BYTES = 1 << 20  # of the end of the output, in which its last line is looked for


@dataclass(frozen=True)
class Job:
    """A command, the hash of it and of all that decides its result, and its time limit. `files`:
    the hashes of the files that it reads.
    """

    command: list[str]
    hash: str
    files: Mapping[str, str]
    deadline_seconds: float
    title: str


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    files: tuple[IO[bytes], IO[bytes]]
    began: float = field(default_factory=time.monotonic)


def make_job(
    command: list[str], files: Mapping[str, str], deadline_seconds: float, title: str, repeat: int
) -> Job:
    """A job. `files`: the hashes of the files that it reads. `repeat`: 0, or the number of times
    that the same was run before.
    """
    machine = _machine()
    compiled = [sorted(machine.features), bool(machine.compilers), os.environ.get("XUSHI_OPS", "")]
    decides = {
        "command": command,
        "files": dict(files),
        "threads": {name: os.environ.get(name, "1") for name in _THREADS},
        "processor": machine.cpu,
        "repeat": repeat,
    }
    if command[0] == ARM:
        decides["forms"] = compiled  # which forms of the ops run, and in what dtype
    return Job(command, sha256_json(decides), files, deadline_seconds, title)


class Runner:
    """Runs jobs, `workers` at a time, in directory `where`. Use it as a context manager: what still
    runs at the end is stopped.
    """

    def __init__(self, ledger: Ledger, workers: int, where: Path) -> None:
        self._ledger = ledger
        self._workers = workers
        self._where = where
        self._running: list[_Running] = []
        self._hashes: dict[tuple[str, int, int, int], str] = {}  # of files, by their state

    def __enter__(self) -> "Runner":
        for record in self._ledger.running():  # of a program that was killed
            if record.process is not None and self._mark(record.process) == record.process_started:
                _signal_group(record.process, signal.SIGKILL)
            self._ledger.forget_running(record.hash)
        return self

    def __exit__(self, *_: object) -> None:
        for each in self._running:
            _signal_group(each.process.pid, signal.SIGTERM)
        limit = time.monotonic() + SECONDS_TO_STOP
        for each in self._running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                each.process.wait(max(0.0, limit - time.monotonic()))
            self._clean_up(each)
            self._ledger.forget_running(each.job.hash)
        self._running = []

    def run(self, jobs: Sequence[Job], told: Callable[[Job, JobRecord], None]) -> None:
        """Run those of `jobs` that are not done, in their order. `told` hears of each that ends.
        The first that fails is a `XushiError`; its neighbours are stopped.
        """
        waiting = [job for job in jobs if not self._is_done(job)]
        while waiting or self._running:
            while waiting and len(self._running) < self._workers:
                self._running.append(self._start(waiting.pop(0)))
            for each in list(self._running):
                problem = self._ended(each)
                if problem is None:
                    continue
                self._running.remove(each)
                record = self._record(each, problem)
                told(each.job, record)
                if record.problem:
                    raise self._failure(each.job, record)
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    def output(self, hash: str) -> Path:
        """The directory of what a job printed: stdout.txt and stderr.txt."""
        return self._ledger.directory / "jobs" / hash[:16]

    def _is_done(self, job: Job) -> bool:
        record = self._ledger.job(job.hash)
        return record is not None and record.status == "done"

    def _start(self, job: Job) -> _Running:
        place = self.output(job.hash)
        with disk_errors(place), contextlib.ExitStack() as stack:
            (place / "files").mkdir(parents=True, exist_ok=True)
            for name in ("stdout.txt", "stderr.txt"):  # a lost process may still write to the old
                (place / name).unlink(missing_ok=True)
            files = (
                stack.enter_context(open(place / "stdout.txt", "xb")),
                stack.enter_context(open(place / "stderr.txt", "xb")),
            )
            stack.pop_all()
        try:
            process = subprocess.Popen(
                _program(job.command),
                cwd=self._where,
                stdin=subprocess.DEVNULL,
                stdout=files[0],
                stderr=files[1],
                env={**_environment(), DIRECTORY: str((place / "files").resolve())},
                start_new_session=True,
            )
        except OSError as error:
            for file in files:
                file.close()
            raise BadInput(
                f"{job.command[0]} cannot be started: {error.strerror}",
                "correct the command; it is run without a shell, in the current directory",
            ) from None
        self._ledger.start(job.hash, job.command, process.pid, self._mark(process.pid))
        return _Running(job, process, files)

    def _mark(self, process: int) -> str:
        """What tells a run of this ledger from others: a copy of the ledger must not end them, and
        the number of a process is given again. Without a time it is like no other.
        """
        started = _started(process) or f"unknown, {time.time_ns()}"
        return f"{started}, {self._ledger.directory.resolve()}"

    def _ended(self, each: _Running) -> str | None:
        """Why a run failed, "" if it went well, None while it still runs."""
        code = each.process.poll()
        if code is None and time.monotonic() - each.began > each.job.deadline_seconds:
            _signal_group(each.process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                each.process.wait(SECONDS_TO_STOP)
            self._clean_up(each)
            return f"it was stopped after its deadline of {each.job.deadline_seconds:g} s"
        if code is None:
            return None
        self._clean_up(each)
        if code < 0:
            return f"it was ended by signal {-code}"
        return f"it ended with exit code {code}" if code else ""

    def _clean_up(self, each: _Running) -> None:
        """End what the run has left, which may be processes that it started."""
        _signal_group(each.process.pid, signal.SIGKILL)
        each.process.wait()
        for file in each.files:
            file.close()

    def _record(self, each: _Running, problem: str) -> JobRecord:
        seconds = time.monotonic() - each.began
        printed = None
        if not problem:
            printed, problem = _last_object(self.output(each.job.hash) / "stdout.txt")
        if changed := self._changed(each.job):
            printed, problem = None, f"{changed} {_CHANGED}"
        self._ledger.end(each.job.hash, seconds, printed, problem or None)
        record = self._ledger.job(each.job.hash)
        assert record is not None
        return record

    def _changed(self, job: Job) -> str:
        """The first file of a job that is not what it was when the idea was read; "" if none."""
        for name, hash in job.files.items():
            if name.startswith("("):  # no file: what else a recipe reads
                continue
            path = self._where / name
            try:
                status = path.stat()
                state = (name, status.st_ino, status.st_size, status.st_mtime_ns)
                if state not in self._hashes:  # large files are not read again for each job
                    self._hashes[state] = sha256_file(path)
            except OSError:
                return name
            if self._hashes[state] != hash:
                return name
        return ""

    def _failure(self, job: Job, record: JobRecord) -> Failed:
        if record.problem and record.problem.endswith(_CHANGED):
            return Failed(
                f"{job.title}: {record.problem}",
                "run the same command again: with other files it is another question",
            )
        place = self.output(job.hash)
        lines = _tail(place / "stderr.txt").splitlines() or [""]
        lines += [line for line in lines if line.startswith("error: ")]
        said = f": {lines[-1].strip()[:200]}" if lines[-1].strip() else ""
        return Failed(
            f"{job.title}: {record.problem}{said}",
            f"see {place}/stderr.txt, correct the command and run the same again: what is done is "
            "kept",
        )


@functools.cache
def _machine() -> Machine:
    return inspect()


def _program(command: list[str]) -> list[str]:
    """The words that are started: an arm of a recipe is run by this Python."""
    if command[0] != ARM:
        return command
    return [sys.executable, "-m", "xushi", "arm", *command[1:]]


def _environment() -> dict[str, str]:
    return {**dict.fromkeys(_THREADS, "1"), **os.environ}


def _last_object(path: Path) -> tuple[dict[str, Any] | None, str]:
    """The JSON object on the last line of a file that is not empty, and what is wrong with it."""
    lines = _tail(path).splitlines()
    last = next((line for line in reversed(lines) if line.strip()), "")
    try:
        found = json.loads(last)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        return None, "the last line that it printed is not a JSON object"
    return found, ""


def _tail(path: Path) -> str:
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _LINE_BYTES))
        return file.read().decode("utf-8", "replace")


def _signal_group(process: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process, number)


def _started(process: int) -> str:
    """When a process was started, in a form that tells it from a later one with the same number; ""
    if there is none.
    """
    stat = Path(f"/proc/{process}/stat")
    with contextlib.suppress(OSError):
        return stat.read_text().rpartition(")")[2].split()[19]
    if shutil.which("ps"):
        command = ["ps", "-o", "lstart=", "-p", str(process)]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return ""
