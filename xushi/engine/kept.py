"""Sequences that stay after their request has finished, so that the next turn computes only what is
new.

Not here: which requests are kept and extended (engine).
"""

from dataclasses import dataclass

from torch import Tensor

from xushi.model import LatentCache


@dataclass(eq=False, slots=True)
class KeptSequence:
    """The sequence of a finished request. It is in the cache, or its entries are outside of it."""

    length: int  # in tokens
    entries: list[Tensor] | None = None  # outside: [length, width] of each layer, on the CPU


class KeptSequences:
    """The kept sequences of a cache. None of them is running, so each can leave the cache."""

    def __init__(self, cache: LatentCache) -> None:
        self._cache = cache
        self._in_cache: dict[KeptSequence, int] = {}  # to their ids; the oldest comes first

    def __len__(self) -> int:
        """How many are in the cache."""
        return len(self._in_cache)

    def add(self, sequence: int) -> KeptSequence:
        """Keep a sequence of the cache."""
        kept = KeptSequence(self._cache.length(sequence))
        self._in_cache[kept] = sequence
        return kept

    def holds(self, kept: KeptSequence) -> bool:
        """Whether its entries are still known. A new cache has lost what the old one held."""
        return kept in self._in_cache or kept.entries is not None

    def take(self, kept: KeptSequence) -> int:
        """Its id in the cache, for a request that goes on with it; it is not kept any more."""
        if kept.entries is not None:
            return self._cache.load(kept.entries)
        return self._in_cache.pop(kept)

    def drop(self, kept: KeptSequence) -> None:
        """Forget it."""
        if kept in self._in_cache:
            self._cache.free(self._in_cache.pop(kept))

    def make_room(self, missing: int, but: KeptSequence | None) -> int:
        """Copy sequences out of the cache, the oldest first, until `missing` more slots are free.

        The one named `but` stays. Returns how many more slots are free; if all the others together
        hold too few, none of them leaves and this is 0.
        """
        others = sum(kept.length for kept in self._in_cache if kept is not but)
        if others < missing:
            return 0
        before = self._cache.available
        for kept in list(self._in_cache):
            if self._cache.available - before >= missing:
                break
            if kept is not but:
                kept.entries = self._cache.unload(self._in_cache.pop(kept))
        return self._cache.available - before
