"""What the ledger holds of one question: every run that was used, every look, the last result.

Not here: what of it a page shows (`page`).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from xushi.base.errors import BadInput
from xushi.ladder.idea import ARMS, BASELINE, VARIANT
from xushi.ladder.ledger import Entry, JobRecord, Ledger
from xushi.ladder.looks import planned_looks
from xushi.ladder.verdict import ALPHA, Decision, Look, decide, look_at_pairs


@dataclass(frozen=True, slots=True)
class Pair:
    """A run of each arm with one seed: the metric as printed, the gain of the variant (positive:
    better), and the seconds of both runs.
    """

    seed: int
    baseline: float
    variant: float
    gain: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Rung:
    """The pairs of one rung in the order of their seeds, and what they say by the rule."""

    keys: dict[str, Any]
    pairs: tuple[Pair, ...]
    decision: Decision


@dataclass(frozen=True, slots=True)
class Facts:
    """A question that has a result. `result` is the last one, as `xushi try` gave it. `repeated` is
    the metric of the baseline's first seed, run twice; None where it was not. `arms`: what the
    first run of each arm of a recipe printed, at the largest rung; empty for commands.
    """

    entry: Entry
    result: dict[str, Any]
    rungs: tuple[Rung, ...]
    confirming: tuple[Pair, ...]
    confirmation: Look | None
    repeated: tuple[float, float] | None
    arms: dict[str, dict[str, Any]]

    def as_json(self) -> dict[str, Any]:
        """Everything under stable names."""
        return {
            "entry": self.entry.number,
            "name": self.entry.name,
            "idea": self.entry.idea.model_dump(),
            "files": self.entry.files,
            "result": self.result,
            "rungs": [
                {
                    "keys": rung.keys,
                    "known_run_variance": asdict(known),
                    "pairs": [asdict(pair) for pair in rung.pairs],
                    "looks": [asdict(look) for look in rung.decision.looks],
                    "verdict": rung.decision.verdict,
                    "reason": rung.decision.reason,
                }
                for rung, known in zip(self.rungs, self.entry.known, strict=False)
            ],
            "confirmation": self.confirmation
            and {
                "pairs": [asdict(pair) for pair in self.confirming],
                "look": asdict(self.confirmation),
            },
            "repeated": self.repeated,
            "arms": self.arms,
        }


def facts(ledger: Ledger, number: int) -> Facts:
    """What the ledger holds of entry `number`. The looks are computed again from its runs."""
    entry = next((each for each in ledger.entries() if each.number == number), None)
    results = [decision for at, _, decision in ledger.decisions() if at == number]
    if entry is None or not results:
        raise BadInput(f"entry {number} of the ledger has no result", "try its idea again")
    uses = ledger.uses(number)
    rungs = tuple(_rung(entry, uses, rung) for rung in range(results[-1]["rungs"]))
    better = results[-1]["verdict"] == "better"  # else those of an earlier result may be there
    confirming = _pairs(entry, uses, len(rungs) - 1, "confirm") if better else ()
    return Facts(
        entry=entry,
        result=results[-1],
        rungs=rungs,
        confirming=confirming,
        confirmation=look_at_pairs(*_turned(entry, confirming), entry.known[len(rungs) - 1], ALPHA)
        if len(confirming) > 1
        else None,
        repeated=_repeated(entry, uses),
        arms=_arms(uses, len(rungs) - 1) if entry.idea.recipe else {},
    )


Uses = Sequence[tuple[int, str, str, int, JobRecord]]


def _arms(uses: Uses, rung: int) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for where, why, arm, _, job in uses:
        if (where, why) == (rung, "judge") and job.printed:
            found.setdefault(arm, job.printed)
    return found


def _rung(entry: Entry, uses: Uses, rung: int) -> Rung:
    pairs = _pairs(entry, uses, rung, "judge")
    decision = decide(
        *_turned(entry, pairs),
        entry.idea.smallest_effect,
        planned_looks(entry.idea.pairs),
        entry.known[rung],
    )
    return Rung(entry.idea.all_rungs()[rung], pairs, decision)


def _pairs(entry: Entry, uses: Uses, rung: int, purpose: str) -> tuple[Pair, ...]:
    """The pairs of which both runs are done."""
    metric = entry.idea.metric
    runs: dict[int, dict[str, JobRecord]] = {}
    for where, why, arm, seed, job in uses:
        if (where, why) == (rung, purpose) and job.status == "done":
            runs.setdefault(seed, {})[arm] = job
    pairs = []
    for seed, jobs in runs.items():
        if len(jobs) < len(ARMS):
            continue
        values = {arm: float((jobs[arm].printed or {})[metric]) for arm in ARMS}
        lost = values[BASELINE] - values[VARIANT]
        pairs.append(
            Pair(
                seed=seed,
                baseline=values[BASELINE],
                variant=values[VARIANT],
                gain=-lost if entry.idea.higher_is_better else lost,
                seconds=sum(jobs[arm].seconds or 0.0 for arm in ARMS),
            )
        )
    return tuple(pairs)


def _turned(entry: Entry, pairs: Sequence[Pair]) -> tuple[list[float], list[float]]:
    """Each arm's metric, turned so that less is better."""
    sign = -1 if entry.idea.higher_is_better else 1
    return [sign * pair.baseline for pair in pairs], [sign * pair.variant for pair in pairs]


def _repeated(entry: Entry, uses: Uses) -> tuple[float, float] | None:
    again = [job for _, why, _, _, job in uses if why == "repeat" and job.status == "done"]
    first = _pairs(entry, uses, 0, "judge")
    if not again or not first:
        return None
    return first[0].baseline, float((again[0].printed or {})[entry.idea.metric])
