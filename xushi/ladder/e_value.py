"""An e-value: evidence that stays valid however often, and whenever, somebody looks.

It is shown beside a verdict and never decides one: within eight pairs it needs about one and a
half times as many as the planned looks do. It is what remains if the plan of looks is given up.
"""

import math
from collections.abc import Sequence

from xushi.ladder.distributions import t_below

# The variance of the gain, in squared standard deviations of a pair, that the test expects if there
# is a gain.
PRIOR = 1.0


def e_value(gains: Sequence[float]) -> float:
    """Evidence against "no gain" in the `gains` of pairs: under it, the chance ever to see a value
    of 1 / alpha or more is at most alpha.

    The one-sided t-test with a half-normal prior on the standardised gain and the right Haar prior
    on the spread (Pérez-Ortiz, Lardy, de Heide and Grünwald, "E-statistics, group invariance and
    anytime-valid testing", Annals of Statistics 52, 2024).
    """
    count = len(gains)
    total, squares = sum(gains), sum(gain * gain for gain in gains)
    if count < 2 or squares == 0:
        return 1.0
    rest = squares - PRIOR / (1 + count * PRIOR) * total * total
    mean = PRIOR * total / (1 + count * PRIOR)
    spread = math.sqrt(rest / count * PRIOR / (1 + count * PRIOR))
    if spread == 0:
        return 1.0
    ratio = math.pow(squares / rest, count / 2) / math.sqrt(1 + count * PRIOR)
    return 2 * ratio * t_below(mean / spread, count)
