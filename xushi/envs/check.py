"""`xushi env check`: whether an environment keeps the contract, in seconds and without a model.

The proofs run in child processes, two with different hash seeds, so that an endless call can be
stopped and hidden state is seen. Not here: the proofs themselves (promises).
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from xushi.base.errors import BadInput

SECONDS = 10.0  # that a single call of the environment may take
INSTANCES = 2000  # of each split, to see whether splits are disjoint
PROMISES = ("declared", "splits", "solve", "exploits", "anything", "demonstrations")

FASTER = (
    "make it return at once whatever it is given: no endless loop, no waiting for something outside"
)
PURER = (
    "draw with xushi.base.seeds.derive; use no hash(), no order of a set, no clock, and no state "
    "that calls leave behind"
)


@dataclass(frozen=True)
class Finding:
    """What came of one promise; `remedy` says what to do where it is broken."""

    promise: str
    state: Literal["ok", "broken", "not reached"]
    text: str
    remedy: str = ""


@dataclass
class _Told:
    """What a child process wrote, and how it ended: "" if as it should."""

    lines: list[dict[str, Any]] = field(default_factory=list)
    at: str = "the start"
    ended: str = ""

    @property
    def digests(self) -> dict[str, str]:
        return {line["digest"]: line["value"] for line in self.lines if "digest" in line}


def check_environment(
    kind: str, folder: Path, seconds: float = SECONDS, instances: int = INSTANCES
) -> list[Finding]:
    """Every promise of the environment `kind`, named as in a recipe; relative files start at
    `folder`.

    A call that takes more than `seconds` is stopped. `BadInput` if there is no such environment.
    """
    arguments = [kind, str(folder)]
    first = _run(arguments, [str(instances), "all"], 1, seconds)
    problem = next((line for line in first.lines if "problem" in line), None)
    if problem is not None:
        raise BadInput(problem["problem"], problem["remedy"])
    found = {line["promise"]: _finding(line) for line in first.lines if "promise" in line}
    findings = [
        found.get(name, Finding(name, "not reached", f"the check ended at {first.at}"))
        for name in PROMISES
    ]
    return [*findings, _deadline(first, seconds), _pure(arguments, first, seconds)]


def kept(findings: list[Finding]) -> bool:
    """Whether every promise is."""
    return all(finding.state == "ok" for finding in findings)


def as_lines(findings: list[Finding]) -> str:
    """One line for each promise; under one that is broken, what to do."""
    width = max(len(finding.promise) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:<11}  {finding.promise:<{width}}  {finding.text}")
        if finding.remedy:
            lines.append(f"{'':<11}  {'':<{width}}  {finding.remedy}")
    return "\n".join(lines)


def as_table(findings: list[Finding]) -> dict[str, Any]:
    """The same for programs."""
    return {"kept": kept(findings), "promises": [vars(finding) for finding in findings]}


def _finding(line: dict[str, Any]) -> Finding:
    state: Literal["ok", "broken"] = "ok" if line["ok"] else "broken"
    return Finding(line["promise"], state, line["text"], line["remedy"])


def _deadline(told: _Told, seconds: float) -> Finding:
    if told.ended == "late":
        text = f"{told.at} took more than {seconds:g} s and was stopped"
        return Finding("deadline", "broken", text, FASTER)
    if told.ended:
        text = f"the process ended in {told.at} ({told.ended})"
        return Finding("deadline", "broken", text, "an environment must not end its process")
    return Finding("deadline", "ok", f"every call within {seconds:g} s")


def _pure(arguments: list[str], first: _Told, seconds: float) -> Finding:
    """Whether another process, with another hash seed and the calls in reverse, gives the same."""
    name = "pure"
    if first.ended or not first.digests or "all" in first.digests:
        return Finding(name, "not reached", "mend what is broken above first")
    second = _run(arguments, ["0", "digests"], 2, seconds)
    if second.ended:
        late = _deadline(second, seconds)
        return Finding(name, "broken", f"in a second process {late.text}", late.remedy)
    for digest, value in first.digests.items():
        if second.digests.get(digest) != value:
            text = f"{digest} is another in a second process"
            return Finding(name, "broken", text, PURER)
    return Finding(name, "ok", f"{len(first.digests):,} results the same in a second process")


def _run(arguments: list[str], what: list[str], hash_seed: int, seconds: float) -> _Told:
    reading, writing = os.pipe()
    command = [sys.executable, "-m", "xushi.envs.promises", *arguments, str(writing), *what]
    process = subprocess.Popen(
        command,
        pass_fds=[writing],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,  # an environment may print
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # so that what it starts is stopped with it
        env={**os.environ, "PYTHONHASHSEED": str(hash_seed), "PYTHONPATH": _python_path()},
    )
    os.close(writing)
    told = _Told()
    try:
        for line in _lines(reading, seconds):
            told.at = line.get("at", told.at)
            if "at" not in line:
                told.lines.append(line)
            if "end" in line or "problem" in line:
                return told
        told.ended = f"exit code {process.wait(seconds)}"
    except (TimeoutError, subprocess.TimeoutExpired):
        told.ended = "late"
    finally:
        os.close(reading)
        _stop(process)
    return told


def _lines(descriptor: int, seconds: float) -> Iterator[dict[str, Any]]:
    """JSON lines until the end; `TimeoutError` where none comes for so long."""
    buffer = b""
    deadline = time.monotonic() + 60.0  # Python starts
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while True:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise TimeoutError
            data = os.read(descriptor, 1 << 16)
            if not data:
                return
            *whole, buffer = (buffer + data).split(b"\n")
            yield from (json.loads(line) for line in whole)
            deadline = time.monotonic() + seconds


def _stop(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _python_path() -> str:
    """So that the child finds this very package."""
    return os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
