"""Charts as SVG strings: lines, bars with intervals, a heat map. Pure functions. A chart with
nothing to draw is "".

A chart stretches with the page while its text keeps its size: lines lie in an inner `<svg>` that is
1000 units wide and stretched, and text lies beside it with its place in percent. Colours come from
the style sheet (`style.py`) by class, so they follow light and dark. Not for: deciding what is
worth showing (`sections_*.py`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from xushi.report.numbers import digits, escape
from xushi.report.scales import (
    Point,
    Scale,
    TickLabel,
    counts,
    linear,
    runs,
    shown_from,
    thin,
    tick_text,
)

WIDTH = 1000.0
_LABEL_GAP = 15.0
_LEFT = 46.0  # pixels left of a plot, at most (style.py)
_ROW = 43.0
_HEADING = 36.0
_FIRST_HEADING = 22.0
_MAXIMAL_COLUMNS = 90
_MAXIMAL_DOTS = 400


@dataclass(frozen=True)
class Series:
    """One line: points in order of x, and a colour from `tone` 0 to 5. A `faint` line lies behind
    another one and has no name. A value that is not finite breaks the line.
    """

    label: str
    points: Sequence[Point]
    tone: int = 0
    faint: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Reference:
    """A horizontal dashed line with its name; the vertical axis reaches to it."""

    label: str
    value: float


@dataclass(frozen=True)
class Axes:
    """The frame of a line chart: its titles, its height in pixels and the reach of its vertical
    axis.

    The axis goes down at least to `y_lowest` and ends at about `y_limit`, whatever lies above; what
    lies far below `y_floor` is cut off too. `x_counts`: x counts things, so that its ticks are
    whole numbers and no point lies on an edge.
    """

    title: str
    x_label: str
    y_label: str
    height: int = 240
    y_lowest: float | None = None
    y_limit: float = math.inf
    y_floor: float = -math.inf
    x_counts: bool = False


@dataclass(frozen=True)
class Bar:
    """One horizontal bar with an optional interval. A change of `group` starts a new heading."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    tone: int = 0
    group: str = ""

    @property
    def interval(self) -> tuple[float, float] | None:
        """(low, high) if both are finite."""
        if self.low is None or self.high is None:
            return None
        return (self.low, self.high) if math.isfinite(self.low + self.high) else None


@dataclass(frozen=True)
class _Plane:
    """From values to places in the chart; y is counted in pixels from the top."""

    x_scale: Scale
    y_scale: Scale
    height: int

    def x(self, value: float) -> float:
        return WIDTH * self.x_scale(value)

    def y(self, value: float) -> float:
        return self.height * (1 - self.y_scale(value))


@dataclass(frozen=True)
class _Name:
    """A line's name at the right edge of the chart."""

    text: str
    colour: str
    y: float


def line_chart(series: Sequence[Series], axes: Axes, references: Sequence[Reference] = ()) -> str:
    """Lines over a shared x axis, with their names beside them."""
    drawn = [replace(one, points=thin(one.points)) for one in series if runs(one.points)]
    levels = [one for one in references if math.isfinite(one.value)]
    plane = _plane(drawn, levels, axes)
    if plane is None:
        return ""
    names = _names(drawn, levels, plane)
    margin = max([16.0, *(18 + 6.3 * len(name.text) for name in names)])
    return (
        f'<div class="chart lines"><p class="axis">{escape(axes.y_label)}</p>'
        f'<svg class="plot" role="img" aria-label="{escape(axes.title)}" height="{axes.height}" '
        f'style="--right:{margin:.0f}px" {_domain(plane, axes)}>'
        + _y_grid(plane)
        + _x_ticks(plane, _LEFT + margin)
        + "".join(_reference(plane.y(one.value)) for one in levels)
        + f'<svg width="100%" height="{axes.height}" viewBox="0 0 1000 {axes.height}" '
        'preserveAspectRatio="none">'
        + "".join(_path(one, plane, axes.y_label) for one in drawn)
        + "</svg>"
        + "".join(_dots(one, plane) for one in drawn)
        + _name_texts(names, axes.height)
        + f'<text class="tick" text-anchor="end" x="100%" y="{axes.height + 36}">'
        f"{escape(axes.x_label)}</text></svg></div>"
    )


def frame_top(series: Sequence[Series], axes: Axes, references: Sequence[Reference] = ()) -> float:
    """Where the vertical axis of that chart ends; what is higher lies above the frame."""
    plane = _plane(series, [one for one in references if math.isfinite(one.value)], axes)
    return math.inf if plane is None else plane.y_scale.high


