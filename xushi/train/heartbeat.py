"""Knowing which process of several died, stopped or stands still, instead of waiting for it for
ever.

A thread of each process puts its place (step and phase) into a small store at the first one, every
second, and looks at the others'; a second one judges, since the first waits for ever if the store's
process is stopped. A process whose thread is silent is dead or stopped; one whose place stays
behind the others', while they wait, stands still. It is named, and the run ended, so that it can be
started again. Not here: starting it.
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
SHORTEST_LIMIT = 60.0  # seconds without a sign of life, or in one place
MEDIAN_STEPS = 5  # or this many median steps, whichever is longer
SECONDS_TO_TELL = (
    6 * SECONDS_BETWEEN
)  # how long to look who is gone once talking to somebody has failed

# In the order in which a step goes through them. While saving and evaluating, and until a step has
# been measured, the first of a start left out since things are compiled in it, nobody is judged by
# the place. What a process waits for others in is "step".
PHASES = ("batch", "step", "save", "evaluate")
JUDGED = ("batch", "step")


class Heartbeat:
    """Use as a context manager around a loop of all processes; says nothing and does nothing for a
    team of one.

    `report` is called by one of the processes that are well, with a sentence, before all of them
    leave with exit status 1.
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
        self._moved: dict[int, float] = {}  # when it last changed its place
        self._answered = 0.0  # when the store last did

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
        """Sentence parts that name the processes without a sign of life; call after talking to
        somebody failed.
        """
        if not self._threads:
            return ""
        time.sleep(SECONDS_TO_TELL)
        now = time.monotonic()
        gone = [rank for rank in self._heard if now - self._heard[rank] > SECONDS_TO_TELL / 2]
        if now - self._answered > SECONDS_TO_TELL / 2:
            gone = [0]  # the store is there, so nothing is known of the others
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
                with contextlib.suppress(
                    RuntimeError
                ):  # somebody died after the last step: nothing is lost
                    self.team.gather(
                        None
                    )  # the store at the first process must outlive the others' last look
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
            with contextlib.suppress(
                RuntimeError, OSError
            ):  # torch's errors of a connection are RuntimeErrors
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
        if now - self._answered > limit:
            silent = [0]  # the store is there, so nothing is known of the others
        if silent:
            self._end(silent, f"gave no sign of life for {limit:.0f} s")
        # Where all are alive and wait, those are at fault whose place is behind the others'.
        alive = all(now - heard < 3 * SECONDS_BETWEEN for heard in self._heard.values())
        if (
            not alive
            or len(self._others) < self.team.size
            or not all(said["judged"] for said in self._others.values())
        ):
            return
        if all(now - moved > limit for moved in self._moved.values()):
            places = {
                rank: (said["step"], PHASES.index(said["phase"]))
                for rank, said in self._others.items()
            }
            self._end(
                [rank for rank, place in places.items() if place == min(places.values())],
                f"did not move for {limit:.0f} s",
            )

    def _end(self, ranks: list[int], what: str) -> None:
        well = [rank for rank in range(self.team.size) if rank not in ranks]
        if self.team.rank == min(well, default=self.team.rank):
            said = self._others.get(ranks[0], {})
            with contextlib.suppress(
                Exception
            ):  # whatever becomes of the report, the process must end
                self._report(
                    f"{', '.join(self._name(rank) for rank in ranks)} {what} "
                    f"(in step {said.get('step', 0) + 1})"
                )
        os._exit(1)

    def _name(self, rank: int) -> str:
        said = self._others.get(rank)
        return f"process {rank}" + (
            f" (number {said['process']} on {said['host']})" if said else ""
        )


def _host() -> str:
    """Where the first process of torchrun's can be reached: itself."""
    return os.environ.get("MASTER_ADDR", "127.0.0.1")
