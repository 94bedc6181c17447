"""Which sequence of which source is trained on at a cursor: a pure function of (seed, cursor).

A plan of 4,096 slots is fixed before step 0. Every source gets slots in proportion to its share, in
an order that the seed decides, and the plan repeats. Not here: the contents of a sequence
(`packing`).
"""

from collections.abc import Sequence

import numpy as np

from xushi.base.seeds import derive, mix64
from xushi.data.order import permute

PERIOD = 4096


def slot_counts(shares: Sequence[float], period: int = PERIOD) -> list[int]:
    """How many slots each source gets: proportional to `shares`, at least one.

    Rounded by the largest-remainder method.
    """
    assert 0 < len(shares) <= period and all(share > 0 for share in shares)
    quotas = [share / sum(shares) * period for share in shares]
    counts = [max(1, int(quota)) for quota in quotas]
    while sum(counts) < period:
        counts[max(range(len(counts)), key=lambda i: quotas[i] - counts[i])] += 1
    while sum(counts) > period:
        counts[max(range(len(counts)), key=lambda i: counts[i])] -= 1
    return counts


class Mixture:
    """Draws sequences from several sources.

    `sequences[s]` is how many sequences the source `names[s]` has. `weights[s]` is how often each
    of them is drawn, relative to a source of weight 1. The order in which sources are given has no
    effect: their permutations depend on their names.
    """

    def __init__(
        self, names: Sequence[str], sequences: Sequence[int], weights: Sequence[float], seed: int
    ) -> None:
        ranked = sorted(range(len(names)), key=lambda s: names[s])
        counts = slot_counts([sequences[s] * weights[s] for s in ranked])
        plan = np.repeat(np.array(ranked), counts)
        key = np.uint64(derive(seed, "mixture"))
        slots = np.argsort(mix64(key ^ mix64(np.arange(PERIOD, dtype=np.uint64))), kind="stable")
        self._names = list(names)
        self._sequences = list(sequences)
        self._seed = seed
        self._count = dict(zip(ranked, counts, strict=True))
        self._source = plan[slots]
        self._rank = np.zeros(PERIOD, dtype=np.int64)
        for source, count in self._count.items():
            self._rank[self._source == source] = np.arange(count)

    def draw(self, cursor: int) -> tuple[int, int, int]:
        """(source, epoch, index of the sequence within the source) at `cursor` (from 0)."""
        slot = cursor % PERIOD
        source = int(self._source[slot])
        ordinal = cursor // PERIOD * self._count[source] + int(self._rank[slot])
        epoch, place = divmod(ordinal, self._sequences[source])
        key = derive(self._seed, "order", self._names[source], epoch)
        return source, epoch, permute(key, self._sequences[source], place)
