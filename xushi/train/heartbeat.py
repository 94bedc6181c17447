"""Detects which of several processes died, was stopped or hangs, instead of waiting for it forever.

Every second a thread of each process writes its place (step and phase) into a small store at rank 0
and reads the others'. A second thread judges, since the first would wait forever if the store's
process is stopped. A process whose thread is silent is dead or stopped; one whose place stays
behind the others', while they wait, hangs. It is named, and all processes end, so that the run can
be started again. Not here: starting it.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from statistics import median
from types import TracebackType
from typing import Any

from xushi.train.team import Team

SECONDS_BETWEEN = 1.0
SHORTEST_LIMIT = 60.0  # seconds without a sign of life, or without progress
MEDIAN_STEPS = 5  # or this many median steps, whichever is longer
# How long to watch for signs of life once an exchange with another process has failed.
SECONDS_TO_TELL = 6 * SECONDS_BETWEEN

# In the order of a step. A process is judged by its place only in "batch" and "step", and only once
# a step after the first (in which kernels are compiled) has been timed. Waiting for other processes
# happens in "step".
PHASES = ("batch", "step", "save", "evaluate")
JUDGED = ("batch", "step")


class Heartbeat:
    """Use as a context manager around a loop of all processes; does nothing for a team of one.

    One of the processes that are well calls `report` with a sentence, then all of them exit with
    status 1.
    """

    def __init__(self, team: Team, report: Callable[[str], None]) -> None:
        self.team, self._report = team, report
        self._place: tuple[int, str] = (0, "save")
        self._begun = 0  # steps of this start
        self._timed = -1  # the step that is being timed; it may enter "batch" several times
        self._began = time.monotonic()
        self._seconds: deque[float] = deque(maxlen=100)
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []
        self._beats = 0
        self._others: dict[int, dict[str, Any]] = {}
        self._heard: dict[int, float] = {}  # when each last gave a sign of life
        self._moved: dict[int, float] = {}  # when each last changed its place
        self._answered = 0.0  # when the store last answered

    def at(self, step: int, phase: str) -> None:
        """This process is now in a phase of step number `step` (from 0)."""
        if phase == "batch" and step != self._timed:
            now = time.monotonic()
            if self._begun > 1:  # the first step is no measure
                self._seconds.append(now - self._began)
            self._began = now
            self._begun += 1
            self._timed = step
        self._place = (step, phase)

    def who_is_gone(self) -> str:
        """The names of the processes without a sign of life; call after an exchange failed.

        "" if all are alive, or if this process is alone.
        """
        if not self._threads:
            return ""
        time.sleep(SECONDS_TO_TELL)
        now = time.monotonic()
        gone = [rank for rank in self._heard if now - self._heard[rank] > SECONDS_TO_TELL / 2]
        if now - self._answered > SECONDS_TO_TELL / 2:
            gone = [0]  # it holds the store, so nothing is known of the others
        return ", ".join(self._name(rank) for rank in gone)

    def __enter__(self) -> "Heartbeat":
        if self.team.size > 1:
            from torch.distributed import TCPStore  # type: ignore[attr-defined]

            first = self.team.rank == 0
            store = None
            if first:
                store = TCPStore(_host(), 0, is_master=True, wait_for_workers=False)
            host, port = self.team.broadcast((_host(), store.port if store else 0))
            store = store or TCPStore(host, port, is_master=False, timeout=timedelta(seconds=10))
            self._answered = time.monotonic()
            self._heard = dict.fromkeys(range(self.team.size), self._answered)
            self._moved = dict(self._heard)
            self._threads = [
                threading.Thread(
                    target=self._talk, args=(store,), name="xushi-heartbeat", daemon=True
                ),
                threading.Thread(target=self._watch, name="xushi-watch", daemon=True),
            ]
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._threads:
            self._place = (self._place[0], "save")
            if kind is None:
                # The store at rank 0 must outlive the others' last look. If somebody died after the
                # last step, nothing is lost.
                with contextlib.suppress(RuntimeError):
                    self.team.gather(None)
            self._ended.set()
            for thread in self._threads:
                thread.join(timeout=5 * SECONDS_BETWEEN)  # one may wait for a store that is gone

    def _watch(self) -> None:
        while not self._ended.wait(SECONDS_BETWEEN):
            self._judge()

    def _talk(self, store: Any) -> None:
        while not self._ended.wait(SECONDS_BETWEEN):
            self._beats += 1
            mine = {
                "beat": self._beats,
                "step": self._place[0],
                "phase": self._place[1],
                "judged": bool(self._seconds) and self._place[1] in JUDGED,
                "process": os.getpid(),
                "host": socket.gethostname(),
            }
            # torch's errors of a connection are RuntimeErrors.
            with contextlib.suppress(RuntimeError, OSError):
                store.set(str(self.team.rank), json.dumps(mine))
                for rank in range(self.team.size):
                    if store.check([str(rank)]):
                        self._see(rank, json.loads(store.get(str(rank))))
                self._answered = time.monotonic()

    def _limit(self) -> float:
        return (
            max(SHORTEST_LIMIT, MEDIAN_STEPS * median(self._seconds))
            if self._seconds
            else SHORTEST_LIMIT
        )

    def _see(self, rank: int, message: dict[str, Any]) -> None:
        before = self._others.get(rank)
        now = time.monotonic()
        if before is None or message["beat"] != before["beat"]:
            self._heard[rank] = now
        place = (message["step"], message["phase"])
        if before is None or place != (before["step"], before["phase"]):
            self._moved[rank] = now
        self._others[rank] = message

    def _judge(self) -> None:
        """End this process if another one is not well."""
        now = time.monotonic()
        limit = self._limit()
        silent = [rank for rank, heard in self._heard.items() if now - heard > limit]
        if now - self._answered > limit:
            silent = [0]  # it holds the store, so nothing is known of the others
        if silent:
            self._end(silent, f"gave no sign of life for {limit:.0f} s")
        # If all are alive and nobody moves, those hang whose place is behind the others'.
        alive = all(now - heard < 3 * SECONDS_BETWEEN for heard in self._heard.values())
        if (
            not alive
            or len(self._others) < self.team.size
            or not all(message["judged"] for message in self._others.values())
        ):
            return
        if all(now - moved > limit for moved in self._moved.values()):
            places = {
                rank: (message["step"], PHASES.index(message["phase"]))
                for rank, message in self._others.items()
            }
            self._end(
                [rank for rank, place in places.items() if place == min(places.values())],
                f"did not move for {limit:.0f} s",
            )

    def _end(self, ranks: list[int], what: str) -> None:
        well = [rank for rank in range(self.team.size) if rank not in ranks]
        if self.team.rank == min(well, default=self.team.rank):
            step = self._others.get(ranks[0], {}).get("step", 0) + 1
            names = ", ".join(self._name(rank) for rank in ranks)
            # The process must end even if the report fails.
            with contextlib.suppress(Exception):
                self._report(f"{names} {what} (in step {step})")
        os._exit(1)

    def _name(self, rank: int) -> str:
        message = self._others.get(rank)
        if message is None:
            return f"process {rank}"
        return f"process {rank} (number {message['process']} on {message['host']})"


def _host() -> str:
    """The address of rank 0, as torchrun gives it."""
    return os.environ.get("MASTER_ADDR", "127.0.0.1")
