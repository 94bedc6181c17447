"""Weights decide how often a source is seen, and an epoch covers every source once."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from xushi.data.mixture import PERIOD, Mixture, slot_counts


@settings(max_examples=200, deadline=None)
@given(shares=st.lists(st.floats(1e-6, 1e9), min_size=1, max_size=20))
def test_slots_add_up_and_every_source_has_one(shares: list[float]) -> None:
    counts = slot_counts(shares)
    assert sum(counts) == PERIOD and min(counts) >= 1
    for share, count in zip(shares, counts, strict=True):
        # One slot of rounding, and those of sources whose share is less than one slot.
        assert abs(count - share / sum(shares) * PERIOD) <= 1 + len(shares)


def test_largest_remainders() -> None:
    assert slot_counts([1, 1, 2], 4) == [1, 1, 2]
    assert slot_counts([55, 27, 18], 10) == [5, 3, 2]
    assert slot_counts([1000, 1, 1], 10) == [8, 1, 1]


def test_weight_multiplies_how_often_a_source_is_seen() -> None:
    mixture = Mixture(["a", "b"], [1000, 1000], [1.0, 3.0], seed=5)
    seen = Counter(mixture.draw(cursor)[0] for cursor in range(PERIOD))
    assert seen == {0: PERIOD // 4, 1: 3 * PERIOD // 4}
    # Also in a part of the period, since the slots are shuffled.
    assert 0.6 < sum(mixture.draw(cursor)[0] for cursor in range(400)) / 400 < 0.9


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4), seed=st.integers(0, 2**32))
def test_every_epoch_covers_every_source_once(sizes: list[int], seed: int) -> None:
    mixture = Mixture([f"s{i}" for i in range(len(sizes))], sizes, [1.0] * len(sizes), seed)
    drawn = [mixture.draw(cursor) for cursor in range(600)]
    assert len(set(drawn)) == len(drawn)
    for source, size in enumerate(sizes):
        epochs = [epoch for s, epoch, _ in drawn if s == source]
        assert epochs == sorted(epochs)
        for epoch in range(max(epochs)):
            assert {i for s, e, i in drawn if (s, e) == (source, epoch)} == set(range(size))


def test_epochs_continue_when_the_plan_repeats() -> None:
    """No sequence is skipped or repeated after the first 4,096."""
    sizes = [5000, 1500]
    mixture = Mixture(["a", "b"], sizes, [1.0, 1.0], seed=8)
    drawn: list[list[tuple[int, int]]] = [[], []]
    for cursor in range(3 * PERIOD):
        source, epoch, index = mixture.draw(cursor)
        drawn[source].append((epoch, index))
    for size, found in zip(sizes, drawn, strict=True):
        assert len(found) > size
        assert [epoch for epoch, _ in found] == [number // size for number in range(len(found))]
        assert sorted(index for _, index in found[:size]) == list(range(size))
        assert len(set(found)) == len(found)


def test_the_seed_decides_which_source_comes_when() -> None:
    def plan(seed: int) -> list[int]:
        mixture = Mixture(["a", "b"], [1000, 1000], [1.0, 1.0], seed)
        return [mixture.draw(cursor)[0] for cursor in range(200)]

    assert plan(1) == plan(1)
    assert len({tuple(plan(seed)) for seed in range(5)}) == 5


def test_every_source_has_an_order_of_its_own() -> None:
    mixture = Mixture(["a", "b"], [50, 50], [1.0, 1.0], seed=2)
    orders: list[list[int]] = [[], []]
    for cursor in range(300):
        source, epoch, index = mixture.draw(cursor)
        if epoch == 0:
            orders[source].append(index)
    first, second = orders
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second


def test_every_epoch_and_every_seed_has_an_order_of_its_own() -> None:
    mixture = Mixture(["a"], [50], [1.0], seed=0)
    first, second = ([mixture.draw(c)[2] for c in range(start, start + 50)] for start in (0, 50))
    other = [Mixture(["a"], [50], [1.0], seed=1).draw(c)[2] for c in range(50)]
    assert first != second and first != other


def test_order_of_sources_in_the_recipe_does_not_matter() -> None:
    one, other = (
        Mixture(["a", "b"], [30, 50], [1.0, 2.0], 3),
        Mixture(["b", "a"], [50, 30], [2.0, 1.0], 3),
    )
    for cursor in range(300):
        source, epoch, index = one.draw(cursor)
        assert other.draw(cursor) == (1 - source, epoch, index)
