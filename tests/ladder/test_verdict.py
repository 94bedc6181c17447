"""The rule: what must never change a verdict, and what it promises, by simulation.

Each simulation has a fixed seed. `allowed` is the stated share and four binomial deviations: a
share that is as stated stays below it in all but one of 30,000 seeds.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from xushi.ladder.distributions import t_quantile
from xushi.ladder.looks import nominal_levels, planned_looks
from xushi.ladder.trial import combined
from xushi.ladder.verdict import (
    ALPHA,
    Look,
    RunVariance,
    decide,
    look_at_pairs,
    pairs_to_settle,
    settled,
    smallest_shown,
    welch_degrees,
)

LOOKS = planned_looks(8)
# Small whole numbers over 64: their sums and differences are exact, so that equal means equal.
numbers = st.integers(-300, 300).map(lambda number: number / 64)
arms = st.lists(st.tuples(numbers, numbers), min_size=8, max_size=8).map(
    lambda pairs: tuple(map(list, zip(*pairs, strict=True)))
)
effects = st.integers(1, 200).map(lambda number: number / 64)
variances = st.builds(RunVariance, st.integers(1, 100).map(lambda n: n / 64), st.integers(0, 30))


def allowed(share: float, count: int) -> float:
    return share + 4 * math.sqrt(share * (1 - share) / count)


@given(arms, effects, variances, st.integers(-1000, 1000))
def test_shifting_both_arms_changes_nothing(runs, effect, known, shift):
    baseline, variant = runs
    moved = ([x + shift for x in baseline], [x + shift for x in variant])
    assert decide(*moved, effect, LOOKS, known) == decide(baseline, variant, effect, LOOKS, known)


@given(arms, effects, variances, st.integers(-8, 8))
def test_units_change_no_verdict(runs, effect, known, power):
    baseline, variant = runs
    unit = 2.0**power
    scaled = decide(
        [x * unit for x in baseline],
        [x * unit for x in variant],
        effect * unit,
        LOOKS,
        replace(known, value=known.value * unit**2),
    )
    before = decide(baseline, variant, effect, LOOKS, known)
    assert (scaled.verdict, scaled.reason) == (before.verdict, before.reason)
    for ours, theirs in zip(scaled.looks, before.looks, strict=True):
        assert ours.low == pytest.approx(theirs.low * unit, rel=1e-12)
        assert ours.p_gain == pytest.approx(theirs.p_gain, rel=1e-9)


@given(arms, effects, st.permutations(range(8)), st.integers(-400, 400), st.integers(2, 8))
def test_swapped_arms_turn_better_into_worse(runs, effect, order, gain, pairs):
    """At one look, and with arms of the same spread: a noisier variant is trusted less than a
    noisier baseline.
    """
    baseline = runs[0]
    variant = [baseline[at] - gain / 64 for at in order]
    assume(sorted(order[:pairs]) == list(range(pairs)) or pairs == 8)
    ours = look_at_pairs(baseline[:pairs], variant[:pairs], RunVariance(), ALPHA)
    theirs = look_at_pairs(variant[:pairs], baseline[:pairs], RunVariance(), ALPHA)
    assert (ours.p_gain, ours.p_harm) == (theirs.p_harm, theirs.p_gain)
    assert (ours.low, ours.high) == (-theirs.high, -theirs.low)
    turned = {"better": "worse", "worse": "better"}
    verdict = settled(ours.low, ours.high, effect, final=True)[0]
    other = settled(theirs.low, theirs.high, effect, final=True)[0]
    if verdict in turned:
        assert other == turned[verdict]
    assert other != "better" or verdict == "worse"


@given(arms, effects, variances)
def test_the_two_arms_are_never_both_better(runs, effect, known):
    verdicts = [decide(*order, effect, (8,), known).verdict for order in (runs, runs[::-1])]
    assert verdicts != ["better", "better"]
    assert verdicts != ["worse", "worse"]


@given(arms, effects, variances)
def test_more_looks_never_change_an_earlier_verdict(runs, effect, known):
    baseline, variant = runs
    whole = decide(baseline, variant, effect, LOOKS, known)
    for pairs in range(2, 9):
        part = decide(baseline[:pairs], variant[:pairs], effect, LOOKS, known)
        if whole.looks[-1].pairs <= pairs:
            assert part == whole
        else:
            assert part.verdict == "unsettled"
            assert part.looks == whole.looks[: len(part.looks)]
            assert part.next_look == next(look for look in LOOKS if look > pairs)


@given(arms, effects, variances)
def test_the_interval_and_the_p_value_say_the_same(runs, effect, known):
    """Below zero with its upper end, if and only if "no harm" is rejected at its level."""
    for look in decide(*runs, effect, LOOKS, known).looks:
        # The quantile is right to 1e-13 of itself; at the boundary either answer is right.
        assume(min(abs(look.p_gain - look.level), abs(look.p_harm - look.level)) > 1e-9)
        assert (look.low > 0) == (look.p_gain < look.level)
        assert (look.high < 0) == (look.p_harm < look.level)
        assert look.low <= look.difference <= look.high


def test_looks_have_their_nominal_levels():
    decision = decide([1.0, 2.0] * 4, [2.0, 1.0] * 4, 1e-3, LOOKS)
    assert tuple(look.level for look in decision.looks) == nominal_levels(LOOKS, ALPHA)


@pytest.mark.parametrize(
    ("baseline", "variant"),
    [
        ([2.0] * 8, [1.0] * 8),  # no spread in either arm
        ([1.1] * 8, [1.0] * 8),  # nor in numbers that are not exact
        ([3.0, 3.0], [3.0, 3.0]),
    ],
)
def test_without_any_spread_nothing_is_decided(baseline, variant):
    looks = planned_looks(len(baseline))
    decision = decide(baseline, variant, 0.01, looks)
    assert decision.verdict == "unsettled"
    last = decision.looks[-1]
    assert (last.p_gain, last.p_harm) == (1, 1)
    assert (last.low, last.high) == (-math.inf, math.inf)


@given(st.lists(st.integers(-500, 500), min_size=2, max_size=8), st.integers(1, 3))
def test_gains_that_are_equal_but_for_rounding_have_no_spread(values, digits):
    """Metrics of a few digits with one gain: their differences differ in the last bit, which is not
    noise. 1.1 - 1.0 and 1.2 - 1.1 would be a gain of 6e14 standard deviations.
    """
    assume(len(set(values)) > 1)
    unit = 10**digits
    baseline = [(value + 7) / unit for value in values]
    variant = [value / unit for value in values]
    look = look_at_pairs(baseline, variant, RunVariance(), ALPHA)
    assert look.pair_sd == 0
    runs_alone = look.difference / (look.run_sd / math.sqrt(look.pairs))
    assert look.p_gain > 1e-6 or runs_alone > 4


def test_the_smallest_spread_of_printed_digits_is_a_spread():
    look = look_at_pairs([1.1, 1.2], [1.0, 1.1 - 1e-9], RunVariance(), ALPHA)
    assert look.pair_sd == pytest.approx(1e-9 / math.sqrt(2), rel=1e-6)


def test_a_large_gain_is_settled_by_the_run_test_and_a_steady_one_by_the_pairs():
    """By hand, after two pairs: gains 10 and 12, t = 11; runs with variances of .5: t = 11 sqrt 2,
    on one degree of freedom p = atan(1 / t) / pi, paid twice. Then with a variance of 1 from 100
    runs more: t = 11 on 101 degrees.
    """
    baseline, variant = [20.0, 21.0], [10.0, 9.0]
    alone = look_at_pairs(baseline, variant, RunVariance(), ALPHA)
    assert alone.difference == 11
    assert alone.pair_sd == pytest.approx(math.sqrt(2))
    assert alone.run_sd == 1
    assert alone.p_gain == pytest.approx(2 * math.atan(1 / (11 * math.sqrt(2))) / math.pi, rel=1e-9)
    known = look_at_pairs(baseline, variant, RunVariance(1.0, 100), ALPHA)
    assert known.run_sd == pytest.approx(math.sqrt((100 + 0.5) / 101 * 2), rel=1e-12)
    assert known.run_degrees == 101
    assert known.p_gain < 1e-15
    steady = look_at_pairs([1.0, 2.0, 3.0, 4.0], [0.9, 1.9, 2.9, 3.91], RunVariance(), ALPHA)
    assert steady.p_gain < 1e-4


def test_a_noisier_variant_is_not_taken_as_quiet():
    """Its own variance counts, and the degrees of freedom are those of Welch."""
    quiet = look_at_pairs([1.0, 1.1], [0.0, 0.1], RunVariance(0.01, 50), ALPHA)
    noisy = look_at_pairs([1.0, 1.1], [-4.0, 4.1], RunVariance(0.01, 50), ALPHA)
    assert quiet.run_degrees == 51
    assert noisy.run_degrees < 1.01
    of_base = (50 * 0.01 + 0.005) / 51
    assert noisy.run_sd == pytest.approx(math.sqrt(of_base + 8.1**2 / 2), rel=1e-9)


@given(st.floats(0.01, 100), st.floats(1, 50), st.floats(0.01, 100), st.floats(1, 50))
def test_welch_degrees_lie_between_the_smaller_and_the_sum(first, ours, second, theirs):
    degrees = welch_degrees(first, ours, second, theirs)
    assert min(ours, theirs) * (1 - 1e-12) <= degrees <= (ours + theirs) * (1 + 1e-12)


@pytest.mark.parametrize(
    ("low", "high", "verdict", "final"),
    [
        (-0.9, 0.9, "none", "none"),
        (0.1, 0.9, "none", "none"),  # a gain that is shown, and of no interest
        (-0.9, -0.1, "none", "none"),
        (0.1, 1.1, "better", "better"),
        (1.1, 2.0, "better", "better"),
        (-1.1, -0.1, "worse", "worse"),
        (-2.0, 0.9, "unsettled", "none"),  # ruled out, while harm is open
        (-2.0, 2.0, "unsettled", "unsettled"),
        (-0.5, 2.0, "unsettled", "unsettled"),
        (-1.0, 0.9, "unsettled", "none"),
        (0.0, 2.0, "unsettled", "unsettled"),
    ],
)
def test_what_an_interval_settles(low, high, verdict, final):
    assert settled(low, high, 1.0, final=False)[0] == verdict
    assert settled(low, high, 1.0, final=True)[0] == final


def test_what_is_ruled_out_is_looked_at_once_more():
    """An effect of .01 is ruled out by two pairs, harm only by four; and where four do not show
    harm either, it is none and not asked again.
    """
    harm = [0.008, 0.012, 0.012, 0.016, 0.012, 0.012, 0.012, 0.012]
    tie = [0.008, 0.012, -0.01, -0.006, 0.012, 0.012, 0.012, 0.012]
    base, known = [0.0, 0.004] * 4, RunVariance(2e-5, 6)
    first = decide(base[:2], harm[:2], 0.01, LOOKS, known)
    assert (first.verdict, first.next_look) == ("unsettled", 4)
    assert first.looks[-1].high < 0.01
    assert first.looks[-1].high > 0
    assert decide(base, harm, 0.01, LOOKS, known).verdict == "worse"
    last = decide(base, tie, 0.01, LOOKS, known)
    assert last.verdict == "none"
    assert len(last.looks) == 2


def look(pair_sd: float, run_sd: float, difference: float) -> Look:
    return Look(4, 0.02, difference, -1, 1, 0.5, 0.5, pair_sd, run_sd, 6.0)


def test_the_forecast_is_the_least_number_of_pairs_that_settles():
    """By the definition, for a number at a time; a steadier idea, or a larger gain, needs fewer."""
    for pair_sd, difference in ((1.0, 0.5), (0.1, 0.05), (1.0, 0.02), (0.02, 0.3)):
        seen = look(pair_sd, 2 * pair_sd, difference)

        def narrow(pairs: int, seen: Look = seen) -> bool:
            half = seen.pair_sd * t_quantile(0.01, pairs - 1) / math.sqrt(pairs)
            return half < max(seen.difference, 0.04 - seen.difference)

        forecast = pairs_to_settle(seen, 0.04)
        assert forecast == 5 or not narrow(forecast - 1)
        assert narrow(forecast)
    assert pairs_to_settle(look(0.1, 9.0, 0.05), 0.04) < pairs_to_settle(look(1, 9.0, 0.05), 0.04)
    assert pairs_to_settle(look(9.0, 0.1, 0.05), 0.04) < pairs_to_settle(look(9, 1.0, 0.05), 0.04)


def test_a_spread_that_is_not_known_forecasts_nothing():
    assert pairs_to_settle(look(0.0, 1.0, 0.5), 0.04) == pairs_to_settle(look(1e9, 1.0, 0.5), 0.04)


def test_fishers_combination_is_uniform_for_two_uniform_values():
    assert combined(0.05, 1) == pytest.approx(0.05 * (1 - math.log(0.05)), rel=1e-12)
    assert combined(0, 0.5) == 0
    random = np.random.default_rng(30)
    values = [combined(*pair) for pair in random.uniform(size=(20_000, 2))]
    for level in (0.01, 0.1, 0.5):
        share = float(np.mean(np.array(values) <= level))
        assert abs(share - level) < allowed(level, 20_000) - level


def ladders(
    count: int,
    seed: int,
    effect: float,
    correlation: float,
    spread: float,
    degrees: int,
    earlier: float = 1.0,
) -> list[tuple[str, int, bool]]:
    """(verdict, pairs, whether the interval covers) of pairs of runs: the baseline has a spread of
    one, the variant another, the gain is `effect`, and the ledger knows the variance of runs with
    the spread `earlier` with `degrees` of freedom, as well as so many runs show it.
    """
    random = np.random.default_rng(seed)
    done = []
    for _ in range(count):
        base, own = random.normal(size=(2, 8))
        variant = spread * (correlation * base + math.sqrt(1 - correlation**2) * own) - effect
        value = earlier**2 * random.chisquare(degrees) / degrees if degrees else 0.0
        known = RunVariance(float(value), degrees)
        decision = decide(base.tolist(), variant.tolist(), 1e-9, LOOKS, known)
        last = decision.looks[-1]
        done.append((decision.verdict, last.pairs, last.low <= effect <= last.high))
    return done


def share_of(verdict: str, done: list[tuple[str, int, bool]]) -> float:
    return sum(each[0] == verdict for each in done) / len(done)


CORRELATIONS, SPREADS, KNOWN = (0.0, 0.5, 0.9, 0.99), (1.0, 1.5, 2.0), (0, 16)


def check_level(
    count: int, correlation: float, spread: float, degrees: int, earlier: float = 1.0
) -> None:
    """Without a gain, better and worse at most at the level of .05."""
    seed = round(1000 * correlation + 10 * spread + degrees)
    done = ladders(count, seed, 0.0, correlation, spread, degrees, earlier)
    for verdict in ("better", "worse"):
        assert share_of(verdict, done) < allowed(ALPHA, count)


@pytest.mark.parametrize(
    ("correlation", "spread", "degrees"),
    [(0.0, 1.0, 0), (0.0, 2.0, 16), (0.5, 1.5, 16), (0.99, 1.0, 0)],
)
def test_without_a_gain_better_is_seldom_said(correlation, spread, degrees):
    check_level(500, correlation, spread, degrees)


@pytest.mark.slow
@pytest.mark.parametrize("degrees", KNOWN)
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("correlation", CORRELATIONS)
def test_without_a_gain_better_is_seldom_said_for_all_kinds_of_pairs(correlation, spread, degrees):
    check_level(1000, correlation, spread, degrees)


@pytest.mark.slow
def test_without_a_gain_better_is_seldom_said_where_earlier_runs_were_quieter():
    """8,000 ladders called .053 better and .048 worse. An arm's own spread counts where it is
    larger: by the earlier runs alone it would be .10.
    """
    check_level(2000, 0.0, 1.0, 40, earlier=0.5)


@pytest.mark.parametrize(
    ("effect", "correlation", "spread", "least", "most_pairs"),
    [
        (13.0, 0.2, 1.4, 0.97, 2.9),  # as an optimizer against another
        (4.0, 0.2, 1.4, 0.9, 5.0),
        (0.13, 0.997, 1.0, 0.85, 7.0),  # as a change that leaves a run nearly the same
        (1.0, 0.9, 1.0, 0.9, 6.0),
    ],
)
def test_planted_gains_are_seen(effect, correlation, spread, least, most_pairs):
    """120 ladders; the bounds lie four deviations or more below what 2,000 of them show."""
    done = ladders(120, 40, effect, correlation, spread, 16)
    assert share_of("better", done) > least
    assert np.mean([pairs for _, pairs, _ in done]) < most_pairs
    assert share_of("worse", done) == 0


@pytest.mark.parametrize(("effect", "correlation"), [(0.0, 0.0), (2.0, 0.9), (1.0, 0.5)])
def test_the_interval_at_the_last_look_covers(effect, correlation):
    """Each side misses at most .05 over all looks."""
    done = ladders(400, 41, effect, correlation, 1.0, 16)
    assert sum(not covers for *_, covers in done) / 400 < allowed(2 * ALPHA, 400)


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.95])
def test_the_interval_of_one_look_covers_and_is_no_wider_than_it_must_be(correlation):
    """With both tests paid for it misses between .03 and .10 (simulated with 20,000 looks)."""
    random = np.random.default_rng(42)
    missed = 0
    for _ in range(1000):
        base, own = random.normal(size=(2, 4))
        variant = correlation * base + math.sqrt(1 - correlation**2) * own - 0.5
        look = look_at_pairs(base.tolist(), variant.tolist(), RunVariance(1.0, 16), ALPHA)
        missed += not look.low <= 0.5 <= look.high
    assert 0.025 < missed / 1000 < allowed(2 * ALPHA, 1000)


def test_the_gain_that_can_be_shown_is_shown_in_four_of_five_cases():
    """By the run test alone, as it is said before anything runs: 400 looks at unrelated runs, four
    deviations are .08, and the paired test adds a little.
    """
    level = nominal_levels(LOOKS, ALPHA)[-1]
    effect = smallest_shown(8, math.sqrt(2), 40, level)
    random = np.random.default_rng(43)
    shown = 0
    for base, own in random.normal(size=(400, 2, 8)):
        known = RunVariance(float(random.chisquare(40)) / 40, 40)
        look = look_at_pairs(base.tolist(), (own - effect).tolist(), known, level)
        shown += look.p_gain <= look.level
    assert 0.72 < shown / 400 < 0.9
