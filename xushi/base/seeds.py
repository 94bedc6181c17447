"""Random streams by name: each is a pure function of the run's seed and its name.

No global random state is read or changed.
"""

import hashlib

import numpy as np
import numpy.typing as npt

_MASK = (1 << 64) - 1


def derive(seed: int, *names: str | int) -> int:
    """The 64-bit key of the stream called `names`, for `seed`.

    Streams with different names or seeds are independent of each other.
    """
    text = "\0".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def mix64(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finalizer, element by element: a bijection on 64-bit words.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    with np.errstate(over="ignore"):
        z = value + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def uniforms(
    keys: npt.NDArray[np.uint64], counters: npt.NDArray[np.uint64]
) -> npt.NDArray[np.float64]:
    """One uniform number in (0, 1) for each (key, counter) pair.

    The number depends on its own pair only, not on the other elements of the arrays.
    """
    bits = mix64(mix64(keys) ^ mix64(counters ^ np.uint64(0xD1B54A32D192ED03)))
    return (np.asarray(bits >> np.uint64(11), dtype=np.float64) + 0.5) * 2.0**-53
