"""What pairs of runs say about an idea: better, worse, of no interest, or unsettled.

There are two tests, each at half the level. The *paired* test uses the spread of the
idea's own differences: it sees small effects of changes that leave a run nearly the same. The *run*
test uses the spread of single runs over seeds, of which the ledger knows more than this idea's own
seeds tell: it settles large effects after two pairs. A pair's spread is never taken from other
ideas, since it differs between ideas by a factor of a hundred.

Everything here is a function of the runs in the order of their seeds, so that whoever looks later,
or more often, gets the same verdict.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev, variance
from typing import Literal

from xushi.ladder.distributions import t_above, t_quantile
from xushi.ladder.looks import nominal_levels

Verdict = Literal["better", "none", "worse", "unsettled"]
ALPHA = 0.05  # of each one-sided test, over all looks
MOST_FORECAST = 100_000  # pairs
# Of the largest metric: a spread of gains below this is the rounding of their last bit.
_ROUNDING = 4 * sys.float_info.epsilon
_RULED_OUT = "an effect of interest is ruled out, and harm is not shown"


@dataclass(frozen=True, slots=True)
class RunVariance:
    """The variance of a run's metric over seeds as other runs show it, with its degrees of freedom.
    Nothing known: zero degrees.
    """

    value: float = 0.0
    degrees: int = 0


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen at one look. `difference` is the mean gain of the variant (positive: better);
    `low` and `high` bound it at the nominal `level` on either side. `p_gain` and `p_harm` are of
    the tests of "no gain" and of "no harm". `pair_sd` is the spread of the pairs' gains, `run_sd`
    that of a gain between unpaired runs, known with `run_degrees`.
    """

    pairs: int
    level: float
    difference: float
    low: float
    high: float
    p_gain: float
    p_harm: float
    pair_sd: float
    run_sd: float
    run_degrees: float


@dataclass(frozen=True, slots=True)
class Decision:
    """A verdict, why, and all looks up to it. `next_look` is the number of pairs at which more can
    be said; None once it is settled, or where the plan has no more looks.
    """

    verdict: Verdict
    reason: str
    looks: tuple[Look, ...]
    next_look: int | None = None


def look_at_pairs(
    baseline: Sequence[float], variant: Sequence[float], known: RunVariance, level: float
) -> Look:
    """The two tests on the gains `baseline` - `variant` of two pairs or more (a smaller metric is
    better), at `level` on either side.
    """
    count = len(baseline)
    gains = [base - own for base, own in zip(baseline, variant, strict=True)]
    difference = fmean(gains)
    pair_sd = stdev(gains)
    if pair_sd <= _ROUNDING * max(map(abs, (*baseline, *variant))):
        pair_sd = 0.0
    of_both, degrees = _run_variance(variance(baseline), variance(variant), count, known)
    errors = (
        (pair_sd / math.sqrt(count), count - 1.0),
        (math.sqrt(of_both / count), degrees),
    )
    # Without any spread, as between metrics printed with two digits, a test says nothing.
    half_widths = [
        error * t_quantile(level / 2, degrees) if error else math.inf for error, degrees in errors
    ]
    return Look(
        pairs=count,
        level=level,
        difference=difference,
        low=difference - min(half_widths),
        high=difference + min(half_widths),
        p_gain=_both(errors, difference),
        p_harm=_both(errors, -difference),
        pair_sd=pair_sd,
        run_sd=math.sqrt(of_both),
        run_degrees=degrees,
    )


def _run_variance(
    baseline: float, variant: float, count: int, known: RunVariance
) -> tuple[float, float]:
    """The variance of a gain between unpaired runs, and its degrees of freedom. Each arm has that
    of the baseline's runs and of what is known together, or its own where that is larger: earlier
    runs, and the baseline's, may have been quieter.
    """
    degrees = known.degrees + count - 1
    together = (known.degrees * known.value + (count - 1) * baseline) / degrees
    if together >= max(baseline, variant):
        return 2 * together, degrees
    arms = [
        (own, count - 1) if own > together else (together, degrees) for own in (baseline, variant)
    ]
    (first, of_first), (second, of_second) = arms
    return first + second, welch_degrees(first, of_first, second, of_second)


