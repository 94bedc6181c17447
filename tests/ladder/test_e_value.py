"""The e-value: its mean and its chance to be large where there is no gain, and its formula."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xushi.ladder.e_value import PRIOR, e_value


def by_integration(gains: list[float]) -> float:
    """The ratio of the marginal densities of the gains, by sums over a grid of the spread and of
    the standardised gain (half-normal prior; right Haar prior 1 / spread): each step is a tenth of
    the narrowest peak, so that the sums are right to 1e-6.
    """
    count = len(gains)
    spread = np.exp(np.linspace(-6, 8, 2801))  # logarithmic: 1 / spread becomes a constant
    effect = np.linspace(0, 9, 1801)
    weight = np.full(1801, effect[1])
    weight[[0, -1]] /= 2
    prior = weight * 2 * np.exp(-0.5 * effect**2 / PRIOR) / math.sqrt(2 * math.pi * PRIOR)
    total, squares = sum(gains), sum(gain**2 for gain in gains)

    def density(effects: np.ndarray) -> np.ndarray:
        means = effects[:, None] * spread
        distance = squares - 2 * means * total + count * means**2
        return (spread**-count * np.exp(-0.5 * distance / spread**2)).sum(axis=1)

    return float(prior @ density(effect)) / float(density(np.zeros(1))[0])


@pytest.mark.parametrize(
    "gains", [[0.5, 1.0], [1.0, -0.3, 0.8], [-1.0, -2.0, -0.5, 0.2], [3.0, 3.1, 2.8, 3.3]]
)
def test_it_is_the_ratio_of_the_marginal_densities(gains):
    assert e_value(gains) == pytest.approx(by_integration(gains), rel=1e-4)


def test_nothing_was_seen():
    assert e_value([]) == 1
    assert e_value([0.0, 0.0, 0.0]) == 1


def test_one_pair_says_nothing():
    """With one pair the spread is free, and the ratio is one for any gain."""
    assert e_value([3.0]) == 1


@given(
    st.lists(st.floats(-5, 5).filter(lambda x: abs(x) > 1e-3), min_size=2, max_size=8),
    st.integers(-20, 20),
)
def test_units_change_nothing(gains, power):
    assert e_value([gain * 2.0**power for gain in gains]) == pytest.approx(
        e_value(gains), rel=1e-12
    )


def test_the_mean_is_at_most_one_where_there_is_no_gain():
    """It is one, or less for a loss. 4,000 samples of mean 1: the standard error is taken from
    them; four of it are allowed.
    """
    random = np.random.default_rng(21)
    for loss in (0.0, 0.5):
        values = np.array([e_value(row) for row in (random.normal(size=(4000, 5)) - loss).tolist()])
        assert values.mean() < 1 + 4 * values.std() / math.sqrt(4000)
    assert values.mean() < 0.5


def test_whoever_looks_after_every_pair_is_seldom_deceived():
    """Ever 20 or more within 16 pairs: at most .05, four deviations of 2,000 ladders are .0195. A
    gain of a spread and a half is seen in most ladders.
    """
    random = np.random.default_rng(22)

    def ever(gain: float, count: int) -> float:
        rows = (random.normal(size=(count, 16)) + gain).tolist()
        seen = [any(e_value(row[:n]) >= 20 for n in range(2, 17)) for row in rows]
        return sum(seen) / count

    assert ever(0.0, 2000) < 0.05 + 0.0195
    assert ever(1.5, 100) > 0.9
