"""Student's t distribution: its probabilities and quantiles, for any positive degrees of freedom.

Written here so that a verdict needs no library of statistics. The tests compare with tables and
with numerical integration of the density.
"""

import functools
import math
from statistics import NormalDist

NORMAL = NormalDist()
_SMALLEST = 1e-300
_STEPS = 500


def t_below(x: float, df: float) -> float:
    """P(T <= x) for Student's t with `df` degrees of freedom."""
    if math.isinf(x):
        return float(x > 0)
    tail = 0.5 * _incomplete_beta(df / 2, 0.5, df / (df + x * x))
    return 1 - tail if x > 0 else tail


def t_above(x: float, df: float) -> float:
    """P(T > x), exact in the far tail too."""
    return t_below(-x, df)


@functools.lru_cache(maxsize=100_000)
def t_quantile(above: float, df: float) -> float:
    """The x with P(T > x) = `above`, which lies between 0 and 1."""
    if above == 0.5:
        return 0.0
    if above > 0.5:
        return -t_quantile(1 - above, df)
    low, high = 0.0, math.inf
    x = NORMAL.inv_cdf(1 - above)
    for _ in range(200):  # Newton's method within a bracket
        tail = t_above(x, df)
        low, high = (x, high) if tail > above else (low, x)
        better = x + (tail - above) / _density(x, df)
        if not low < better < high:
            better = 2 * x if math.isinf(high) else (low + high) / 2
        if abs(better - x) <= 1e-14 * better:
            break
        x = better
    return x


def _density(x: float, df: float) -> float:
    logarithm = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)
    return math.exp(logarithm - (df + 1) / 2 * math.log1p(x * x / df))


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction (DLMF 8.17.22),
    which converges fast where x < (a + 1) / (a + b + 2); elsewhere I_x(a, b) = 1 - I_(1-x)(b, a).
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, 1 - x)
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    )
    return front / a / _fraction(a, b, x)


def _fraction(a: float, b: float, x: float) -> float:
    """1 + d1/(1 + d2/(1 + ...)), by the modified Lentz method."""
    value, upper, lower = 1.0, 1.0, 0.0
    for step in range(1, _STEPS):
        half = step // 2
        if step % 2:
            term = -(a + half) * (a + b + half) * x / ((a + 2 * half) * (a + 2 * half + 1))
        else:
            term = half * (b - half) * x / ((a + 2 * half - 1) * (a + 2 * half))
        lower = 1 + term * lower
        lower = 1 / (lower if abs(lower) > _SMALLEST else _SMALLEST)
        upper = 1 + term / upper
        upper = upper if abs(upper) > _SMALLEST else _SMALLEST
        change = upper * lower
        value *= change
        if abs(change - 1) < 1e-15:
            return value
    raise ArithmeticError(f"I_{x}({a}, {b}) did not converge")
