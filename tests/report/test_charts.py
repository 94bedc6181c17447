"""Charts survive every series a run can leave, stay inside their frame, are well-formed and show
the values they were given.
"""

import itertools
import math
import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xushi.report.charts import Axes, Bar, Reference, Series, bar_chart, heat_map, line_chart
from xushi.report.numbers import percent
from xushi.report.scales import Point

ANY = st.floats(allow_nan=True, allow_infinity=True, width=32)


def _line(points: list[Point], references: list[Reference] | None = None, **axes: Any) -> str:
    return line_chart([Series("loss", points)], Axes("t", "step", "nats", **axes), references or [])


def _coordinates(chart: str) -> list[Point]:
    paths = re.findall(r'<path class="line[^>]* d="([^"]*)"', chart)
    return [
        (float(x), float(y))
        for path in paths
        for x, y in re.findall(r"(-?[\d.]+),(-?[\d.]+)", path)
    ]


def _domain(chart: str, axis: str) -> tuple[float, float]:
    match = re.search(rf'data-{axis}="(\S+) (\S+)"', chart)
    assert match is not None
    return float(match[1]), float(match[2])


def _values(chart: str, height: float = 240) -> list[Point]:
    """What the drawn lines say, read back through the domain that the page's script uses."""
    x0, x1 = _domain(chart, "x")
    y0, y1 = _domain(chart, "y")
    return [
        (x0 + x / 1000 * (x1 - x0), y0 + (1 - y / height) * (y1 - y0))
        for x, y in _coordinates(chart)
    ]


@given(st.lists(ANY, max_size=40))
def test_any_series_gives_a_well_formed_chart_or_none(values: list[float]) -> None:
    chart = _line(
        [(float(i), y) for i, y in enumerate(values)],
        references=[Reference("xz <-9>", 1.5), Reference("none", math.nan)],
    )
    assert bool(chart) == any(math.isfinite(y) for y in values)
    if chart:
        ElementTree.fromstring(chart)
        assert "nan" not in chart and "inf" not in chart
        assert all(-0.1 <= x <= 1000.1 and -0.1 <= y <= 240.1 for x, y in _coordinates(chart))


def test_a_line_goes_through_its_points() -> None:
    points = [(10.0, 1.0), (20.0, 3.0), (40.0, 2.0)]
    for got, expected in zip(_values(_line(points)), points, strict=True):
        assert got == pytest.approx(expected, abs=0.01)


def test_what_lies_below_the_floor_is_cut_off() -> None:
    points = [(1.0, -90.0), (2.0, 1.0), (3.0, 2.0)]
    series = [Series("loss", points), Series("dots", points, dots=True)]
    chart = line_chart(series, Axes("t", "step", "nats", y_floor=-1.0))
    assert _domain(chart, "y")[0] == -1.0
    assert chart.count("<circle") == 2  # the line itself is cut by its frame


def test_an_axis_that_counts_has_whole_ticks_and_no_point_on_its_edge() -> None:
    chart = _line([(1.0, 1.0), (2.0, 2.0)], x_counts=True)
    assert _domain(chart, "x") == (0.5, 2.5)
    assert re.findall(r'x="([\d.]+)%" y="258">([^<]+)</text>', chart) == [
        ("25.00", "1"),
        ("75.00", "2"),
    ]


def test_ticks_stand_where_their_values_are() -> None:
    chart = _line([(0.0, 0.0), (100.0, 4.0)])
    y0, y1 = _domain(chart, "y")
    ticks = re.findall(r'x="-8" y="([\d.]+)">([\d.]+)</text>', chart)
    assert len(ticks) >= 4
    for y, text in ticks:
        assert y0 + (1 - (float(y) - 4) / 240) * (y1 - y0) == pytest.approx(float(text), abs=0.02)
    marks = re.findall(r'x="([\d.]+)%" y="258">([\d.]+)</text>', chart)
    assert len(marks) >= 4
    assert all(float(x) == pytest.approx(float(text), abs=0.01) for x, text in marks)


