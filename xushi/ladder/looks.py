"""When an experiment may be looked at, and how small a p-value must be at each look.

Who looks several times at a level of 5 % finds something by chance more often than in 5 % of cases.
A spending function says how much of the level may be used up by each look (Lan and DeMets,
Biometrika 70, 1983); here it is the one that resembles Pocock's boundary: alpha ln(1 + (e - 1) t),
with t the share of the planned pairs. It lets the first look decide, which a tool that should stop
early for large effects needs.

The boundaries are found for normal sums, whose joint density is integrated from look to look
(Armitage, McPherson and Rowe, JRSS A 132, 1969). Each is then used as a nominal level of a t test
(Jennison and Turnbull, Group Sequential Methods, 2000, section 4.4), which the simulations in
tests/ladder check for 2 to 8 pairs.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from xushi.ladder.distributions import NORMAL

_POINTS = 201  # of the grid on which densities are kept; four times as many change levels by 3e-8
_WIDTH = 8.0  # standard deviations below zero at which the grid begins


def planned_looks(pairs: int) -> tuple[int, ...]:
    """The numbers of pairs at which an experiment of `pairs` pairs is looked at: every second one,
    and the last.
    """
    return tuple(sorted({*range(2, pairs + 1, 2), pairs}))


def spent(alpha: float, share: float) -> float:
    """How much of `alpha` may be used up once `share` of the planned pairs are there."""
    return alpha * math.log1p((math.e - 1) * min(share, 1.0))


@functools.lru_cache(maxsize=10_000)
def nominal_levels(looks: tuple[int, ...], alpha: float) -> tuple[float, ...]:
    """The one-sided level of the test at each of the `looks`, so that under the null hypothesis one
    of them rejects with probability `alpha`.
    """
    shares = [each / looks[-1] for each in looks]
    levels: list[float] = []
    grid, density = np.zeros(1), np.ones(1)  # of the sum up to the look before, not rejected yet
    before = used = 0.0
    for share in shares:
        step = math.sqrt(share - before)
        wanted = spent(alpha, share) - used
        bound = _bound(grid, density, step, wanted)
        levels.append(1 - NORMAL.cdf(bound / math.sqrt(share)))
        grid, density = _next(grid, density, step, bound, share)
        before, used = share, spent(alpha, share)
    return tuple(levels)


def overall_p(p_values: Sequence[float], looks: tuple[int, ...]) -> float:
    """The smallest overall alpha at which one of the looks so far would have rejected: a p-value
    that has been paid for all of them (repeated p-value, Jennison and Turnbull, chapter 9).

    `p_values`: of the nominal tests, one for each of the first `looks`.
    """
    low, high = 0.0, 0.5
    if not _rejects(p_values, looks, high):
        return 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if _rejects(p_values, looks, middle) else (middle, high)
    return high


def _rejects(p_values: Sequence[float], looks: tuple[int, ...], alpha: float) -> bool:
    levels = nominal_levels(looks, alpha)
    return any(p <= level for p, level in zip(p_values, levels, strict=False))


def _bound(
    grid: NDArray[np.float64], density: NDArray[np.float64], step: float, wanted: float
) -> float:
    """The b with P(not rejected before, next sum > b) = `wanted`. A sum grows by a normal step.

    Newton's method within a bracket.
    """
    low, high, bound = -_WIDTH, _WIDTH, 0.0
    for _ in range(100):
        moves = (bound - grid) / step
        above = float(density @ np.array([math.erfc(move / math.sqrt(2)) for move in moves])) / 2
        low, high = (bound, high) if above > wanted else (low, bound)
        slope = float(density @ np.exp(-0.5 * moves**2)) / (step * math.sqrt(2 * math.pi))
        better = bound + (above - wanted) / slope if slope > 0 else math.inf
        better = better if low < better < high else (low + high) / 2
        if abs(better - bound) < 1e-12:
            break
        bound = better
    return bound


def _next(
    grid: NDArray[np.float64],
    density: NDArray[np.float64],
    step: float,
    bound: float,
    share: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The next sum's density times the weights of Simpson's rule, below the bound."""
    points = np.linspace(-_WIDTH * math.sqrt(share), bound, _POINTS)
    weights = np.full(_POINTS, 2.0)
    weights[1::2] = 4.0
    weights[[0, -1]] = 1.0
    weights *= (points[1] - points[0]) / 3
    moves = (points[:, None] - grid) / step
    values = np.exp(-0.5 * moves**2) @ density / (step * math.sqrt(2 * math.pi))
    return points, values * weights