def bar_chart(
    bars: Sequence[Bar],
    *,
    title: str,
    write: Callable[[float], str] = digits,
    maximum: float | None = None,
) -> str:
    """Horizontal bars from zero in the order given, values at their right, whiskers where a bar has
    an interval.
    """
    shown = [bar for bar in bars if math.isfinite(bar.value)]
    if not shown:
        return ""
    highs = [bar.interval[1] for bar in shown if bar.interval is not None]
    longest = max([*(bar.value for bar in shown), *highs, 0.0])
    full = maximum or longest * 1.02 or 1.0
    rows = []
    y = 0.0
    group = ""
    for bar in shown:
        if bar.group != group:
            y += _HEADING if y else _FIRST_HEADING
            rows.append(f'<text class="group" x="0" y="{y - 7:.0f}">{escape(bar.group)}</text>')
            group = bar.group
        rows.append(_bar_row(bar, y, full, write))
        y += _ROW
    return (
        f'<div class="chart"><svg class="bars" role="img" aria-label="{escape(title)}" '
        f'height="{y:.0f}">' + "".join(rows) + "</svg></div>"
    )


def heat_map(
    rows: Sequence[Sequence[float]],
    *,
    title: str,
    edges: Sequence[float],
    label: str,
    x_ends: tuple[str, str],
) -> str:
    """Rows of cells (row = expert, column = time), coloured by how many of the ascending `edges` a
    value reaches.

    Columns beyond 90 are averaged in groups. Cells without a finite value stay empty.
    """
    binned = [_binned(row) for row in rows]
    if not any(math.isfinite(value) for row in binned for value in row):
        return ""
    columns = max(len(row) for row in binned)
    height = max(14.0, len(rows) * max(2.0, min(11.0, 176 / len(rows))))
    last = str(len(rows) - 1) if len(rows) > 1 else ""
    return (
        f'<div class="chart cells"><p class="axis">{escape(label)}</p>'
        f'<svg class="heat" role="img" aria-label="{escape(title)}" height="{height:.0f}">'
        '<text class="tick" text-anchor="end" x="-8" y="10">0</text>'
        f'<text class="tick" text-anchor="end" x="-8" y="{height - 1:.0f}">{last}</text>'
        f'<svg width="100%" height="{height:.0f}" viewBox="0 0 {columns} {len(rows)}" '
        'preserveAspectRatio="none" shape-rendering="crispEdges">'
        + _cells(binned, edges)
        + f'</svg><text class="tick" x="0" y="{height + 16:.0f}">{escape(x_ends[0])}</text>'
        f'<text class="tick" text-anchor="end" x="100%" y="{height + 16:.0f}">'
        f"{escape(x_ends[1])}</text></svg></div>"
    )


def _plane(series: Sequence[Series], levels: Sequence[Reference], axes: Axes) -> _Plane | None:
    finite = [point for one in series for stretch in runs(one.points) for point in stretch]
    reached = [max(axes.y_floor, min(y, axes.y_limit)) for _, y in finite] + [
        one.value for one in levels
    ]
    if axes.y_lowest is not None:
        reached.append(axes.y_lowest)
    xs = [x for x, _ in finite]
    x_scale = counts(xs, 12) if axes.x_counts else linear(xs, 6)
    y_scale = linear(reached, 4, rounded=True)
    if x_scale is None or y_scale is None:
        return None
    return _Plane(x_scale, y_scale, axes.height)


def _domain(plane: _Plane, axes: Axes) -> str:
    """What the page's script needs to read values off the chart."""
    x = plane.x_scale
    y = plane.y_scale
    return (
        f'data-x="{x.low:.9g} {x.high:.9g}" data-y="{y.low:.9g} {y.high:.9g}" '
        f'data-height="{axes.height}" data-name="{escape(axes.x_label)}"'
    )


def _path(one: Series, plane: _Plane, y_label: str) -> str:
    d = "".join(
        "M" + "L".join(f"{plane.x(x):.1f},{plane.y(y):.1f}" for x, y in stretch)
        for stretch in runs(one.points)
    )
    classes = f"line t{one.tone}" + (" faint" if one.faint else "")
    # The page's script reads out the lines that carry a name.
    label = "" if one.faint else f' data-label="{escape(one.label or y_label)}"'
    return f'<path class="{classes}"{label} d="{d}"/>'


def _dots(one: Series, plane: _Plane) -> str:
    # A stretch of one point has no line to show it.
    marked = [
        point for stretch in runs(one.points) for point in stretch if one.dots or len(stretch) == 1
    ]
    return "".join(
        f'<circle class="dot t{one.tone}" cx="{100 * plane.x_scale(x):.2f}%" '
        f'cy="{plane.y(y):.1f}" r="3.2"/>'
        for x, y in marked[:_MAXIMAL_DOTS]
        if 0 <= plane.y_scale(y) <= 1
    )


def _y_grid(plane: _Plane) -> str:
    ticks = plane.y_scale.ticks
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(ticks[0]) or 1.0
    return "".join(
        f'<line class="grid" x1="0" x2="100%" y1="{plane.y(tick):.1f}" y2="{plane.y(tick):.1f}"/>'
        f'<text class="tick" text-anchor="end" x="-8" y="{plane.y(tick) + 4:.1f}">'
        f"{tick_text(tick, step)}</text>"
        for tick in ticks
    )