def welch_degrees(first: float, of_first: float, second: float, of_second: float) -> float:
    """Degrees of freedom of a sum of two estimated variances (Welch, Biometrika 34, 1947): no more
    than both have together, and no fewer than the smaller has.
    """
    return (first + second) ** 2 / (first**2 / of_first + second**2 / of_second)


def _both(errors: Sequence[tuple[float, float]], difference: float) -> float:
    """Twice the smaller p-value of the two tests of `difference` > 0: the price of taking both."""
    return min(1.0, 2 * min(_p(difference, error, degrees) for error, degrees in errors))


def _p(difference: float, error: float, degrees: float) -> float:
    return t_above(difference / error, degrees) if error else 1.0


def decide(
    baseline: Sequence[float],
    variant: Sequence[float],
    smallest_effect: float,
    looks: tuple[int, ...],
    known: RunVariance = RunVariance(),
) -> Decision:
    """The verdict of the runs, pair by pair in the order of their seeds, looked at after the
    numbers of pairs in `looks` and no others.

    *Better*: "no gain" is rejected, and it is not none. *None*: the whole interval lies within plus
    and minus the smallest effect, or "at least the smallest effect" is rejected and harm is not
    shown. *Worse*: "no harm" is rejected, and it is not none. An effect that is rejected while harm
    is still open is looked at once more.
    """
    seen: list[Look] = []
    for pairs, level in zip(looks, nominal_levels(looks, ALPHA), strict=True):
        if pairs > len(baseline):
            return Decision("unsettled", "fewer pairs than the next look needs", tuple(seen), pairs)
        ruled_out = any(look.high < smallest_effect for look in seen)
        look = look_at_pairs(baseline[:pairs], variant[:pairs], known, level)
        seen.append(look)
        verdict, reason = settled(look.low, look.high, smallest_effect, pairs == looks[-1])
        if ruled_out and verdict != "worse":  # this was the one more look
            verdict, reason = "none", _RULED_OUT
        if verdict != "unsettled":
            return Decision(verdict, reason, tuple(seen))
    return Decision("unsettled", "all planned pairs were run", tuple(seen))


def settled(low: float, high: float, smallest_effect: float, final: bool) -> tuple[Verdict, str]:
    """The verdict, and why, of a gain between `low` and `high`. `final`: there is no further look
    that could tell none from worse.
    """
    if -smallest_effect < low and high < smallest_effect:
        return "none", "the effect is smaller than what is of interest"
    if high < 0:
        return "worse", '"no harm" is ruled out'
    if high < smallest_effect:
        return ("none", _RULED_OUT) if final else ("unsettled", _RULED_OUT)
    if low > 0:
        return "better", '"no gain" is ruled out'
    return "unsettled", "a gain and a loss are both possible"


def pairs_to_settle(look: Look, smallest_effect: float) -> int:
    """About how many pairs in all would settle it if the mean and the spread stayed as they are.

    "No gain" is ruled out by an interval narrower than the difference, the smallest effect by one
    narrower than what the difference lacks to it.
    """
    distance = max(look.difference, smallest_effect - look.difference)

    def is_enough(pairs: int) -> bool:
        more = pairs - look.pairs
        half_widths = [
            sd * t_quantile(look.level / 2, degrees + more) / math.sqrt(pairs)
            for sd, degrees in (
                (look.pair_sd, look.pairs - 1),
                (look.run_sd, look.run_degrees),
            )
            if sd
        ]
        return min(half_widths, default=math.inf) < distance

    low, high = look.pairs, look.pairs + 1
    while not is_enough(high) and high < MOST_FORECAST:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def smallest_shown(pairs: int, sd: float, degrees: float, level: float) -> float:
    """The gain that `pairs` pairs show in four of five cases. `sd` is the spread of a pair's gain,
    known with `degrees` of freedom; `level` that of the last look.
    """
    return (t_quantile(level / 2, degrees) + t_quantile(0.2, degrees)) * sd / math.sqrt(pairs)
