"""Which source each sequence comes from, and which of its sequences: a pure function of (seed,
cursor).

A plan over a period of slots is fixed before step 0: every source gets slots in proportion to its
share, in a keyed order; the plan repeats. Not here: what a sequence holds (`packing`).
"""

from collections.abc import Sequence

import numpy as np

from xushi.base.seeds import derive, mix64
from xushi.data.order import permute

PERIOD = 4096


def slot_counts(shares: Sequence[float], period: int = PERIOD) -> list[int]:
    """Slots of each source: proportional to `shares`, rounded by largest remainders, and at least
    one.
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
    """`sequences[s]`: how many sequences source `names[s]` has. `weights[s]`: how often each of
    them is seen, relative to those of a source of weight 1. Sources are known to the order by name,
    so their order here does not matter.
    """

    def __init__(
        self, names: Sequence[str], sequences: Sequence[int], weights: Sequence[float], seed: int
    ) -> None:
        ranked = sorted(range(len(names)), key=lambda s: names[s])
        counts = slot_counts([sequences[s] * weights[s] for s in ranked])
        plan = np.repeat(np.array(ranked), counts)
        key = np.uint64(derive(seed, "mixture"))
        slots = np.argsort(mix64(key ^ mix64(np.arange(PERIOD, dtype=np.uint64))), kind="stable")
        self._names, self._sequences, self._seed = list(names), list(sequences), seed
        self._count = dict(zip(ranked, counts, strict=True))
        self._source = plan[slots]
        self._rank = np.zeros(PERIOD, dtype=np.int64)
        for source, count in self._count.items():
            self._rank[self._source == source] = np.arange(count)

    def draw(self, cursor: int) -> tuple[int, int, int]:
        """(source, epoch, sequence within the source) of the sequence at `cursor`."""
        slot = cursor % PERIOD
        source = int(self._source[slot])
        ordinal = cursor // PERIOD * self._count[source] + int(self._rank[slot])
        epoch, place = divmod(ordinal, self._sequences[source])
        key = derive(self._seed, "order", self._names[source], epoch)
        return source, epoch, permute(key, self._sequences[source], place)
