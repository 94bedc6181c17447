"""Other people's published logs by the same tests: arms, runs, and one number for each run.

Where the log has seeds, runs with the same seed are pairs, and the paired rule holds. Else the arms
are independent, and Welch's test says whether they differ. A log is looked at once, so nothing is
spent on looks; whoever chose when to stop after seeing results has to be believed or not.
"""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, variance

from xushi.base.errors import BadInput
from xushi.ladder.distributions import t_above, t_quantile
from xushi.ladder.verdict import ALPHA, Verdict, decide, settled, welch_degrees

COLUMNS = ("arm", "run", "metric")
_REMEDY = "give a CSV file whose first line names its columns, and --columns ARM,RUN,METRIC[,SEED]"


@dataclass(frozen=True, slots=True)
class Judged:
    """A variant beside a baseline. `difference`, `low` and `high` are gains (positive: better), at
    5 % on either side. `paired`: whether runs were paired by their seeds. `reason` says what is
    missing where nothing can be said.
    """

    baseline: str
    variant: str
    baseline_runs: int
    variant_runs: int
    baseline_mean: float
    variant_mean: float
    difference: float
    low: float
    high: float
    p_gain: float
    paired: bool
    verdict: Verdict
    reason: str


@dataclass(frozen=True, slots=True)
class Logs:
    """Each arm's runs in the order of the file: their metric, by run, and by seed if there is
    one.
    """

    runs: Mapping[str, Mapping[str, float]]
    seeds: Mapping[str, Mapping[str, float]]


def read_logs(path: Path, columns: Sequence[str] = COLUMNS, higher_is_better: bool = False) -> Logs:
    """The runs of a CSV file with `columns` (arm, run, metric and, if it has one, seed). A run of
    several rows counts with its last: a log has a row a step. Metrics are turned so that less is
    better.
    """
    runs: dict[str, dict[str, float]] = {}
    seeds: dict[str, dict[str, float]] = {}
    of_seed: dict[tuple[str, str], str] = {}
    for number, row in _rows(path, columns):
        if any(row[name] is None for name in columns):
            raise BadInput(f"{path}, line {number} has fewer columns than the first line", _REMEDY)
        arm, run, text = (row[name] for name in columns[:3])
        try:
            value = float(text)
        except ValueError:
            raise BadInput(f"{path}, line {number}: {text!r} is not a number", _REMEDY) from None
        if not math.isfinite(value):
            raise BadInput(
                f"{path}, line {number}: run {run} of {arm} has {text}",
                "leave diverged runs out, and say so: a mean over them says nothing",
            )
        value = -value if higher_is_better else value
        runs.setdefault(arm, {})[run] = value
        if len(columns) > 3:
            seed = row[columns[3]]
            if of_seed.setdefault((arm, seed), run) != run:
                raise BadInput(
                    f"{path}, line {number}: seed {seed} of {arm} is used by two runs, "
                    f"{of_seed[arm, seed]} and {run}",
                    "the same seed twice is no replication; leave one of them out",
                )
            seeds.setdefault(arm, {})[seed] = value
    if len(runs) < 2:
        raise BadInput(f"{path} has {len(runs)} arms; there is nothing to compare", _REMEDY)
    return Logs(runs, seeds)


def _rows(path: Path, columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            known = reader.fieldnames or []
            if missing := [name for name in columns if name not in known]:
                raise BadInput(
                    f"{path} has no column {missing[0]}; it has {', '.join(known) or 'none'}",
                    _REMEDY,
                )
            return [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{path} cannot be read: {error}", _REMEDY) from None


def judge(logs: Logs, baseline: str, variant: str, smallest_effect: float) -> Judged:
    """Compare two arms of the logs, by pairs where they share two seeds or more."""
    for arm in (baseline, variant):
        if arm not in logs.runs:
            raise BadInput(
                f"the log has no arm {arm}", f"use one of {', '.join(sorted(logs.runs)[:20])}"
            )
    shared = [seed for seed in logs.seeds.get(baseline, {}) if seed in logs.seeds.get(variant, {})]
    if len(shared) > 1:
        ours = [logs.seeds[baseline][seed] for seed in shared]
        theirs = [logs.seeds[variant][seed] for seed in shared]
        return _paired(baseline, variant, ours, theirs, smallest_effect)
    return _unpaired(
        baseline,
        variant,
        list(logs.runs[baseline].values()),
        list(logs.runs[variant].values()),
        smallest_effect,
    )


def _paired(
    baseline: str, variant: str, ours: Sequence[float], theirs: Sequence[float], smallest: float
) -> Judged:
    decision = decide(ours, theirs, smallest, (len(ours),))
    look = decision.looks[-1]
    return Judged(
        baseline, variant, len(ours), len(theirs), fmean(ours), fmean(theirs),
        look.difference, look.low, look.high, look.p_gain, True, decision.verdict, decision.reason,
    )  # fmt: skip


def _unpaired(
    baseline: str, variant: str, ours: Sequence[float], theirs: Sequence[float], smallest: float
) -> Judged:
    difference = fmean(ours) - fmean(theirs)
    low, high, p_gain = -math.inf, math.inf, 1.0
    reason = "one run of an arm says nothing about chance"
    if len(ours) > 1 and len(theirs) > 1:
        of_ours, of_theirs = variance(ours) / len(ours), variance(theirs) / len(theirs)
        reason = "the runs of an arm are all the same, so that nothing tells it from chance"
        if of_ours + of_theirs > 0:
            error = math.sqrt(of_ours + of_theirs)
            degrees = welch_degrees(of_ours, len(ours) - 1, of_theirs, len(theirs) - 1)
            half_width = error * t_quantile(ALPHA, degrees)
            low, high = difference - half_width, difference + half_width
            p_gain = t_above(difference / error, degrees)
            reason = ""
    verdict, why = settled(low, high, smallest, final=True)
    return Judged(
        baseline, variant, len(ours), len(theirs), fmean(ours), fmean(theirs),
        difference, low, high, p_gain, False, verdict, reason or why,
    )  # fmt: skip
