"""A keyed permutation of range(n) that needs no table: the order of sequences in an epoch.

A Feistel network permutes range(4**h) for the smallest h with 4**h >= n. A result outside range(n)
is permuted again until it is inside ("cycle walking", Black and Rogaway 2002). Not here: the choice
of the source (`mixture`).
"""

_ROUNDS = 8
_WORD = (1 << 64) - 1


def permute(key: int, n: int, index: int) -> int:
    """The image of `index` under the permutation of range(n) that `key` (below 2**64) selects.

    For a fixed key and n it is a bijection on range(n).
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
    """`base.seeds.mix64` of one Python integer; much faster than of an array of one element."""
    value = (value + 0x9E3779B97F4A7C15) & _WORD
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _WORD
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _WORD
    return value ^ value >> 31
