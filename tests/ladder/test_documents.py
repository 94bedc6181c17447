"""The standard error of a gain over held-out documents."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xushi.ladder.documents import document_error


def runs(bits_RD: np.ndarray, sizes: list[int]) -> list[list[tuple[int, float]]]:
    return [list(zip(sizes, row, strict=True)) for row in bits_RD.tolist()]


def test_equal_documents_have_the_error_of_a_mean():
    """Of gains of 1 to 5 bits in documents of 100 bytes."""
    gains = np.arange(1.0, 6.0)
    baseline = runs(np.stack([gains + 50, gains + 70]), [100] * 5)
    variant = runs(np.stack([np.full(5, 50.0), np.full(5, 70.0)]), [100] * 5)
    expected = np.std(gains, ddof=1) / math.sqrt(5) / 100
    assert document_error(baseline, variant) == pytest.approx(expected, rel=1e-12)


def test_a_gain_that_is_the_same_for_each_byte_has_none():
    sizes = [10, 2000, 333]
    baseline = runs(np.array([sizes]) * 3.0, sizes)
    variant = runs(np.array([sizes]) * 2.5, sizes)
    assert document_error(baseline, variant) == pytest.approx(0, abs=1e-15)


@given(seed=st.integers(0, 1000), count=st.integers(2, 30), scale=st.floats(0.1, 10))
def test_bits_scale_it_and_levels_do_not_matter(seed, count, scale):
    random = np.random.default_rng(seed)
    sizes = random.integers(1, 10_000, count).tolist()
    first, second = random.normal(100, 10, size=(2, 3, count))
    plain = document_error(runs(first, sizes), runs(second, sizes))
    assert plain is not None
    scaled = document_error(runs(scale * first, sizes), runs(scale * second, sizes))
    assert scaled == pytest.approx(scale * plain, rel=1e-9)
    level = random.normal(size=count) * 1000
    moved = document_error(runs(first + level, sizes), runs(second + level, sizes))
    assert moved == pytest.approx(plain, rel=1e-6)
    assert document_error(runs(second, sizes), runs(first, sizes)) == pytest.approx(plain, rel=1e-9)


def test_it_is_the_spread_over_samples_of_documents():
    """Documents drawn anew 2,000 times: the mean gain spreads by as much, within a tenth."""
    random = np.random.default_rng(5)

    def drawn() -> tuple[list[int], np.ndarray]:
        sizes = random.integers(500, 5000, 60)
        return sizes.tolist(), sizes * random.normal(0.02, 0.05, size=60)

    means, errors = [], []
    for _ in range(2000):
        sizes, gains = drawn()
        means.append(gains.sum() / sum(sizes))
        errors.append(document_error(runs(gains[None], sizes), runs(np.zeros((1, 60)), sizes)))
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)


def test_where_it_is_not_known():
    one = runs(np.array([[5.0]]), [7])
    two = runs(np.array([[5.0, 6.0]]), [7, 8])
    assert document_error([], []) is None
    assert document_error(one, one) is None
    assert document_error(two, runs(np.array([[5.0, 6.0]]), [7, 9])) is None
