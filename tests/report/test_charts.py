"""Charts survive every series a run can leave, stay inside their frame and are well-formed."""

import itertools
import math
import re
import xml.etree.ElementTree as ElementTree

from hypothesis import given
from hypothesis import strategies as st

from xushi.report.charts import Bar, Reference, Series, bar_chart, heat_map, line_chart
from xushi.report.numbers import percent

ANY = st.floats(allow_nan=True, allow_infinity=True, width=32)


def _line(points: list[tuple[float, float]], **options: object) -> str:
    return line_chart(
        [Series("loss", points)], title="t", x_label="step", y_label="nats", **options
    )  # type: ignore[arg-type]


def _coordinates(chart: str) -> list[tuple[float, float]]:
    paths = re.findall(r'<path class="line[^>]* d="([^"]*)"', chart)
    return [
        (float(x), float(y))
        for path in paths
        for x, y in re.findall(r"(-?[\d.]+),(-?[\d.]+)", path)
    ]


@given(st.lists(ANY, max_size=40), st.booleans())
def test_any_series_gives_a_well_formed_chart_or_none(values: list[float], log_x: bool) -> None:
    chart = _line(
        [(float(i), y) for i, y in enumerate(values)],
        log_x=log_x,
        references=[Reference("xz <-9>", 1.5), Reference("none", math.nan)],
    )
    drawable = [y for i, y in enumerate(values) if math.isfinite(y) and (i > 0 or not log_x)]
    assert bool(chart) == bool(drawable)
    if chart:
        ElementTree.fromstring(chart.replace(" data-log>", ">"))
        assert "nan" not in chart and "inf" not in chart
        assert all(-0.1 <= x <= 1000.1 and -0.1 <= y <= 240.1 for x, y in _coordinates(chart))


def test_a_break_is_drawn_as_a_break_and_a_lone_point_as_a_dot() -> None:
    chart = _line([(0, 1.0), (1, 2.0), (2, math.nan), (3, 1.5), (4, math.inf), (5, 1.0), (6, 2.0)])
    path = re.search(r'<path class="line[^>]* d="([^"]*)"', chart)
    assert path is not None and path[1].count("M") == 3
    assert chart.count("<circle") == 1
    assert _line([(7, 3.0)]).count("<circle") == 1


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
    domain = re.search(r'data-y="(\S+) (\S+)"', chart)
    assert domain is not None and float(domain[2]) <= 4.0


def test_names_beside_lines_do_not_overlap() -> None:
    chart = line_chart(
        [Series(f"layer {i}", [(0, 1.0), (1, 0.1 + i / 1e4)], i) for i in range(6)],
        title="t",
        x_label="x",
        y_label="y",
    )
    places = sorted(
        float(y) for y in re.findall(r'class="name t\d" x="100%" dx="10" y="([\d.-]+)"', chart)
    )
    assert len(places) == 6
    assert all(b - a >= 14.9 for a, b in itertools.pairwise(places))


def test_band_and_bars_with_intervals() -> None:
    chart = _line([(0, 1.0), (1, 2.0)], band=[(0, 0.5, 1.5), (1, 1.0, math.nan), (1, 1.5, 2.5)])
    assert chart.count('class="band"') == 1
    bars = bar_chart(
        [
            Bar("before", 0.1, 0.05, 0.2, group="greedy"),
            Bar("after", 0.99, 0.97, 1.0, group="greedy"),
            Bar("lost", math.nan),
            Bar("no interval", 0.4, None, 0.6),
        ],
        title="t",
        write=percent,
        maximum=1.0,
    )
    ElementTree.fromstring(bars)
    assert bars.count('class="bar ') == 3
    assert bars.count('class="whisker"') == 2 * 3
    assert 'x1="5.00%" x2="20.00%"' in bars and 'width="99.00%"' in bars
    assert bars.count('class="group"') >= 1
    assert bar_chart([], title="t") == "" == bar_chart([Bar("lost", math.inf)], title="t")


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


def test_heat_map_counts_every_cell_once_and_leaves_gaps_empty() -> None:
    rows = [[0.0, 1.0, 1.0, math.nan], [3.0, 1.0, 9.0, 9.0]]
    chart = heat_map(rows, title="t", edges=(0.5, 2.0, 4.0), label="l", x_ends=("0", "4"))
    ElementTree.fromstring(chart)
    assert [_cells(chart, level) for level in range(4)] == [1, 3, 1, 2]
    assert heat_map([], title="t", edges=(1.0,), label="l", x_ends=("", "")) == ""
    assert heat_map([[math.nan]], title="t", edges=(1.0,), label="l", x_ends=("", "")) == ""


def test_heat_map_of_a_long_run_stays_small_and_ragged_rows_are_fine() -> None:
    rows = [
        [(step * (expert + 3)) % 11 / 3 for step in range(5000 - expert)] for expert in range(64)
    ]
    assert (
        len(heat_map(rows, title="t", edges=(0.5, 1.0, 2.0), label="l", x_ends=("0", "5 M")))
        < 90_000
    )
