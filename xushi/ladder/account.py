"""The ledger as an account: what was asked, what it said, what it cost."""

from dataclasses import dataclass
from typing import Any

from xushi.ladder.ledger import Ledger


@dataclass(frozen=True, slots=True)
class Line:
    """A question. `seconds`: of all runs that it uses; `own_seconds`: of those that no earlier
    question had paid for. `result` is the last one, None if none was reached.
    """

    number: int
    name: str
    question: str
    level: float
    seconds: float
    own_seconds: float
    result: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class Account:
    """All questions, and the seconds of all runs, failed ones too."""

    lines: tuple[Line, ...]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """The account under stable names."""
        return {
            "seconds": self.seconds,
            "ideas": [
                {
                    "entry": line.number,
                    "name": line.name,
                    "question": line.question,
                    "level": line.level,
                    "seconds": line.seconds,
                    "own_seconds": line.own_seconds,
                    "result": line.result,
                }
                for line in self.lines
            ],
        }

    def table(self) -> str:
        """The account for a person: a line a question, and the total."""
        rows = [("", "idea", "verdict", "gain", "interval", "pairs", "seconds")]
        for line in self.lines:
            result = line.result
            if result is None:
                rows.append((str(line.number), line.name, "open", "", "", "", _s(line.own_seconds)))
                continue
            verdict = result["verdict"] + (", promoted" if result["promoted"] else "")
            interval = f"{result['low']:.4g} to {result['high']:.4g}"
            gain = f"{result['difference']:.4g}"
            rows.append(
                (
                    str(line.number), line.name, verdict, gain, interval, str(result["pairs"]),
                    _s(line.own_seconds),
                )
            )  # fmt: skip
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        shown = ["  ".join(f"{c:<{w}}" for c, w in zip(r, widths, strict=True)) for r in rows]
        total = f"{_s(self.seconds)} seconds of runs in all"
        return "\n".join([*(row.rstrip() for row in shown), total])


def account(ledger: Ledger) -> Account:
    """What the ledger holds."""
    results: dict[int, dict[str, Any]] = {}
    for number, _, decision in ledger.decisions():
        results[number] = decision
    paid: set[str] = set()
    lines = []
    for entry in ledger.entries():
        jobs = {job.hash: job.seconds or 0.0 for *_, job in ledger.uses(entry.number)}
        own = sum(seconds for hash, seconds in jobs.items() if hash not in paid)
        paid |= set(jobs)
        lines.append(
            Line(
                entry.number,
                entry.name,
                entry.idea.question,
                entry.level,
                sum(jobs.values()),
                own,
                results.get(entry.number),
            )
        )
    return Account(tuple(lines), sum(line.own_seconds for line in lines))


def _s(seconds: float) -> str:
    return f"{seconds:,.0f}"