def _x_ticks(plane: _Plane, beside: float) -> str:
    ticks = plane.x_scale.ticks
    step = min((b - a for a, b in pairwise(ticks)), default=abs(ticks[0]) or 1.0)
    labels = [TickLabel(tick_text(tick, step), plane.x_scale(tick)) for tick in ticks]
    return "".join(
        f'<text class="tick from{width}" text-anchor="{label.anchor}" '
        f'x="{100 * label.place:.2f}%" y="{plane.height + 18}">{label.text}</text>'
        for label, width in zip(labels, shown_from(labels, beside), strict=True)
        if width is not None
    )


def _reference(y: float) -> str:
    return f'<line class="reference" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>'


def _names(series: Sequence[Series], levels: Sequence[Reference], plane: _Plane) -> list[_Name]:
    ends = [(one, runs(one.points)[-1][-1][1]) for one in series if one.label and not one.faint]
    lines = [_Name(one.label, f"t{one.tone}", max(0.0, plane.y(end))) for one, end in ends]
    return lines + [_Name(one.label, "reference", plane.y(one.value)) for one in levels]


def _name_texts(names: Sequence[_Name], height: int) -> str:
    placed = sorted(names, key=lambda name: name.y)
    ys = [name.y for name in placed]
    for i in range(1, len(ys)):
        ys[i] = max(ys[i], ys[i - 1] + _LABEL_GAP)
    # Names that were pushed out below are pushed back up.
    for i in range(len(ys) - 1, -1, -1):
        ys[i] = min(ys[i], height - _LABEL_GAP * (len(ys) - 1 - i))
    return "".join(
        f'<text class="name {name.colour}" x="100%" dx="10" y="{y + 4:.1f}">'
        f"{escape(name.text)}</text>"
        for name, y in zip(placed, ys, strict=True)
    )


def _bar_row(bar: Bar, y: float, full: float, write: Callable[[float], str]) -> str:
    text = write(bar.value)
    if bar.interval is not None:
        text += f" [{write(bar.interval[0])} – {write(bar.interval[1])}]"
    return (
        f'<text class="label" x="0" y="{y + 13:.0f}">{escape(bar.label)}</text>'
        f'<text class="value" text-anchor="end" x="100%" y="{y + 13:.0f}">'
        f"{escape(write(bar.value))}</text>"
        f'<rect class="track" x="0" y="{y + 21:.0f}" width="100%" height="10" rx="2"/>'
        f'<rect class="bar t{bar.tone}" x="0" y="{y + 21:.0f}" '
        f'width="{_share(bar.value, full):.2f}%" height="10" rx="2">'
        f"<title>{escape(bar.label)}: {escape(text)}</title></rect>{_whisker(bar, y + 26, full)}"
    )


def _whisker(bar: Bar, middle: float, full: float) -> str:
    if bar.interval is None:
        return ""
    low, high = (_share(end, full) for end in bar.interval)
    ends = "".join(
        f'<line class="whisker" x1="{x:.2f}%" x2="{x:.2f}%" y1="{middle - 5}" y2="{middle + 5}"/>'
        for x in (low, high)
    )
    return (
        f'<line class="whisker" x1="{low:.2f}%" x2="{high:.2f}%" y1="{middle}" y2="{middle}"/>'
        + ends
    )


def _share(value: float, full: float) -> float:
    """Percent of the bar's track."""
    return max(0.0, min(1.0, value / full)) * 100


def _binned(row: Sequence[float]) -> list[float]:
    columns = min(len(row), _MAXIMAL_COLUMNS)
    means = []
    for column in range(columns):
        start = len(row) * column // columns
        end = len(row) * (column + 1) // columns
        finite = [value for value in row[start:end] if math.isfinite(value)]
        means.append(math.fsum(finite) / len(finite) if finite else math.nan)
    return means


def _cells(rows: Sequence[Sequence[float]], edges: Sequence[float]) -> str:
    levels: dict[int, list[str]] = {}
    for index, row in enumerate(rows):
        for start, end, level in _stretches(row, edges):
            levels.setdefault(level, []).append(f"M{start},{index}h{end - start}v1h{start - end}z")
    return "".join(
        f'<path class="h{level}" d="{"".join(levels[level])}"/>' for level in sorted(levels)
    )


def _stretches(row: Sequence[float], edges: Sequence[float]) -> list[tuple[int, int, int]]:
    """(first column, column after the last, level): neighbours of one level are one rectangle, so a
    balanced router costs a few hundred bytes.
    """
    stretches: list[tuple[int, int, int]] = []
    for column, value in enumerate(row):
        if not math.isfinite(value):
            continue
        level = sum(value >= edge for edge in edges)
        if stretches and stretches[-1][1] == column and stretches[-1][2] == level:
            stretches[-1] = (stretches[-1][0], column + 1, level)
        else:
            stretches.append((column, column + 1, level))
    return stretches
