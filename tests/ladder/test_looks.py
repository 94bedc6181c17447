"""Levels of looks: known ones, what they spend together, and p-values that paid for all looks."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xushi.ladder.distributions import NORMAL
from xushi.ladder.looks import nominal_levels, overall_p, planned_looks, spent

ALPHA = 0.05
PLANS = ((2, 4, 6, 8), (3, 5, 8), (2, 4), (2, 3, 4, 5, 6, 7, 8))


def test_planned_looks():
    assert planned_looks(8) == (2, 4, 6, 8)
    assert planned_looks(7) == (2, 4, 6, 7)
    assert planned_looks(2) == (2,)
    assert planned_looks(3) == (2, 3)


def test_spending_ends_at_alpha():
    assert spent(ALPHA, 0) == 0
    assert spent(ALPHA, 1) == pytest.approx(ALPHA, rel=1e-15)
    assert spent(ALPHA, 1.5) == pytest.approx(ALPHA, rel=1e-15)
    assert spent(ALPHA, 0.25) == pytest.approx(0.05 * math.log(1 + (math.e - 1) / 4), rel=1e-15)


@pytest.mark.parametrize("looks", PLANS)
def test_the_first_level_is_the_spending_itself(looks):
    """Nothing was seen before. The bound is found to 1e-12, the level to less."""
    first = nominal_levels(looks, ALPHA)[0]
    assert first == pytest.approx(spent(ALPHA, looks[0] / looks[-1]), abs=1e-12)


def test_a_single_look_has_the_whole_level():
    assert nominal_levels((5,), ALPHA) == (pytest.approx(ALPHA, abs=1e-12),)


@pytest.mark.parametrize(
    ("looks", "levels"),
    [
        ((2, 4, 6, 8), (0.0179, 0.0189, 0.0200, 0.0209)),
        ((3, 5, 8), (0.0249, 0.0207, 0.0248)),
        ((2, 4), (0.0310, 0.0297)),
    ],
)
def test_levels_of_known_plans(looks, levels):
    assert nominal_levels(looks, ALPHA) == pytest.approx(levels, abs=0.0001)  # four digits


def crossings(looks: tuple[int, ...], levels: tuple[float, ...], count: int) -> list[float]:
    """The share of normal walks that reject for the first time at each look."""
    random = np.random.default_rng(20)
    steps = random.normal(size=(count, len(looks))) * np.sqrt(np.diff((0, *looks)))
    scores = steps.cumsum(axis=1) / np.sqrt(looks)
    rejected = scores > np.array([NORMAL.inv_cdf(1 - level) for level in levels])
    first = rejected & (rejected.cumsum(axis=1) == 1)
    return list(first.mean(axis=0))


@pytest.mark.parametrize("looks", PLANS)
def test_walks_cross_as_often_as_is_spent(looks):
    """100,000 walks: four binomial deviations of a share of .05 or less are at most .0028."""
    found = np.cumsum(crossings(looks, nominal_levels(looks, ALPHA), 100_000))
    for share, each in zip(found, looks, strict=True):
        wanted = spent(ALPHA, each / looks[-1])
        assert abs(share - wanted) < 4 * math.sqrt(wanted * (1 - wanted) / 100_000)


def test_two_looks_against_the_bivariate_normal():
    """P(rejected at the second look, not at the first), integrated on another, finer grid: both
    errors are below 1e-7.
    """
    first, second = nominal_levels((2, 4), ALPHA)
    a, b = NORMAL.inv_cdf(1 - first), NORMAL.inv_cdf(1 - second)
    points = np.linspace(-9, a, 20_001)
    density = np.exp(-0.5 * points**2) / math.sqrt(2 * math.pi)
    # z2 = (z1 + e) / sqrt 2 > b, with e a standard normal.
    above = [math.erfc((b * math.sqrt(2) - z) / math.sqrt(2)) / 2 for z in points]
    crossed = np.trapezoid(density * np.array(above), points)
    assert first + crossed == pytest.approx(ALPHA, abs=1e-7)


@given(p=st.floats(1e-8, 0.499))
def test_with_one_look_the_p_value_is_itself(p):
    """The bisection's 30 halvings of 1/2 leave 5e-10. Above 1/2 nothing is asked."""
    assert overall_p([p], (6,)) == pytest.approx(p, abs=1e-9)
    assert overall_p([p + 0.501], (6,)) == 1


@pytest.mark.parametrize("looks", [(2, 4), (2, 4, 6, 8)])
def test_the_p_value_is_alpha_at_the_boundary(looks):
    for at, alpha in itertools.product(range(len(looks)), (0.05, 0.002)):
        values = [0.9] * at + [nominal_levels(looks, alpha)[at]]
        # The levels are right to 3e-8 and the bisection to 5e-10; alpha is up to 4 levels.
        assert overall_p(values, looks) == pytest.approx(alpha, rel=1e-3)


def test_the_p_value_never_grows_with_a_look_nor_falls_below_the_nominal_one():
    looks = (2, 4, 6)
    for values in itertools.product((1e-6, 0.003, 0.02, 0.2, 0.8), repeat=3):
        seen = [overall_p(values[:count], looks) for count in (1, 2, 3)]
        assert seen[0] >= seen[1] >= seen[2] >= min(values) - 1e-9
