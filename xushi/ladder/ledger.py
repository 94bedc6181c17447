"""The ledger: every question that was asked, every run that was paid for, every verdict.

One SQLite file in the ledger's directory; what the runs printed lies beside it, a directory a job.
Rows are added and completed, never removed. Nothing here depends on the clock: entries and jobs are
in the order in which they were written, and durations come from a monotonic clock.
"""

import contextlib
import json
import math
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import variance
from typing import Any

from xushi.base.errors import BadInput, Failed
from xushi.base.files import disk_errors, make_directory
from xushi.ladder.idea import VARIANT, Idea
from xushi.ladder.stream import lord_level
from xushi.ladder.verdict import RunVariance

FILE = "ledger.sqlite"
FORMAT = 1

_TABLES = """
CREATE TABLE IF NOT EXISTS entries (
    number INTEGER PRIMARY KEY, hash TEXT UNIQUE NOT NULL, name TEXT NOT NULL, time REAL NOT NULL,
    idea TEXT NOT NULL, files TEXT NOT NULL, level REAL NOT NULL, known TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY, hash TEXT UNIQUE NOT NULL, command TEXT NOT NULL,
    status TEXT NOT NULL, process INTEGER, process_started TEXT, seconds REAL, printed TEXT,
    problem TEXT);
CREATE TABLE IF NOT EXISTS uses (
    entry INTEGER NOT NULL, rung INTEGER NOT NULL, purpose TEXT NOT NULL, arm TEXT NOT NULL,
    seed INTEGER NOT NULL, job TEXT NOT NULL, UNIQUE (entry, rung, purpose, arm, seed));
CREATE TABLE IF NOT EXISTS decisions (
    number INTEGER PRIMARY KEY, time REAL NOT NULL, entry INTEGER NOT NULL, rung INTEGER NOT NULL,
    decision TEXT NOT NULL);
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """A registered question. `number`: its place in the stream of ideas, from 1. `level`: what its
    p-value must not exceed to be promoted. `known`: for each rung, the run variance that other
    runs had shown. Both are fixed when it is registered. `files`: the hashes of the files that its
    commands read, by name.
    """

    number: int
    hash: str
    name: str
    idea: Idea
    files: dict[str, str]
    level: float
    known: tuple[RunVariance, ...]


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A run of a command. `status` is running, done or failed; `printed` the JSON object of its
    last line, `problem` why it failed.
    """

    hash: str
    command: list[str]
    status: str
    process: int | None
    process_started: str | None
    seconds: float | None
    printed: dict[str, Any] | None
    problem: str | None


