"""The tracking store of a run: events, metrics, batches and decisions in one append-only SQLite
file.

A stage that is started over, because its inputs changed, begins a new attempt (`begin`). Metrics,
batches and decisions belong to the attempt in which they were written, and readers see those of the
stage's latest attempt only. Within an attempt a killed run repeats the steps since its last
checkpoint, so a (stage, step, name) may be written twice; readers take the last. Training reads
nothing back from the store except decisions, which are taken once and kept.
"""

import contextlib
import json
import math
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from xushi.base.errors import Failed
from xushi.base.files import disk_errors

Row = TypeVar("Row")

METRICS = "metrics.jsonl"  # beside the store: the same metrics, a line a step

_TABLES = """
CREATE TABLE IF NOT EXISTS attempts (id INTEGER PRIMARY KEY, time REAL, stage TEXT, key TEXT);
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY, time REAL, stage TEXT, name TEXT, details TEXT);
CREATE TABLE IF NOT EXISTS metrics (
    id INTEGER PRIMARY KEY, stage TEXT, attempt INTEGER, step INTEGER, name TEXT, value REAL);
CREATE TABLE IF NOT EXISTS decisions (
    id INTEGER PRIMARY KEY, time REAL, stage TEXT, attempt INTEGER, name TEXT, value TEXT);
CREATE TABLE IF NOT EXISTS batches (
    id INTEGER PRIMARY KEY, stage TEXT, attempt INTEGER, step INTEGER, cursor INTEGER,
    items INTEGER, hash TEXT, problem TEXT);
CREATE INDEX IF NOT EXISTS batches_by_step ON batches (stage, attempt, step);
CREATE INDEX IF NOT EXISTS metrics_by_name ON metrics (stage, attempt, name, step);
"""


class BatchRecord(NamedTuple):
    """What a step was trained on: `items` items of data from `cursor` on, and the hash of the
    batch.

    `id` grows with every record written. `problem` says what the guards found, "" if nothing.
    """

    id: int
    step: int
    cursor: int
    items: int
    hash: str
    problem: str


