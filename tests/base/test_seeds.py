"""Streams by name keep their values, are independent of each other and uniform."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xushi.base import seeds

words = st.integers(0, 2**64 - 1)


def test_keys_keep_their_values():
    # Runs that an older version began resume with these keys.
    assert seeds.derive(0, "data", 3) == 17919765164185438456


def test_mix64_is_splitmix64():
    # The first outputs of SplitMix64 from seed 0, as in Java's SplittableRandom and Vigna's
    # splitmix64.c.
    states = np.array([0, 0x9E3779B97F4A7C15, 0x3C6EF372FE94F82A], dtype=np.uint64)
    assert [hex(value) for value in seeds.mix64(states)] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]


@given(st.lists(words, min_size=2, max_size=50, unique=True))
def test_mix64_loses_nothing(values):
    assert len(set(seeds.mix64(np.array(values, dtype=np.uint64)).tolist())) == len(values)


def test_names_do_not_run_together():
    keys = [
        seeds.derive(0, "a", "b"),
        seeds.derive(0, "ab"),
        seeds.derive(0, "a", "b", ""),
        seeds.derive(0, "a"),
        seeds.derive(1, "a", "b"),
        seeds.derive(0, "b", "a"),
        seeds.derive(0),
    ]
    assert len(set(keys)) == len(keys) and all(0 <= key < 2**64 for key in keys)


@given(words, words, st.lists(words, max_size=5))
def test_a_uniform_does_not_depend_on_its_neighbours(key, counter, others):
    alone = seeds.uniforms(np.array([key], dtype=np.uint64), np.array([counter], dtype=np.uint64))[
        0
    ]
    among = seeds.uniforms(
        np.array([*others, key], dtype=np.uint64), np.array([*others, counter], dtype=np.uint64)
    )
    assert among[-1] == alone and 0.0 < alone < 1.0


@pytest.mark.parametrize("along", ["keys", "counters"])
def test_uniforms_are_even_along_both_axes(along):
    count = np.arange(20_000, dtype=np.uint64)
    same = np.full_like(count, 5)
    drawn = seeds.uniforms(count, same) if along == "keys" else seeds.uniforms(same, count)
    histogram, _ = np.histogram(drawn, bins=20, range=(0, 1))
    assert (
        (histogram - 1000.0) ** 2 / 1000.0
    ).sum() < 50  # chi-squared with 19 degrees of freedom: p about 1e-4
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.03
