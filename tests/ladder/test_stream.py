"""LORD++: its formula by hand, and that it never gives away more than it has."""

import math
from itertools import pairwise

import numpy as np
import pytest

from xushi.ladder.stream import STREAM_ALPHA, lord_level


def gamma(j: int) -> float:
    return 0.07908 * math.log(max(j, 2)) / (j * math.exp(math.sqrt(math.log(j))))


def test_the_first_levels_by_hand():
    """Half of .1 times .07908 log 2 for the first idea; log 2 / (2 exp sqrt log 2) for the next."""
    assert lord_level(1, []) == pytest.approx(0.05 * 0.07908 * 0.693147, rel=1e-6)
    assert lord_level(2, []) == pytest.approx(0.05 * 0.07908 * 0.693147 / (2 * 2.299184), rel=1e-5)
    assert lord_level(20, []) == pytest.approx(0.05 * gamma(20), rel=1e-12)


def test_discoveries_give_levels_back_by_hand():
    """The first discovery gives back what of alpha was not put in, each later one all of it."""
    assert lord_level(5, [3]) == pytest.approx(0.05 * gamma(5) + 0.05 * gamma(2), rel=1e-12)
    assert lord_level(9, [7, 3, 4]) == pytest.approx(
        0.05 * gamma(9) + 0.05 * gamma(6) + 0.1 * (gamma(5) + gamma(2)), rel=1e-12
    )


def test_a_level_is_fixed_by_what_was_promoted_before():
    assert lord_level(5, [5, 6, 9]) == lord_level(5, [])
    assert lord_level(4, [3]) > lord_level(4, [])


def test_the_weights_sum_to_nearly_one_and_never_to_more():
    """A million are summed; of the rest the integral is known: with u = sqrt log j it is that of
    2 u^3 exp(-u), and the sum lies between the integrals from a million and from one more.
    """
    last = 1_000_000
    j = np.arange(1, last + 1, dtype=float)
    scale = lord_level(1, []) / (STREAM_ALPHA / 2) / math.log(2)
    near = scale * np.sum(np.log(np.maximum(j, 2)) / (j * np.exp(np.sqrt(np.log(j)))))
    u = math.sqrt(math.log(last))
    far = scale * 2 * (u**3 + 3 * u**2 + 6 * u + 6) * math.exp(-u)
    assert 0.999 < near + far <= 1


def test_without_discoveries_levels_fall():
    levels = [lord_level(number, []) for number in range(1, 200)]
    assert all(later < before for before, later in pairwise(levels))