class Tracking:
    """Open (or create) the store at `path`; with None nothing is kept.

    Raises `Failed` if the file is damaged, cannot be opened or cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._lock = threading.Lock()
        if path is not None:
            with disk_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
        with self._readable():
            self._connection = sqlite3.connect(
                path or ":memory:", timeout=30, check_same_thread=False, isolation_level=None
            )
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=NORMAL")
            self._connection.executescript(_TABLES)

    def begin(self, stage: str, key: str) -> None:
        """Start a new attempt at a stage: what earlier attempts wrote is kept but no longer read.

        `key` is the hash of what the attempt reads.
        """
        statement = "INSERT INTO attempts (time, stage, key) VALUES (?, ?, ?)"
        self._write(statement, [(time.time(), stage, key)])

    def event(self, stage: str, name: str, **details: Any) -> None:
        """Something that happened once, such as a stage's start, with JSON-able details."""
        self._write(
            "INSERT INTO events (time, stage, name, details) VALUES (?, ?, ?, ?)",
            [(time.time(), stage, name, json.dumps(details, ensure_ascii=False))],
        )

    def metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Numbers of one step, under dotted names; also a line of metrics.jsonl beside the
        store.
        """
        line = {
            name: float(value) if math.isfinite(value) else None for name, value in values.items()
        }
        attempt = self._attempt(stage)
        head = {"time": round(time.time(), 3), "stage": stage, "attempt": attempt, "step": step}
        self._append(head | line)
        self._write(
            "INSERT INTO metrics (stage, attempt, step, name, value) VALUES (?, ?, ?, ?, ?)",
            [(stage, attempt, step, name, float(value)) for name, value in values.items()],
        )

    def batch(
        self, stage: str, step: int, cursor: int, items: int, digest: str, problem: str
    ) -> None:
        """Record what a step was trained on; see `BatchRecord`."""
        self._write(
            "INSERT INTO batches (stage, attempt, step, cursor, items, hash, problem) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            [(stage, self._attempt(stage), step, cursor, items, digest, problem)],
        )

    def batches(self, stage: str, last: int) -> list[BatchRecord]:
        """Records of steps 1 to `last` as they led to step `last`, oldest first.

        Where a restart or a rollback repeated a step, the repetition that the next step followed is
        returned. Empty if `last` was not recorded.
        """
        found = self._rows(
            "SELECT id, step, cursor, items, hash, problem FROM batches "
            "WHERE stage=? AND attempt=? AND step<=? ORDER BY step DESC, id DESC",
            (stage, self._attempt(stage), last),
            _batch_record,
        )
        records: list[BatchRecord] = []
        for record in found:
            if not records:
                follows = record.step == last
            else:
                follows = record.step == records[-1].step - 1 and record.id < records[-1].id
            if follows:
                records.append(record)
        return records[::-1]

    def decide(self, stage: str, name: str, value: Any) -> Any:
        """Record a choice the first time and return the recorded one ever after."""
        taken = self.decided(stage, name)
        if taken is not None:
            return taken
        self._write(
            "INSERT INTO decisions (time, stage, attempt, name, value) VALUES (?, ?, ?, ?, ?)",
            [(time.time(), stage, self._attempt(stage), name, json.dumps(value))],
        )
        return value

    def decided(self, stage: str, name: str) -> Any:
        """The recorded choice, or None."""
        found = self._rows(
            "SELECT value FROM decisions WHERE stage=? AND attempt=? AND name=? "
            "ORDER BY id LIMIT 1",
            (stage, self._attempt(stage), name),
            json.loads,
        )
        return found[0] if found else None

    def series(self, stage: str, name: str) -> list[tuple[int, float]]:
        """(step, value) of one metric in step order, the last value written for each step."""
        return self._rows(
            "SELECT step, value FROM metrics WHERE id IN (SELECT MAX(id) FROM metrics "
            "WHERE stage=? AND attempt=? AND name=? GROUP BY step) ORDER BY step",
            (stage, self._attempt(stage), name),
            lambda step, value: (int(step), _number(value)),
        )

    def steps_after(self, last: int) -> Iterator[tuple[int, str, int, dict[str, float]]]:
        """What the stages' latest attempts wrote after metric number `last`, in that order:
        (number, stage, step, values) of each step.
        """
        rows = self._rows(
            "SELECT id, stage, step, name, value FROM metrics WHERE id>? AND attempt=("
            "SELECT COALESCE(MAX(id), 0) FROM attempts WHERE attempts.stage=metrics.stage) "
            "ORDER BY id",
            (last,),
            lambda id, stage, step, name, value: (id, stage, int(step), name, _number(value)),
        )
        for (stage, step), group in groupby(rows, lambda row: (row[1], row[2])):
            found = list(group)
            yield found[-1][0], stage, step, {row[3]: row[4] for row in found}

    def names(self, stage: str) -> list[str]:
        """The metrics that a stage has written."""
        return self._rows(
            "SELECT DISTINCT name FROM metrics WHERE stage=? AND attempt=? ORDER BY name",
            (stage, self._attempt(stage)),
            str,
        )

    def events(self, stage: str | None = None, name: str | None = None) -> list[dict[str, Any]]:
        """Events of all attempts in the order in which they happened: {time, stage, name,
        details}.
        """
        return self._rows(
            "SELECT time, stage, name, details FROM events WHERE (? IS NULL OR stage=?) AND "
            "(? IS NULL OR name=?) ORDER BY id",
            (stage, stage, name, name),
            _event,
        )

    def close(self) -> None:
        """Close the store; further writes are an error."""
        self._connection.close()

    def _attempt(self, stage: str) -> int:
        """The number of the latest attempt at a stage, 0 if none was begun."""
        statement = "SELECT COALESCE(MAX(id), 0) FROM attempts WHERE stage=?"
        return self._rows(statement, (stage,), int)[0]

    def _rows(self, statement: str, values: tuple[Any, ...], make: Callable[..., Row]) -> list[Row]:
        """What `make` makes of each row's columns."""
        with self._readable():
            return [make(*row) for row in self._connection.execute(statement, values)]

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        # SQLite has no checksums: damage may show in what a row holds only.
        except (sqlite3.DatabaseError, ValueError, TypeError, RecursionError) as error:
            raise Failed(
                f"tracking store {self.path} cannot be used: {' '.join(str(error).split())}",
                "move it away to start a new one; checkpoints are not touched by this",
            ) from None

    def _append(self, line: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl; a line that a kill or a full disk cut off is ended first."""
        if self.path is None:
            return
        path = self.path.with_name(METRICS)
        with disk_errors(path), self._lock, open(path, "ab+") as file:
            ended = not file.tell()
            if not ended:
                file.seek(-1, os.SEEK_END)
                ended = file.read(1) == b"\n"
            file.write((b"" if ended else b"\n") + json.dumps(line).encode() + b"\n")

    def _write(self, statement: str, rows: list[tuple[Any, ...]]) -> None:
        if self.path is None:
            return
        with self._lock:
            try:
                self._connection.execute("BEGIN")
                self._connection.executemany(statement, rows)
                self._connection.execute("COMMIT")
            except sqlite3.DatabaseError as error:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise self._write_error(error) from None

    def _write_error(self, error: sqlite3.DatabaseError) -> Failed:
        if "full" in str(error):
            return Failed(
                f"no space left on the disk that holds {self.path}",
                "free some space and run the same command again",
            )
        return Failed(
            f"tracking store {self.path} cannot be written: {' '.join(str(error).split())}",
            "check that no other run uses this directory and that it is writable",
        )


def _batch_record(
    id: int, step: int, cursor: int, items: int, digest: str, problem: str
) -> BatchRecord:
    return BatchRecord(id, int(step), int(cursor), int(items), str(digest), str(problem))


def _event(when: float, stage: str, name: str, details: str) -> dict[str, Any]:
    return {
        "time": float(when),
        "stage": str(stage),
        "name": str(name),
        "details": json.loads(details),
    }


def _number(value: float | None) -> float:
    """SQLite stores NaN as NULL."""
    return math.nan if value is None else float(value)
