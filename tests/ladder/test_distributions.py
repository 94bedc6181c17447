"""Student's t against printed tables and against the integral of its density."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xushi.ladder.distributions import NORMAL, t_above, t_below, t_quantile

# Upper quantiles as tables print them: (degrees of freedom, .05, .025, .005).
TABLE = (
    (1, 6.314, 12.706, 63.657),
    (2, 2.920, 4.303, 9.925),
    (3, 2.353, 3.182, 5.841),
    (4, 2.132, 2.776, 4.604),
    (7, 1.895, 2.365, 3.499),
    (10, 1.812, 2.228, 3.169),
    (30, 1.697, 2.042, 2.750),
    (120, 1.658, 1.980, 2.617),
)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row[0]} degrees")
def test_quantiles_of_the_table(row):
    degrees, *quantiles = row
    for above, quantile in zip((0.05, 0.025, 0.005), quantiles, strict=True):
        assert t_quantile(above, degrees) == pytest.approx(quantile, abs=0.0005)  # three digits


@pytest.mark.parametrize("df", [1, 1.7, 2, 3.5, 9, 40])
@pytest.mark.parametrize("x", [0.0, 0.3, 1.0, 2.5, 7.0])
def test_probability_is_the_integral_of_the_density(df, x):
    """Simpson's rule on 2,001 points: its error is below 1e-9 for these smooth densities."""
    points = np.linspace(0, x, 2001)
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    density = scale * (1 + points**2 / df) ** (-(df + 1) / 2)
    weights = np.ones(2001)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    inside = float(weights @ density) * (points[1] - points[0]) / 3
    assert t_below(x, df) == pytest.approx(0.5 + inside, abs=1e-9)
    assert t_above(x, df) == pytest.approx(0.5 - inside, abs=1e-9)


def test_one_and_two_degrees_have_closed_forms_far_into_the_tail():
    for x in (0.5, 3.0, 1e3, 1e6):
        assert t_above(x, 1) == pytest.approx(math.atan(1 / x) / math.pi, rel=1e-12)
        root = math.sqrt(2 + x * x)
        assert t_above(x, 2) == pytest.approx(1 / (root * (root + x)), rel=1e-12)


def test_many_degrees_are_the_normal_distribution():
    """The difference is (x + x^3) / (4 df) times the density, here below 2e-7."""
    for x in (-2.0, 0.1, 1.96):
        assert t_below(x, 1e7) == pytest.approx(NORMAL.cdf(x), abs=2e-7)


def test_infinite_arguments_and_the_median():
    assert t_below(math.inf, 3) == 1
    assert t_below(-math.inf, 3) == 0
    assert t_above(math.inf, 3) == 0
    assert t_quantile(0.5, 3) == 0


@given(df=st.floats(1, 500), exponent=st.floats(-12, -0.31))
def test_a_quantile_is_exceeded_with_its_probability(df, exponent):
    above = 10**exponent
    x = t_quantile(above, df)
    # The quantile is right to 1e-13 of itself, and the tail falls by at most (1 + df) / x of itself
    # a unit of x.
    assert t_above(x, df) == pytest.approx(above, rel=1e-9)
    assert t_quantile(1 - above, df) == pytest.approx(-x, rel=1e-4 if above < 1e-8 else 1e-6)


@given(df=st.floats(1, 500), x=st.floats(-50, 50))
def test_both_sides_are_everything(df, x):
    assert t_below(x, df) + t_above(x, df) == pytest.approx(1, abs=1e-14)
    assert t_below(-x, df) == t_above(x, df)
    assert t_below(x, df) <= t_below(x + 0.1, df) + 1e-15
