"""Trying an idea: pairs of runs, rung by rung, looked at as planned, until the question is settled.

Not here: the rule (`verdict`), the runs (`jobs`), what is kept (`ledger`).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from xushi.base.errors import BadInput, Failed
from xushi.base.locks import exclusive
from xushi.base.progress import say
from xushi.ladder.documents import document_error
from xushi.ladder.e_value import e_value
from xushi.ladder.idea import ARMS, BASELINE, VARIANT, Idea, entry_hash, files_read, read_idea
from xushi.ladder.jobs import Job, Runner, make_job
from xushi.ladder.ledger import Entry, JobRecord, Ledger, number_of
from xushi.ladder.looks import nominal_levels, overall_p, planned_looks
from xushi.ladder.verdict import (
    ALPHA,
    Decision,
    Look,
    Verdict,
    decide,
    look_at_pairs,
    pairs_to_settle,
    smallest_shown,
)

# Baselines get other seeds after so many ideas: those that share baseline runs share their luck.
IDEAS_PER_SEEDS = 10
CONFIRMING_PAIRS = 4
SEEDS_THAT_DIFFER = 4
CONFIRMING_SEEDS = 1_000_000_000  # from here on are seeds that no judgement has used


@dataclass(frozen=True, slots=True)
class Result:
    """What is known of an idea after it was tried. `difference`, `low` and `high` are gains of the
    variant at the largest rung that was run, in units of the metric (positive: better). `seconds`:
    of all its runs. `p` is paid for all looks, and for the confirmation where there was one.
    """

    entry: int
    name: str
    question: str
    verdict: Verdict
    reason: str
    promoted: bool
    difference: float
    low: float
    high: float
    pairs: int
    p: float
    level: float
    e_value: float
    seconds: float
    rungs: int
    more_pairs: int | None
    document_error: float | None


def try_idea(path: Path, directory: Path, workers: int, where: Path) -> Result:
    """Run what the idea in `path` still needs and return the verdict. `directory`: the ledger's;
    `where`: the directory in which commands run.
    """
    idea = read_idea(path)
    ledger = Ledger(directory)
    try:
        with exclusive(directory / "lock") as held:
            if not held:
                raise BadInput(
                    f"another xushi try is using the ledger {directory}",
                    "wait for it, or give another --ledger",
                )
            entry = _registered(ledger, path.stem, idea, where)
            with Runner(ledger, workers, where) as runner:
                files = {arm: _all_files(idea, where, [arm]) for arm in ARMS}
                trial = Trial(ledger, runner, entry, files, workers)
                return trial.run()
    finally:
        ledger.close()


def _registered(ledger: Ledger, name: str, idea: Idea, where: Path) -> Entry:
    """The entry of the idea; a changed question, or changed files, are a new one."""
    files = _all_files(idea, where, ARMS)
    hash = entry_hash(idea, files)
    entry = ledger.entry(hash)
    if entry is None:
        before = [each.number for each in ledger.entries() if each.name == name]
        entry = ledger.register(hash, name, idea, files)
        changed = f"; it is not the question that entry {before[-1]} asked" if before else ""
        say(f"{name}: registered as entry {entry.number} of the ledger{changed}")
    say(f"{name}: {idea.question}")
    return entry


def _all_files(idea: Idea, where: Path, arms: Sequence[str]) -> dict[str, str]:
    """The hashes of what the arms read, by name."""
    files = files_read(idea, where, arms)
    if idea.recipe is not None:
        from xushi.ladder.arm import recipe_files  # it needs PyTorch, which commands do not

        files |= recipe_files(idea, where, arms)
    return files


class Trial:
    """One idea's pairs of runs. `files`: for each arm the hashes of the files that it reads."""

    def __init__(
        self,
        ledger: Ledger,
        runner: Runner,
        entry: Entry,
        files: dict[str, dict[str, str]],
        workers: int,
    ) -> None:
        self._ledger, self._runner, self._entry = ledger, runner, entry
        self._files, self._workers = files, workers
        self._idea = entry.idea
        self._looks = planned_looks(entry.idea.pairs)

    def run(self) -> Result:
        """Judge the rungs, the smallest first; the next is paid for where the idea is better."""
        for rung in range(len(self._idea.all_rungs())):
            decision = self._judge(rung)
            if decision.verdict != "better":
                break
        confirmed = None
        if decision.verdict == "better":
            confirmed = self._confirm(rung, decision)
        result = self._result(rung, decision, confirmed)
        self._ledger.decide(self._entry.number, rung, asdict(result))
        return result

    def _judge(self, rung: int) -> Decision:
        """Pairs at one rung, up to the look that settles it."""
        self._forecast(rung)
        for pairs in self._looks:
            seeds = self._seeds()[:pairs]
            self._run_all(rung, "judge", seeds, repeat=rung == 0)
            values = self._values(rung, "judge", seeds)
            self._check_values(rung, seeds, values)
            decision = decide(
                values[BASELINE],
                values[VARIANT],
                self._idea.smallest_effect,
                self._looks,
                self._entry.known[rung],
            )
            look = decision.looks[-1]
            self._tell(rung, look, decision)
            if decision.next_look is None:
                break
        return decision

    def _forecast(self, rung: int) -> None:
        """Say what the pairs of a rung cost and show, as far as earlier runs tell."""
        seconds = self._ledger.seconds_per_run(self._idea, rung)
        known = self._entry.known[rung]
        pairs = self._looks[-1]
        if seconds is None:
            say(
                f"  nothing is known of this baseline; the first {self._looks[0]} pairs tell what "
                f"the planned {pairs} cost and show"
            )
            return
        cost = f"  a pair takes about {2 * seconds:.1f} s of a core; {pairs} are planned"
        if known.degrees:
            sd = math.sqrt(2 * known.value)
            level = nominal_levels(self._looks, ALPHA)[-1]
            effect = smallest_shown(pairs, sd, known.degrees, level)
            cost += f" and show a gain of about {effect:.3g}, smaller ones where pairs agree more"
        say(cost)

    def _confirm(self, rung: int, decision: Decision) -> Look:
        """As many pairs as decided, but no fewer than four if so many were planned, on seeds that
        nothing has seen. Two would miss large gains too often.
        """
        pairs = max(decision.looks[-1].pairs, min(CONFIRMING_PAIRS, self._idea.pairs))
        first = CONFIRMING_SEEDS + 1000 * self._entry.number
        seeds = [first + number for number in range(pairs)]
        say(f"{self._entry.name}: better; {pairs} fresh pairs confirm it, or do not")
        self._run_all(rung, "confirm", seeds)
        values = self._values(rung, "confirm", seeds)
        known = self._entry.known[rung]
        return look_at_pairs(values[BASELINE], values[VARIANT], known, ALPHA)

    def _seeds(self) -> list[int]:
        block = (self._entry.number - 1) // IDEAS_PER_SEEDS
        return [1000 * block + number for number in range(1, self._idea.pairs + 1)]

    def _run_all(self, rung: int, purpose: str, seeds: Sequence[int], repeat: bool = False) -> None:
        """Run both arms with each seed, and the baseline's first seed twice where `repeat`."""
        jobs: list[Job] = []
        for seed in seeds:
            for arm in ARMS:
                job = self._job(rung, arm, seed)
                jobs.append(job)
                self._ledger.use(self._entry.number, rung, purpose, arm, seed, job.hash)
        if repeat:
            job = self._job(rung, BASELINE, seeds[0], repeat=1)
            jobs.append(job)
            self._ledger.use(self._entry.number, rung, "repeat", BASELINE, seeds[0], job.hash)
        self._runner.run(jobs, self._told)

    def _job(self, rung: int, arm: str, seed: int, repeat: int = 0) -> Job:
        idea = self._idea
        title = f"{arm}, seed {seed}{f', rung {rung + 1}' if len(idea.all_rungs()) > 1 else ''}"
        command = idea.command(arm, rung, seed)
        return make_job(command, self._files[arm], idea.deadline_seconds, title, repeat)

    def _told(self, job: Job, record: JobRecord) -> None:
        if record.printed is not None:
            value = number_of(record.printed, self._idea.metric)
            say(f"  {job.title}: {self._idea.metric} {value}, {record.seconds:.1f} s")

    def _values(self, rung: int, purpose: str, seeds: Sequence[int]) -> dict[str, list[float]]:
        """Each arm's metric by seed, turned so that less is better."""
        sign = -1 if self._idea.higher_is_better else 1
        return {
            arm: [sign * self._metric(rung, purpose, arm, seed) for seed in seeds] for arm in ARMS
        }

    def _metric(self, rung: int, purpose: str, arm: str, seed: int) -> float:
        printed = self._printed(rung, purpose, arm, seed)
        name, title = self._idea.metric, self._job(rung, arm, seed).title
        value = number_of(printed, name)
        if value is None:
            known = ", ".join(sorted(printed)) or "nothing"
            raise BadInput(
                f"{title} printed no number {name} in its last line",
                f"set metric to a key that is there ({known}), or print it",
            )
        if not math.isfinite(value):
            raise Failed(
                f"{title}: {name} is {value}: the run diverged",
                "change what makes it diverge: a mean over it would say nothing",
            )
        return value

    def _printed(self, rung: int, purpose: str, arm: str, seed: int) -> dict[str, Any]:
        job = self._job(rung, arm, seed, repeat=int(purpose == "repeat"))
        record = self._ledger.job(job.hash)
        assert record is not None and record.printed is not None
        return record.printed

    def _check_values(
        self, rung: int, seeds: Sequence[int], values: dict[str, list[float]]
    ) -> None:
        """Refuse runs that say nothing about the question."""
        metric = self._idea.metric
        same = [arm for arm in ARMS if len(set(values[arm])) == 1]
        # Two runs that agree may be rounding; four are not.
        if same == list(ARMS) or (same and len(seeds) >= SEEDS_THAT_DIFFER):
            raise BadInput(
                f"{metric} is the same for seeds {', '.join(map(str, seeds))} in "
                f"{'both arms' if len(same) > 1 else same[0]}: the seed does nothing, or too few "
                "digits are printed",
                "use {seed} in the program for its initial weights and the order of its data",
            )
        if values[BASELINE] == values[VARIANT]:
            raise BadInput(
                f"both arms have the same {metric} for every seed: the idea changes nothing",
                "check that the variant's options are read",
            )
        if rung == 0 and len(seeds) == self._looks[0]:
            self._check_repetition(seeds[0], values[BASELINE][0])

    def _check_repetition(self, seed: int, before: float) -> None:
        again = self._metric(0, "repeat", BASELINE, seed)
        again = -again if self._idea.higher_is_better else again
        if again != before:
            say(
                f"{self._entry.name}: seed {seed} twice gives {abs(again - before):.3g} of "
                "difference: the seed does not decide everything; what it leaves counts as noise"
            )

    def _tell(self, rung: int, look: Look, decision: Decision) -> None:
        where = f"rung {rung + 1}, " if len(self._idea.all_rungs()) > 1 else ""
        say(
            f"{self._entry.name}: {where}{look.pairs} pairs: gain {look.difference:.4g} "
            f"({look.low:.4g} to {look.high:.4g}): {decision.verdict}"
        )
        if decision.next_look is not None:
            pair = self._seconds_per_pair(rung)
            seconds = pair * (decision.next_look - look.pairs) / self._workers
            more = pairs_to_settle(look, self._idea.smallest_effect)
            say(
                f"  next look after {decision.next_look} pairs, in about {seconds:.0f} s (a pair "
                f"takes {pair:.1f} s of a core); at this spread about {more} would settle it"
            )

    def _seconds_per_pair(self, rung: int) -> float:
        seconds = [
            job.seconds
            for where, purpose, _, _, job in self._ledger.uses(self._entry.number)
            if where == rung and purpose == "judge" and job.seconds is not None
        ]
        return 2 * sum(seconds) / len(seconds)

    def _result(self, rung: int, decision: Decision, confirmation: Look | None) -> Result:
        look = decision.looks[-1]
        p = overall_p([each.p_gain for each in decision.looks], self._looks)
        promoted = False
        if confirmation is not None:
            p = combined(p, confirmation.p_gain)
            promoted = confirmation.p_gain <= ALPHA and p <= self._entry.level
        values = self._values(rung, "judge", self._seeds()[: look.pairs])
        gains = [b - v for b, v in zip(values[BASELINE], values[VARIANT], strict=True)]
        uses = self._ledger.uses(self._entry.number)
        jobs = {job.hash: job.seconds or 0.0 for *_, job in uses}
        is_open = decision.verdict == "unsettled"
        return Result(
            entry=self._entry.number,
            name=self._entry.name,
            question=self._idea.question,
            verdict=decision.verdict,
            reason=decision.reason,
            promoted=promoted,
            difference=look.difference,
            low=look.low,
            high=look.high,
            pairs=look.pairs,
            p=p,
            level=self._entry.level,
            e_value=e_value(gains),
            seconds=sum(jobs.values()),
            rungs=rung + 1,
            more_pairs=pairs_to_settle(look, self._idea.smallest_effect) - look.pairs
            if is_open
            else None,
            document_error=self._document_error(rung, look.pairs),
        )

    def _document_error(self, rung: int, pairs: int) -> float | None:
        """Where the runs of a recipe were judged by their bits per byte."""
        if self._idea.recipe is None or self._idea.metric != "bits_per_byte":
            return None
        runs = {
            arm: [self._printed(rung, "judge", arm, seed) for seed in self._seeds()[:pairs]]
            for arm in ARMS
        }
        return document_error(*([run["documents"] for run in runs[arm]] for arm in ARMS))


def combined(first: float, second: float) -> float:
    """The p-value of two independent ones together (Fisher's method)."""
    product = first * second
    return product * (1 - math.log(product)) if product > 0 else 0.0
