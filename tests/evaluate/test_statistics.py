"""The estimators against enumeration and against their own definitions."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xushi.evaluate.statistics import Z95, mean_interval, pass_at_k, pass_at_k_interval, wilson


@given(
    st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n)))
)
def test_pass_at_k_is_the_share_of_all_subsets_with_a_right_answer(
    case: tuple[int, int, int],
) -> None:
    n, c, k = case
    answers = [True] * c + [False] * (n - c)
    subsets = list(itertools.combinations(answers, k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_does_not_overflow_and_refuses_nonsense() -> None:
    exact = 1 - math.comb(9_000, 100) / math.comb(10_000, 100)
    assert pass_at_k(10_000, 1_000, 100) == pytest.approx(exact, rel=1e-12)
    for n, c, k in ((4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)):
        with pytest.raises(ValueError, match="cannot be estimated"):
            pass_at_k(n, c, k)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_ends_solve_the_score_equation(case: tuple[int, int]) -> None:
    successes, n = case
    low, high = wilson(successes, n)
    rate = successes / n
    assert 0 <= low <= rate <= high <= 1
    # Wilson's definition: the proportions p at which the observed rate lies exactly z standard
    # errors of p away.
    for end in {low, high} - {0.0, 1.0}:
        assert (rate - end) ** 2 == pytest.approx(Z95**2 * end * (1 - end) / n, rel=1e-6, abs=1e-12)


def test_wilson_known_values_and_edges() -> None:
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="5 successes of 4"):
        wilson(5, 4)


@given(st.lists(st.integers(0, 1), min_size=1, max_size=200))
def test_one_answer_per_task_gives_wilson(values: list[int]) -> None:
    mean, low, high = mean_interval(values)
    assert mean == pytest.approx(sum(values) / len(values))
    assert (low, high) == pytest.approx(wilson(sum(values), len(values)), abs=1e-12)


@given(st.lists(st.integers(0, 8).map(lambda right: right / 8), min_size=1, max_size=60))
def test_mean_interval_holds_its_mean_and_never_degenerates(values: list[float]) -> None:
    mean, low, high = mean_interval(values)
    assert 0 <= low <= mean <= high <= 1
    assert high > low


def test_mean_interval_covers_the_truth_and_counts_tasks_not_answers() -> None:
    random = np.random.default_rng(0)
    truth, hits, widths = 9 / 9.3, 0, []
    for _ in range(400):
        rates = random.beta(9, 0.3, size=16)
        _, low, high = mean_interval((random.binomial(8, rates) / 8).tolist())
        hits += low <= truth <= high
        widths.append(high - low)
    assert hits / 400 > 0.92
    narrow = wilson(124, 128)
    assert np.mean(widths) > 1.2 * (narrow[1] - narrow[0]), (
        "as narrow as if 8 answers to a task were 8 tasks"
    )


def test_mean_interval_refuses_what_it_cannot_state() -> None:
    with pytest.raises(ValueError, match="no tasks"):
        mean_interval([])
    for wrong in (1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match="outside"):
            mean_interval([0.5, wrong])


def test_pass_at_k_interval_averages_tasks() -> None:
    mean, low, high = pass_at_k_interval([(8, 0), (8, 1), (8, 8), (8, 3)], k=8)
    assert mean == 0.75
    assert (low, high) == pytest.approx(wilson(3, 4))
    assert pass_at_k_interval([(4, 2), (8, 2)], k=2)[0] == pytest.approx((5 / 6 + 13 / 28) / 2)
