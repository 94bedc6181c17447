"""The order in which things are seen: a keyed permutation of range(n) that needs no table.

A Feistel network permutes the smallest range of 4**h that holds n; what falls outside n is sent
through again ("cycle walking", Black and Rogaway 2002). Not here: which source is drawn from
(`mixture`).
"""

_ROUNDS = 8
_WORD = (1 << 64) - 1


def permute(key: int, n: int, index: int) -> int:
    """Where the permutation `key` (below 2**64) of range(n) sends `index`.

    A pure function of its arguments; for a fixed key and n a bijection.
    """
    assert 0 <= index < n and 0 <= key <= _WORD
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for number in range(1, _ROUNDS + 1):
            left, right = right, left ^ (_mix(right ^ _mix(key ^ number)) & mask)
        index = left << half | right
        if index < n:
            return index


def _mix(value: int) -> int:
    """`base.seeds.mix64` on one Python integer, many times faster than on an array of one."""
    value = (value + 0x9E3779B97F4A7C15) & _WORD
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _WORD
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _WORD
    return value ^ value >> 31
