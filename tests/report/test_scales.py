"""Ticks, thinning and smoothing: nothing outside the frame, no spike lost, no gap closed."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xushi.report.scales import TickLabel, counts, linear, runs, shown_from, smooth, thin, tick_text

VALUES = st.floats(-1e9, 1e9, allow_nan=False)
ANY = st.floats(allow_nan=True, allow_infinity=True, width=32)


@given(st.lists(VALUES, min_size=1, max_size=30), st.booleans())
def test_linear_scale_holds_its_values_and_ticks(values: list[float], rounded: bool) -> None:
    scale = linear(values, rounded=rounded)
    assert scale is not None
    assert all(-1e-6 <= scale(value) <= 1 + 1e-6 for value in (*values, *scale.ticks))
    assert len(scale.ticks) <= 9
    assert list(scale.ticks) == sorted(set(scale.ticks))


@pytest.mark.parametrize(
    ("last", "ticks"), [(1, (1,)), (12, tuple(range(1, 13))), (13, tuple(range(1, 14, 2)))]
)
def test_a_scale_of_counts_has_whole_ticks(last: int, ticks: tuple[int, ...]) -> None:
    scale = counts([float(number) for number in range(1, last + 1)], 12)
    assert scale is not None and scale.ticks == ticks
    assert (scale.low, scale.high) == (0.5, last + 0.5)
    assert counts([], 12) is None


def test_scales_without_values_and_of_one_value() -> None:
    assert linear([]) is None
    assert linear([math.nan, math.inf]) is None
    zero = linear([0.0, 0.0])
    single = linear([5.0])
    assert zero is not None and (zero.low, zero.high) == (0.0, 1.0)
    assert single is not None and 0 < single(5.0) < 1


@given(st.lists(ANY, max_size=700))
def test_thinning_keeps_extremes_order_and_bounds(values: list[float]) -> None:
    points = [(float(i), y) for i, y in enumerate(values)]
    kept = thin(points, buckets=50)
    assert len(kept) <= max(200, len(points) if len(points) <= 200 else 200)
    assert [x for x, _ in kept] == sorted({x for x, _ in kept})
    finite = [y for y in values if math.isfinite(y)]
    shown = [y for _, y in kept if math.isfinite(y)]
    assert bool(finite) == bool(shown)
    if finite:
        assert (min(finite), max(finite)) == (min(shown), max(shown))


def test_thinning_keeps_a_lone_spike_and_a_lone_dip() -> None:
    values = dict.fromkeys(range(10_000), 1.0) | {4_321: -5.0, 7_654: 9.0}
    points = [(float(i), y) for i, y in values.items()]
    kept = thin(points)
    assert (4_321.0, -5.0) in kept and (7_654.0, 9.0) in kept
    assert kept[0] == points[0] and kept[-1] == points[-1] and len(kept) <= 1_200


def test_a_long_gap_stays_a_gap() -> None:
    points = [(float(i), math.nan if 4000 <= i < 6000 else 1.0) for i in range(10_000)]
    assert len(runs(thin(points))) == 2


@given(st.lists(ANY, max_size=60), st.floats(0.01, 1.0))
def test_smoothing_keeps_places_and_gaps(values: list[float], share: float) -> None:
    points = [(float(i), y) for i, y in enumerate(values)]
    smoothed = smooth(points, share)
    assert [[x for x, _ in run] for run in runs(smoothed)] == [
        [x for x, _ in run] for run in runs(points)
    ]


def test_smoothing_does_not_move_a_straight_line() -> None:
    points = [(float(i), 3.0 * i) for i in range(200)]
    middle = smooth(points, 0.1)[10:-10]
    assert [y for _, y in middle] == pytest.approx([3 * x for x, _ in middle])


@pytest.mark.parametrize(
    ("value", "step", "text"),
    [
        (0.25, 0.25, "0.25"),
        (1.0, 0.5, "1.0"),
        (2.5, 2.5, "2.5"),
        (20_000, 5_000, "20\u202fk"),
        (0.0, 1e6, "0"),
        (1.5e6, 5e5, "1.5\u202fM"),
        (5_000, 5_000, "5000"),
        (7.5e-9, 2.5e-9, "7.5e−9"),
        (-0.05, 0.05, "−0.05"),
        (0.003, 0.001, "0.003"),
        (3e9, 1e9, "3\u202fG"),
    ],
)
def test_tick_text(value: float, step: float, text: str) -> None:
    assert tick_text(value, step) == text


def test_labels_that_would_overlap_are_left_out_evenly_and_return_with_the_width() -> None:
    labels = [TickLabel("100 k", place) for place in (0.1, 0.3, 0.5, 0.7, 0.9)]
    # 5 characters of 7 pixels and 6 between them need 41; a fifth of a plot is 34.8 in a chart of
    # 280 pixels with 106 beside it, and 62.8 in one of 420.
    assert shown_from(labels, 106.0) == [280, 420, 280, 420, 280]
    assert shown_from(labels, 74.0) == [280] * 5  # a fifth is 41.2
    assert shown_from(labels, 76.0) == [280, 420, 280, 420, 280]
    assert shown_from(labels, 700.0) == [280, None, None, None, None]
    assert shown_from([], 0.0) == []


def test_a_label_of_a_narrow_chart_is_there_in_a_wide_one_too() -> None:
    """Every second of nine fits 370 pixels and every third 150, where every fourth is shown."""
    labels = [TickLabel("100 k", place / 10) for place in range(1, 10)]
    assert shown_from(labels, 270.0) == [280, None, 640, None, 420, None, 640, None, 420]


def test_labels_at_the_edges_stay_inside_the_plot() -> None:
    assert TickLabel("1234", 0.03).extent(100.0) == (3.0, 31.0)
    assert TickLabel("1234", 0.5).extent(100.0) == (36.0, 64.0)
    assert TickLabel("1234", 0.97).extent(100.0) == (69.0, 97.0)