def test_a_break_is_drawn_as_a_break_and_a_lone_point_as_a_dot() -> None:
    chart = _line([(0, 1.0), (1, 2.0), (2, math.nan), (3, 1.5), (4, math.inf), (5, 1.0), (6, 2.0)])
    path = re.search(r'<path class="line[^>]* d="([^"]*)"', chart)
    assert path is not None and path[1].count("M") == 3
    assert chart.count("<circle") == 1
    assert _line([(7, 3.0)]).count("<circle") == 1


def test_dots_lie_on_the_line_and_none_above_the_frame() -> None:
    series = [Series("loss", [(0.0, 9.0), (1.0, 1.0), (2.0, 2.0)], dots=True)]
    chart = line_chart(series, Axes("t", "x", "y", y_limit=2.0))
    dots = re.findall(r'<circle [^>]*cx="([\d.]+)%" cy="(-?[\d.]+)"', chart)
    assert [(10 * float(x), float(y)) for x, y in dots] == _coordinates(chart)[1:]
    assert _coordinates(chart)[1:] == [(500, 240), (1000, 0)]


def test_constant_series_lies_inside_the_frame() -> None:
    ys = {y for _, y in _coordinates(_line([(i, 4.0) for i in range(9)]))}
    assert len(ys) == 1 and 0 < ys.pop() < 240


def test_a_hundred_thousand_points_keep_their_one_spike() -> None:
    points = [(float(i), 50.0 if i == 61_803 else 2.0 + (i % 7) / 10) for i in range(100_000)]
    chart = _line(points)
    assert len(chart) < 40_000
    assert min(y for _, y in _coordinates(chart)) < 60


def test_a_limit_cuts_the_axis_and_not_the_data_below_it() -> None:
    chart = _line([(i, 100.0 if i < 3 else 2.0) for i in range(50)], y_limit=3.0)
    assert 3.0 <= _domain(chart, "y")[1] <= 4.0


def test_the_axis_reaches_down_to_its_lowest_value_and_to_every_reference() -> None:
    points = [(0.0, 5.0), (1.0, 6.0)]
    assert _domain(_line(points), "y")[0] >= 4
    assert _domain(_line(points, y_lowest=0.0), "y")[0] == 0
    far = _line(points, [Reference("xz", 1.5)])
    low, high = _domain(far, "y")
    assert low <= 1.5
    dashed = re.search(r'<line class="reference"[^>]* y1="([\d.]+)"', far)
    assert dashed is not None
    assert low + (1 - float(dashed[1]) / 240) * (high - low) == pytest.approx(1.5, abs=0.02)


def test_names_beside_lines_do_not_overlap() -> None:
    series = [Series(f"layer {i}", [(0, 1.0), (1, 0.1 + i / 1e4)], i) for i in range(6)]
    chart = line_chart(series, Axes("t", "x", "y"))
    named = re.findall(r'class="name t(\d)" x="100%" dx="10" y="([\d.-]+)">layer (\d)', chart)
    places = [float(y) for _, y, _ in named]
    assert len(places) == 6 and all(tone == layer for tone, _, layer in named)
    assert all(b - a >= 14.9 for a, b in itertools.pairwise(places))
    # The highest line ends highest, so its name is on top.
    assert [layer for _, _, layer in named] == ["5", "4", "3", "2", "1", "0"]


def test_a_faint_line_has_no_name_and_is_not_read_out() -> None:
    series = [Series("", [(0, 1.0), (1, 2.0)], faint=True), Series("mean", [(0, 1.5), (1, 1.6)])]
    chart = line_chart(series, Axes("t", "x", "y"))
    assert chart.count("data-label") == 1 and 'data-label="mean"' in chart
    assert chart.count('class="name') == 1


def test_bars_with_intervals() -> None:
    bars = bar_chart(
        [
            Bar("before", 0.1, 0.05, 0.2, group="greedy"),
            Bar("after", 0.99, 0.97, 1.0, group="greedy"),
            Bar("lost", math.nan),
            Bar("no interval", 0.4, None, 0.6, group="other"),
            Bar("open", 0.5, 0.4, math.inf, group="other"),
        ],
        title="t",
        write=percent,
        maximum=1.0,
    )
    ElementTree.fromstring(bars)
    assert bars.count('class="bar ') == 4
    assert bars.count('class="whisker"') == 2 * 3
    assert 'x1="5.00%" x2="20.00%"' in bars and 'width="99.00%"' in bars
    assert "before: 10\u202f% [5\u202f% – 20\u202f%]" in bars
    assert "no interval: 40\u202f%<" in bars
    assert re.findall(r'class="group"[^>]*>(\w+)<', bars) == ["greedy", "other"]
    labels = re.findall(r'class="label"[^>]* y="(\d+)">([\w ]+)<', bars)
    assert [label for _, label in labels] == ["before", "after", "no interval", "open"]
    lines = re.findall(r'class="(?:group|label)"[^>]* y="(\d+)">', bars)
    assert len(lines) == 6
    assert all(int(b) - int(a) >= 15 for a, b in itertools.pairwise(lines))
    assert bar_chart([], title="t") == "" == bar_chart([Bar("lost", math.inf)], title="t")


