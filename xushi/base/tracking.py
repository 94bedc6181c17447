"""The tracking store of a run: events, metrics, batches and decisions in one append-only SQLite
file.

A killed run repeats the steps since its last checkpoint, so a (stage, step, name) may stand twice;
readers take the last. So it is with the batches: of each step, which data it was trained on.
Nothing here is read back by training, except decisions, which are taken once and kept.
"""

import json
import math
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from xushi.base.errors import Failed
from xushi.base.files import disk_errors

METRICS = "metrics.jsonl"  # beside the store: the same metrics, a line a step

_TABLES = """
CREATE TABLE IF NOT EXISTS events (id INTEGER PRIMARY KEY, time REAL, stage TEXT, name TEXT, details TEXT);
CREATE TABLE IF NOT EXISTS metrics (id INTEGER PRIMARY KEY, stage TEXT, step INTEGER, name TEXT, value REAL);
CREATE TABLE IF NOT EXISTS decisions (id INTEGER PRIMARY KEY, time REAL, stage TEXT, name TEXT, value TEXT);
CREATE TABLE IF NOT EXISTS batches (id INTEGER PRIMARY KEY, stage TEXT, step INTEGER, cursor INTEGER, pieces INTEGER,
    hash TEXT, problem TEXT);
CREATE INDEX IF NOT EXISTS batches_by_step ON batches (stage, step);
CREATE INDEX IF NOT EXISTS metrics_by_name ON metrics (stage, name, step);
"""


class BatchRecord(NamedTuple):
    """What a step was trained on: so many pieces of data from `cursor` on, and the hash of the
    batch they made.

    `id` rises with every writing. `problem` says why the step was not like the others, "" if it
    was.
    """

    id: int
    step: int
    cursor: int
    pieces: int
    hash: str
    problem: str