class Ledger:
    """Open (or create) the ledger in `directory`. One of a newer format is a `XushiError`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        path = directory / FILE
        with disk_errors(directory):
            make_directory(directory)
        with self._readable():
            self._connection = sqlite3.connect(path, timeout=30, isolation_level=None)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            found = int(self._connection.execute("PRAGMA user_version").fetchone()[0])
            if found > FORMAT:
                raise BadInput(
                    f"{path} was written by a newer xushi (format {found}, this one has {FORMAT})",
                    "install that version, or give another --ledger",
                )
            self._connection.executescript(_TABLES)
            self._connection.execute(f"PRAGMA user_version={FORMAT}")

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def entry(self, hash: str) -> Entry | None:
        """The entry of a question, if it was registered."""
        found = self._rows("SELECT * FROM entries WHERE hash=?", hash)
        return _entry(found[0]) if found else None

    def entries(self) -> list[Entry]:
        """All questions, in the order in which they were asked."""
        return [_entry(row) for row in self._rows("SELECT * FROM entries ORDER BY number")]

    def register(self, hash: str, name: str, idea: Idea, files: dict[str, str]) -> Entry:
        """Add a question to the stream."""
        number = 1 + len(self._rows("SELECT number FROM entries"))
        known = [self._run_variance(idea, rung) for rung in range(len(idea.all_rungs()))]
        level = lord_level(number, self.promoted())
        self._write(
            "INSERT INTO entries (number, hash, name, time, idea, files, level, known) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            number,
            hash,
            name,
            time.time(),
            idea.model_dump_json(),
            json.dumps(files, sort_keys=True),
            level,
            json.dumps([[each.value, each.degrees] for each in known]),
        )
        return Entry(number, hash, name, idea, files, level, tuple(known))

    def promoted(self) -> list[int]:
        """The numbers of the entries that were promoted."""
        return sorted(
            {entry for entry, _, decision in self.decisions() if decision.get("promoted")}
        )

    def job(self, hash: str) -> JobRecord | None:
        """A run, if it was ever started."""
        found = self._rows("SELECT * FROM jobs WHERE hash=?", hash)
        return _job(found[0]) if found else None

    def running(self) -> list[JobRecord]:
        """Runs that were started and have not ended, as far as the ledger knows."""
        return [_job(row) for row in self._rows("SELECT * FROM jobs WHERE status='running'")]

    def start(self, hash: str, command: list[str], process: int, process_started: str) -> None:
        """Note that a run was started, again if it was before."""
        self._write(
            "INSERT INTO jobs (hash, command, status, process, process_started) "
            "VALUES (?, ?, 'running', ?, ?) ON CONFLICT (hash) DO UPDATE SET "
            "status='running', process=excluded.process, problem=NULL, "
            "process_started=excluded.process_started",
            hash,
            json.dumps(command),
            process,
            process_started,
        )

    def end(
        self, hash: str, seconds: float, printed: dict[str, Any] | None, problem: str | None
    ) -> None:
        """Note how a run ended: with what it printed, or with a problem."""
        self._write(
            "UPDATE jobs SET status=?, seconds=?, printed=?, problem=? WHERE hash=?",
            "failed" if problem else "done",
            seconds,
            None if printed is None else json.dumps(printed),
            problem,
            hash,
        )

    def forget_running(self, hash: str) -> None:
        """Note that a run was stopped before it ended."""
        self._write("UPDATE jobs SET status='stopped' WHERE hash=? AND status='running'", hash)

    def use(self, entry: int, rung: int, purpose: str, arm: str, seed: int, job: str) -> None:
        """Note that an entry uses a run: to judge, to repeat one, or to confirm."""
        self._write(
            "INSERT OR REPLACE INTO uses (entry, rung, purpose, arm, seed, job) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            entry,
            rung,
            purpose,
            arm,
            seed,
            job,
        )

    def uses(self, entry: int) -> list[tuple[int, str, str, int, JobRecord]]:
        """(rung, purpose, arm, seed, run) of all runs that an entry uses, in that order."""
        rows = self._rows(
            "SELECT rung, purpose, arm, seed, jobs.* FROM uses JOIN jobs ON jobs.hash=uses.job "
            "WHERE entry=? ORDER BY rung, purpose, arm, seed",
            entry,
        )
        return [(row[0], row[1], row[2], row[3], _job(row[4:])) for row in rows]

    def decide(self, entry: int, rung: int, decision: dict[str, Any]) -> None:
        """Add a decision, unless it is the one that stands."""
        standing = [each for number, at, each in self.decisions() if (number, at) == (entry, rung)]
        if not standing or standing[-1] != decision:
            self._write(
                "INSERT INTO decisions (time, entry, rung, decision) VALUES (?, ?, ?, ?)",
                time.time(),
                entry,
                rung,
                json.dumps(decision),
            )

    def decisions(self) -> list[tuple[int, int, dict[str, Any]]]:
        """(entry, rung, decision), in the order in which they were taken."""
        rows = self._rows("SELECT entry, rung, decision FROM decisions ORDER BY number")
        return [(row[0], row[1], json.loads(row[2])) for row in rows]

    def seconds_per_run(self, idea: Idea, rung: int) -> float | None:
        """The mean time of earlier runs beside the same baseline at the same rung."""
        seconds = {
            job.hash: job.seconds
            for entry, number in self._same(idea, rung)
            for at, _, _, _, job in self.uses(entry.number)
            if at == number and job.status == "done" and job.seconds is not None
        }
        return sum(seconds.values()) / len(seconds) if seconds else None

    def _same(self, idea: Idea, rung: int) -> list[tuple[Entry, int]]:
        """(entry, its rung) of all questions with this baseline and metric at this rung. The
        baselines of two recipes may set the same keys, or none.
        """
        keys = idea.all_rungs()[rung]
        asked = (idea.recipe, idea.baseline, idea.metric)
        return [
            (entry, number)
            for entry in self.entries()
            if (entry.idea.recipe, entry.idea.baseline, entry.idea.metric) == asked
            for number, each in enumerate(entry.idea.all_rungs())
            if each == keys
        ]

    def _run_variance(self, idea: Idea, rung: int) -> RunVariance:
        """What earlier variants beside the same baseline, at the same rung, show of the variance of
        a run over seeds. Left out are baselines and this idea's own variant, since this idea may
        use the same runs, and arms that proved worse, which may have diverged.
        """
        worse = {
            (entry, at)
            for entry, at, decision in self.decisions()
            if decision["verdict"] == "worse"
        }
        total, degrees = 0.0, 0
        counted: set[str] = set()  # two questions may use the same runs
        for entry, number in self._same(idea, rung):
            if (entry.number, number) in worse or entry.idea.variant == idea.variant:
                continue
            runs = [
                job
                for at, purpose, arm, _, job in self.uses(entry.number)
                if (at, purpose, arm) == (number, "judge", VARIANT)
                and job.status == "done"
                and job.hash not in counted
            ]
            counted |= {job.hash for job in runs}
            found = [number_of(job.printed, idea.metric) for job in runs]
            values = [value for value in found if value is not None and math.isfinite(value)]
            if len(values) > 1:
                total += variance(values) * (len(values) - 1)
                degrees += len(values) - 1
        return RunVariance(total / degrees, degrees) if degrees else RunVariance()

    def _rows(self, statement: str, *values: Any) -> list[Any]:
        with self._readable():
            return self._connection.execute(statement, values).fetchall()

    def _write(self, statement: str, *values: Any) -> None:
        with disk_errors(self.directory / FILE), self._readable():
            self._connection.execute(statement, values)

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise Failed(
                f"the ledger {self.directory / FILE} cannot be used: {error}",
                "check the disk's space and the file's permissions; if it is damaged, take a copy",
            ) from None


def number_of(printed: dict[str, Any] | None, metric: str) -> float | None:
    """A metric among what a run printed; None if it is missing or no number. What is too large for
    a float is infinite.
    """
    value = (printed or {}).get(metric)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _entry(row: Any) -> Entry:
    number, hash, name, _, idea, files, level, known = row
    variances = tuple(RunVariance(value, degrees) for value, degrees in json.loads(known))
    stated = Idea.model_validate_json(idea)
    return Entry(number, hash, name, stated, json.loads(files), level, variances)


def _job(row: Any) -> JobRecord:
    _, hash, command, status, process, started, seconds, printed, problem = row
    return JobRecord(
        hash, json.loads(command), status, process, started, seconds,
        None if printed is None else json.loads(printed), problem,
    )  # fmt: skip