def test_without_a_maximum_the_longest_bar_or_whisker_nearly_fills_its_track() -> None:
    chart = bar_chart([Bar("a", 1.0, 0.5, 4.0), Bar("b", 2.0)], title="t")
    widths = [float(width) for width in re.findall(r'class="bar [^>]* width="([\d.]+)%"', chart)]
    assert widths == pytest.approx([100 / 4.08, 200 / 4.08], abs=0.01)


def test_what_exceeds_the_maximum_is_cut_off() -> None:
    chart = bar_chart([Bar("a", 2.0, -1.0, 3.0), Bar("b", -1.0)], title="t", maximum=1.0)
    assert re.findall(r'class="bar [^>]* width="([\d.]+)%"', chart) == ["100.00", "0.00"]
    assert 'x1="0.00%" x2="100.00%"' in chart


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=5))
def test_no_bar_leaves_its_track(values: list[float]) -> None:
    widths = re.findall(
        r'class="bar t0"[^>]* width="([\d.]+)%"',
        bar_chart([Bar("a", v, 0.0, v * 3) for v in values], title="t"),
    )
    assert len(widths) == len(values) and all(0 <= float(width) <= 100 for width in widths)


def _cells(chart: str, level: int) -> float:
    return sum(
        float(width)
        for path in re.findall(rf'<path class="h{level}" d="([^"]*)"', chart)
        for width in re.findall(r"h([\d.]+)v1", path)
    )


def _heat(rows: list[list[float]], edges: tuple[float, ...] = (0.5, 2.0, 4.0)) -> str:
    return heat_map(rows, title="t", edges=edges, label="l", x_ends=("0", "4"))


def test_heat_map_counts_every_cell_once_and_leaves_gaps_empty() -> None:
    chart = _heat([[0.0, 1.0, 1.0, math.nan], [3.0, 1.0, 9.0, 9.0]])
    ElementTree.fromstring(chart)
    assert [_cells(chart, level) for level in range(4)] == [1, 3, 1, 2]
    assert _heat([]) == "" == _heat([[math.nan]])


def test_a_row_of_the_heat_map_is_an_expert_and_time_runs_to_the_right() -> None:
    chart = _heat([[0.0, 1.0], [3.0, 1.0]])
    assert 'class="h0" d="M0,0h1v1h-1z"' in chart
    assert 'class="h2" d="M0,1h1v1h-1z"' in chart
    assert 'class="h1" d="M1,0h1v1h-1zM1,1h1v1h-1z"' in chart


def test_a_value_on_an_edge_belongs_to_the_level_above() -> None:
    assert [_cells(_heat([[0.5, 2.0, 1.9]]), level) for level in range(3)] == [0, 2, 1]


def test_heat_map_of_a_long_run_stays_small_and_ragged_rows_are_fine() -> None:
    rows = [
        [(step * (expert + 3)) % 11 / 3 for step in range(5000 - expert)] for expert in range(64)
    ]
    assert len(_heat(rows, (0.5, 1.0, 2.0))) < 90_000


def test_columns_beyond_ninety_are_means_of_their_steps() -> None:
    row = [0.0] * 50 + [3.0] * 50 + [0.0, 3.0] * 40
    chart = _heat([row], (1.0, 2.0))
    assert 'viewBox="0 0 90 1"' in chart
    assert _cells(chart, 0) == pytest.approx(25, abs=1)
    assert _cells(chart, 2) == pytest.approx(25, abs=1)
    assert _cells(chart, 1) == pytest.approx(40, abs=1)