class Tracking:
    """Open (or create) the store at `path`; where that is None nothing is kept."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._lock = threading.Lock()
        if path is not None:
            with disk_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._connection = sqlite3.connect(
                path or ":memory:", timeout=30, check_same_thread=False, isolation_level=None
            )
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=NORMAL")
            self._connection.executescript(_TABLES)
        except sqlite3.DatabaseError as error:
            raise Failed(
                f"tracking store {path} cannot be used: {error}",
                "move it away to start a new one; checkpoints are not touched by this",
            ) from None

    def event(self, stage: str, name: str, **details: Any) -> None:
        """Something that happened once, such as a stage's start, with JSON-able details."""
        self._write(
            "INSERT INTO events (time, stage, name, details) VALUES (?, ?, ?, ?)",
            [(time.time(), stage, name, json.dumps(details, ensure_ascii=False))],
        )

    def metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Numbers of one step, under dotted names; for other programs also a line of metrics.jsonl
        beside the store.
        """
        self._append(
            {
                "time": round(time.time(), 3),
                "stage": stage,
                "step": step,
                **{
                    name: float(value) if math.isfinite(value) else None
                    for name, value in values.items()
                },
            }
        )
        self._write(
            "INSERT INTO metrics (stage, step, name, value) VALUES (?, ?, ?, ?)",
            [(stage, step, name, float(value)) for name, value in values.items()],
        )

    def batch(
        self, stage: str, step: int, cursor: int, pieces: int, digest: str, problem: str
    ) -> None:
        """What a step was trained on."""
        self._write(
            "INSERT INTO batches (stage, step, cursor, pieces, hash, problem) VALUES (?, ?, ?, ?, "
            "?, ?)",
            [(stage, step, cursor, pieces, digest, problem)],
        )

    def batches(self, stage: str, last: int) -> list[BatchRecord]:
        """The way to step `last` of a stage: one record a step from 1 on, each the last that came
        before the next's.

        So a step that a kill or a rollback had done again stands there as it counted. Empty if
        `last` is not there.
        """
        rows = self._connection.execute(
            "SELECT id, step, cursor, pieces, hash, problem FROM batches WHERE stage=? "
            "AND step<=? ORDER BY step DESC, id DESC",
            (stage, last),
        )
        way: list[BatchRecord] = []
        for record in map(BatchRecord._make, rows):
            follows = (
                record.step == way[-1].step - 1 and record.id < way[-1].id
                if way
                else record.step == last
            )
            if follows:
                way.append(record)
        return way[::-1]

    def decide(self, stage: str, name: str, value: Any) -> Any:
        """Record a choice the first time and return the recorded one ever after (for example the
        thread count).
        """
        if (taken := self.decided(stage, name)) is not None:
            return taken
        self._write(
            "INSERT INTO decisions (time, stage, name, value) VALUES (?, ?, ?, ?)",
            [(time.time(), stage, name, json.dumps(value))],
        )
        return value

    def decided(self, stage: str, name: str) -> Any:
        """The recorded choice, None where none was taken."""
        row = self._connection.execute(
            "SELECT value FROM decisions WHERE stage=? AND name=? ORDER BY id LIMIT 1",
            (stage, name),
        ).fetchone()
        return None if row is None else json.loads(row[0])

    def series(self, stage: str, name: str) -> list[tuple[int, float]]:
        """(step, value) of one metric in step order, the last writing of each step."""
        rows = self._connection.execute(
            "SELECT step, value FROM metrics WHERE id IN "
            "(SELECT MAX(id) FROM metrics WHERE stage=? AND name=? GROUP BY step) ORDER BY step",
            (stage, name),
        )
        return [
            (int(step), float("nan") if value is None else float(value)) for step, value in rows
        ]

    def steps_after(self, last: int) -> Iterator[tuple[int, str, int, dict[str, float]]]:
        """What was written after metric number `last`, in that order: (number, stage, step, values)
        of each step.
        """
        rows = self._connection.execute(
            "SELECT id, stage, step, name, value FROM metrics WHERE id>? ORDER BY id", (last,)
        )
        for (stage, step), group in groupby(rows, lambda row: (row[1], row[2])):
            found = list(group)
            yield (
                found[-1][0],
                stage,
                step,
                {name: float("nan") if value is None else value for _, _, _, name, value in found},
            )

    def names(self, stage: str) -> list[str]:
        """The metrics that a stage has written."""
        return [
            name
            for (name,) in self._connection.execute(
                "SELECT DISTINCT name FROM metrics WHERE stage=? ORDER BY name", (stage,)
            )
        ]

    def events(self, stage: str | None = None, name: str | None = None) -> list[dict[str, Any]]:
        """Events in the order in which they happened: {time, stage, name, details}."""
        rows = self._connection.execute(
            "SELECT time, stage, name, details FROM events WHERE (? IS NULL OR stage=?) AND (? IS "
            "NULL OR name=?) "
            "ORDER BY id",
            (stage, stage, name, name),
        )
        return [{"time": t, "stage": s, "name": n, "details": json.loads(d)} for t, s, n, d in rows]

    def close(self) -> None:
        """Close the store; further writes are an error."""
        self._connection.close()

    def _append(self, line: dict[str, Any]) -> None:
        """A line of metrics.jsonl; one that a kill or a full disk left unended is ended first."""
        if self.path is None:
            return
        path = self.path.with_name(METRICS)
        with disk_errors(path), self._lock, open(path, "ab+") as file:
            begins = not file.tell()
            if not begins:
                file.seek(-1, os.SEEK_END)
                begins = file.read(1) == b"\n"
            file.write((b"" if begins else b"\n") + json.dumps(line).encode() + b"\n")

    def _write(self, statement: str, rows: list[tuple[Any, ...]]) -> None:
        if self.path is None:
            return
        with self._lock:
            try:
                self._connection.execute("BEGIN")
                self._connection.executemany(statement, rows)
                self._connection.execute("COMMIT")
            except sqlite3.OperationalError as error:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                if "full" in str(error):
                    raise Failed(
                        f"no space left on the disk that holds {self.path}",
                        "free some space and run the same command again",
                    ) from None
                raise Failed(
                    f"tracking store {self.path} cannot be written: {error}",
                    "see that no other run uses this directory and that it may be written",
                ) from None
