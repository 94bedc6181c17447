"""Knowing which process of several died, stopped or stands still, instead of waiting for it for ever.

A thread of each process puts its place (step and phase) into a small store at the first one, every second, and looks at
the others'. A process whose thread is silent is dead or stopped; one whose place does not change, while the others wait
for it, stands still. Either is named, and the run ended, so that it can be started again. Not here: starting it.
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

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from xushi.train.layout import Team

SECONDS_BETWEEN = 1.0
SHORTEST_LIMIT = 60.0  # seconds without a sign of life, or in one place
MEDIAN_STEPS = 5  # or this many median steps, whichever is longer
SECONDS_TO_TELL = 6 * SECONDS_BETWEEN  # how long to look who is gone once talking to somebody has failed

# In the order in which a step goes through them. While saving and evaluating, and in the first step, when things are
# compiled, nobody is judged by the place.
PHASES = ("batch", "step", "save", "evaluate")
JUDGED = ("batch", "step")


class Heartbeat:
    """Use as a context manager around a loop of all processes; says nothing and does nothing for a team of one.

    `report` is called by one of the processes that are well, with a sentence, before all of them leave with exit
    status 1.
    """

    def __init__(self, team: Team, report: Callable[[str], None]) -> None:
        self.team, self._report = team, report
        self._place: tuple[int, str] = (0, "save")
        self._began = time.monotonic()
        self._seconds: deque[float] = deque(maxlen=100)
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._beats = 0
        self._others: dict[int, dict[str, Any]] = {}
        self._heard: dict[int, float] = {}  # when each last gave a sign of life
        self._moved: dict[int, float] = {}  # when it last changed its place
        self._unanswered: float | None = None  # since when the store has not answered
        self.speaks = team.rank == 0  # for all that are left

    def at(self, step: int, phase: str) -> None:
        """This process is now in a phase of step number `step` (from 0)."""
        if phase == "batch":
            now = time.monotonic()
            if self._place[0] > 0 or self._place[1] != "save":  # the first step is no measure
                self._seconds.append(now - self._began)
            self._began = now
        self._place = (step, phase)

    def who_is_gone(self) -> str:
        """Sentence parts that name the processes without a sign of life; call after talking to somebody failed."""
        if self._thread is None:
            return ""
        time.sleep(SECONDS_TO_TELL)
        now = time.monotonic()
        gone = [rank for rank in self._heard if now - self._heard[rank] > SECONDS_TO_TELL / 2]
        if self._unanswered is not None:
            gone = [0]  # the store was there, so nothing is known of the others
        self.speaks = bool(gone) and self.team.rank == min(set(self._heard) - set(gone), default=self.team.rank)
        return ", ".join(self._name(rank) for rank in gone)

    def __enter__(self) -> "Heartbeat":
        if self.team.size > 1:
            first = self.team.rank == 0
            store = None
            if first:
                store = TCPStore(_host(), 0, is_master=True, wait_for_workers=False)
            host, port = self.team.firsts((_host(), store.port if store else 0))
            store = store or TCPStore(host, port, is_master=False, timeout=timedelta(seconds=10))
            self._heard = dict.fromkeys(range(self.team.size), time.monotonic())
            self._moved = dict(self._heard)
            self._thread = threading.Thread(target=self._run, args=(store,), name="xushi-heartbeat", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        if self._thread is not None:
            self._place = (self._place[0], "save")
            if kind is None:
                self.team.everyones(None)  # the store at the first process must outlive the others' last look
            self._ended.set()
            self._thread.join()

    def _run(self, store: Any) -> None:
        while not self._ended.wait(SECONDS_BETWEEN):
            self._beats += 1
            mine = {"beat": self._beats, "step": self._place[0], "phase": self._place[1], "limit": self._limit(),
                    "process": os.getpid(), "host": socket.gethostname()}
            try:
                store.set(str(self.team.rank), json.dumps(mine))
                for rank in range(self.team.size):
                    if store.check([str(rank)]):
                        self._see(rank, json.loads(store.get(str(rank))))
                self._unanswered = None
            except (RuntimeError, OSError):  # torch's errors of a connection are RuntimeErrors
                self._unanswered = self._unanswered or time.monotonic()
            self._judge()

    def _limit(self) -> float:
        return max(SHORTEST_LIMIT, MEDIAN_STEPS * median(self._seconds)) if self._seconds else SHORTEST_LIMIT

    def _see(self, rank: int, said: dict[str, Any]) -> None:
        before, now = self._others.get(rank), time.monotonic()
        if before is None or said["beat"] != before["beat"]:
            self._heard[rank] = now
        if before is None or (said["step"], said["phase"]) != (before["step"], before["phase"]):
            self._moved[rank] = now
        self._others[rank] = said

    def _judge(self) -> None:
        """End this process if some other is not well."""
        now, limit = time.monotonic(), self._limit()
        silent = [rank for rank, heard in self._heard.items() if now - heard > limit]
        if self._unanswered is not None and now - self._unanswered > limit:
            silent = [0]
        if silent:
            self._end(silent, f"gave no sign of life for {limit:.0f} s")
        # Where all are alive and wait, those are at fault whose place is behind the others'.
        alive = all(now - heard < 3 * SECONDS_BETWEEN for heard in self._heard.values())
        if not alive or len(self._others) < self.team.size or any(
                said["phase"] not in JUDGED or said["step"] == 0 for said in self._others.values()):
            return
        if all(now - moved > limit for moved in self._moved.values()):
            places = {rank: (said["step"], PHASES.index(said["phase"])) for rank, said in self._others.items()}
            self._end([rank for rank, place in places.items() if place == min(places.values())],
                      f"did not move for {limit:.0f} s")

    def _end(self, ranks: list[int], what: str) -> None:
        well = [rank for rank in range(self.team.size) if rank not in ranks]
        if self.team.rank == min(well, default=self.team.rank):
            said = self._others.get(ranks[0], {})
            with contextlib.suppress(Exception):  # whatever becomes of the report, the process must end
                self._report(f"{', '.join(self._name(rank) for rank in ranks)} {what} "
                             f"(in step {said.get('step', 0) + 1})")
        os._exit(1)

    def _name(self, rank: int) -> str:
        said = self._others.get(rank)
        return f"process {rank}" + (f" (number {said['process']} on {said['host']})" if said else "")


def _host() -> str:
    """Where the first process of torchrun's can be reached: itself."""
    return os.environ.get("MASTER_ADDR", "127.0.0.1")
