"""Control over the stream of ideas: who asks a hundred questions at 5 % gets five wrong answers.

LORD++ (Ramdas, Yang, Wainwright and Jordan, "Online control of the false discovery rate with
decaying memory", 2017; after Javanmard and Montanari, Annals of Statistics 46, 2018) gives each
idea a level when it is registered. The level falls with every idea that is no discovery, and rises
with each discovery. So the expected share of wrong promotions among all stays below alpha.
"""

import math
from collections.abc import Sequence

STREAM_ALPHA = 0.10
# 1 / the sum of log(max(j, 2)) / (j exp(sqrt(log j))) over all j >= 1.
_SCALE = 0.07908


def lord_level(number: int, discoveries: Sequence[int], alpha: float = STREAM_ALPHA) -> float:
    """The level of idea `number` (1 is the first), after the ideas `discoveries` were promoted."""
    first = alpha / 2
    earlier = sorted(each for each in discoveries if each < number)
    level = first * _gamma(number)
    if earlier:
        level += (alpha - first) * _gamma(number - earlier[0])
    return level + alpha * sum(_gamma(number - each) for each in earlier[1:])


def _gamma(j: int) -> float:
    return _SCALE * math.log(max(j, 2)) / (j * math.exp(math.sqrt(math.log(j))))
