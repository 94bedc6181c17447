"""Charts as SVG strings: lines, bars with intervals, a heat map. Pure functions; nothing to draw
gives "".

A chart stretches with the page while its text keeps its size: geometry lies in an inner `<svg>` of
1000 units' width that is stretched, text beside it in percent. Colours come from the page's style
sheet (`style.py`) by class, so that they follow light and dark. Not for: deciding what is worth
showing (`training.py`, `learning.py`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from xushi.report.numbers import digits, escape
from xushi.report.scales import Point, Scale, linear, logarithmic, runs, thin, tick_text

WIDTH = 1000.0
_LABEL_GAP = 15.0
_ROW, _HEADING = 43.0, 36.0
_MAXIMAL_COLUMNS = 90


@dataclass(frozen=True)
class Series:
    """One line: points in order of x; `tone` 0 to 5 picks a colour; a `faint` line stands behind
    another one.
    """

    label: str
    points: Sequence[Point]
    tone: int = 0
    faint: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Reference:
    """A horizontal dashed line with its name; the axis reaches to it."""

    label: str
    value: float


@dataclass(frozen=True)
class Bar:
    """One horizontal bar with an optional interval; a change of `group` starts a new heading."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    tone: int = 0
    group: str = ""


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    height: int = 240,
    references: Sequence[Reference] = (),
    band: Sequence[tuple[float, float, float]] = (),
    log_x: bool = False,
    y_limit: float = math.inf,
    y_floor: float = math.inf,
) -> str:
    """Lines over a shared x axis with their names beside them; `band` is (x, low, high) behind all
    of them.

    Values that are not finite break a line. `y_limit` cuts the axis off above, `y_floor` makes it
    reach down at least to there.
    """
    drawn = [(one, thin([p for p in one.points if not log_x or p[0] > 0])) for one in series]
    drawn = [(one, points) for one, points in drawn if runs(points)]
    finite = [point for _, points in drawn for stretch in runs(points) for point in stretch]
    edges = [edge for _, low, high in band for edge in (low, high)]
    x_scale = logarithmic(x for x, _ in finite) if log_x else linear((x for x, _ in finite), 6)
    levels = [one.value for one in references if math.isfinite(one.value)]
    reached = [min(y, y_limit) for y in [*(y for _, y in finite), *edges]]
    y_scale = linear(
        [*reached, *levels, *([y_floor] if math.isfinite(y_floor) else [])], 4, rounded=True
    )
    if x_scale is None or y_scale is None:
        return ""
    paths = [_band(band, x_scale, y_scale, height)] if band else []
    paths += [_path(one, points, x_scale, y_scale, height, y_label) for one, points in drawn]
    dots = "".join(_dots(one, points, x_scale, y_scale, height) for one, points in drawn)
    named = [
        (one.label, f"t{one.tone}", _ends_at(points, y_scale, height))
        for one, points in drawn
        if one.label and not one.faint
    ]
    named += [
        (one.label, "reference", height * (1 - y_scale(one.value)))
        for one in references
        if math.isfinite(one.value)
    ]
    margin = max([16.0, *(18 + 6.3 * len(label) for label, _, _ in named)])
    domain = (
        f'data-x="{x_scale.low:.9g} {x_scale.high:.9g}" data-y="{y_scale.low:.9g} '
        f'{y_scale.high:.9g}" '
        f'data-height="{height}" data-name="{escape(x_label)}"' + (" data-log" if log_x else "")
    )
    return (
        f'<div class="chart lines"><p class="axis">{escape(y_label)}</p>'
        f'<svg class="plot" role="img" aria-label="{escape(title)}" height="{height}" '
        f'style="--right:{margin:.0f}px" {domain}>'
        + _grid(x_scale, y_scale, height)
        + "".join(_reference(height * (1 - y_scale(value))) for value in levels)
        + f'<svg width="100%" height="{height}" viewBox="0 0 1000 {height}" '
        'preserveAspectRatio="none">'
        + "".join(paths)
        + "</svg>"
        + dots
        + _names(named, height)
        + '<text class="tick" text-anchor="end" x="100%" '
        f'y="{height + 36}">{escape(x_label)}</text></svg></div>'
    )


def bar_chart(
    bars: Sequence[Bar],
    *,
    title: str,
    write: Callable[[float], str] = digits,
    maximum: float | None = None,
) -> str:
    """Horizontal bars from zero with values at their right, whiskers where an interval is given."""
    shown = [bar for bar in bars if math.isfinite(bar.value)]
    if not shown:
        return ""
    ends = [
        end
        for bar in shown
        for end in (bar.value, bar.high)
        if end is not None and math.isfinite(end)
    ]
    top = maximum or max(*ends, 0.0, 0.0) * 1.02 or 1.0
    rows, y, group = [], 0.0, ""
    for bar in shown:
        if bar.group != group:
            y += _HEADING if y else 22
            rows.append(f'<text class="group" x="0" y="{y - 7:.0f}">{escape(bar.group)}</text>')
            group = bar.group
        rows.append(_bar_row(bar, y, top, write))
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
    columns = max((len(row) for row in binned), default=0)
    if not any(math.isfinite(value) for row in binned for value in row):
        return ""
    levels: dict[int, list[str]] = {}
    for index, row in enumerate(binned):
        for start, end, level in _stretches(row, edges):
            levels.setdefault(level, []).append(f"M{start},{index}h{end - start}v1h{start - end}z")
    height = max(14.0, len(rows) * max(2.0, min(11.0, 176 / len(rows))))
    last = str(len(rows) - 1) if len(rows) > 1 else ""
    return (
        f'<div class="chart cells"><p class="axis">{escape(label)}</p>'
        f'<svg class="heat" role="img" aria-label="{escape(title)}" height="{height:.0f}">'
        f'<text class="tick" text-anchor="end" x="-8" y="10">0</text>'
        f'<text class="tick" text-anchor="end" x="-8" y="{height - 1:.0f}">{last}</text>'
        f'<svg width="100%" height="{height:.0f}" viewBox="0 0 {columns} {len(rows)}" '
        'preserveAspectRatio="none" shape-rendering="crispEdges">'
        + "".join(
            f'<path class="h{level}" d="{"".join(levels[level])}"/>' for level in sorted(levels)
        )
        + f'</svg><text class="tick" x="0" y="{height + 16:.0f}">{escape(x_ends[0])}</text>'
        '<text class="tick" text-anchor="end" x="100%" '
        f'y="{height + 16:.0f}">{escape(x_ends[1])}</text>'
        "</svg></div>"
    )


def _path(
    one: Series, points: Sequence[Point], x_scale: Scale, y_scale: Scale, height: int, name: str
) -> str:
    d = "".join(
        "M"
        + "L".join(f"{WIDTH * x_scale(x):.1f},{height * (1 - y_scale(y)):.1f}" for x, y in stretch)
        for stretch in runs(points)
    )
    classes = f"line t{one.tone}" + (" faint" if one.faint else "")
    # The page's script reads out the lines that carry a name.
    label = "" if one.faint else f' data-label="{escape(one.label or name)}"'
    return f'<path class="{classes}"{label} d="{d}"/>'


def _dots(one: Series, points: Sequence[Point], x_scale: Scale, y_scale: Scale, height: int) -> str:
    # A stretch of one point has no line to show it.
    single = [stretch[0] for stretch in runs(points) if one.dots or len(stretch) == 1]
    marked = [point for stretch in runs(points) for point in stretch] if one.dots else single
    return "".join(
        f'<circle class="dot t{one.tone}" cx="{100 * x_scale(x):.2f}%" '
        f'cy="{height * (1 - y_scale(y)):.1f}" '
        f'r="3.2"/>'
        for x, y in marked[:400]
        if y_scale(y) <= 1
    )


def _band(
    band: Sequence[tuple[float, float, float]], x_scale: Scale, y_scale: Scale, height: int
) -> str:
    inside = [
        (x, low, high)
        for x, low, high in band
        if all(map(math.isfinite, (x, low, high))) and x_scale.low <= x <= x_scale.high
    ]
    lower, upper = (
        thin([(x, low) for x, low, _ in inside]),
        thin([(x, high) for x, _, high in inside]),
    )
    corners = [
        f"{WIDTH * x_scale(x):.1f},{height * (1 - y_scale(y)):.1f}"
        for x, y in [*upper, *reversed(lower)]
    ]
    return f'<path class="band" d="M{"L".join(corners)}z"/>' if corners else ""


def _grid(x_scale: Scale, y_scale: Scale, height: int) -> str:
    parts = []
    step = (
        y_scale.ticks[1] - y_scale.ticks[0]
        if len(y_scale.ticks) > 1
        else abs(y_scale.ticks[0]) or 1.0
    )
    for tick in y_scale.ticks:
        y = height * (1 - y_scale(tick))
        parts.append(
            f'<line class="grid" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>'
            '<text class="tick" text-anchor="end" x="-8" '
            f'y="{y + 4:.1f}">{tick_text(tick, step)}</text>'
        )
    steps = [b - a for a, b in zip(x_scale.ticks, x_scale.ticks[1:], strict=False)]
    for tick in x_scale.ticks:
        place = 100 * x_scale(tick)
        text = tick_text(tick, tick if x_scale.log else min(steps, default=abs(tick) or 1.0))
        anchor = "end" if place > 96 else "start" if place < 4 else "middle"
        parts.append(
            f'<text class="tick" text-anchor="{anchor}" x="{place:.2f}%" '
            f'y="{height + 18}">{text}</text>'
        )
    return "".join(parts)


def _reference(y: float) -> str:
    return f'<line class="reference" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>'


def _ends_at(points: Sequence[Point], y_scale: Scale, height: int) -> float:
    return max(0.0, height * (1 - y_scale(runs(points)[-1][-1][1])))


def _names(named: Sequence[tuple[str, str, float]], height: int) -> str:
    placed = sorted(named, key=lambda name: name[2])
    ys = [y for _, _, y in placed]
    for i in range(1, len(ys)):
        ys[i] = max(ys[i], ys[i - 1] + _LABEL_GAP)
    # What was pushed out below is pushed back up.
    for i in range(len(ys) - 1, -1, -1):
        ys[i] = min(ys[i], height - _LABEL_GAP * (len(ys) - 1 - i))
    return "".join(
        f'<text class="name {tone}" x="100%" dx="10" y="{y + 4:.1f}">{escape(label)}</text>'
        for (label, tone, _), y in zip(placed, ys, strict=True)
    )


def _bar_row(bar: Bar, y: float, top: float, write: Callable[[float], str]) -> str:
    width = max(0.0, min(1.0, bar.value / top)) * 100
    interval = (
        bar.low is not None
        and bar.high is not None
        and math.isfinite(bar.low)
        and math.isfinite(bar.high)
    )
    whisker, said = "", write(bar.value)
    if interval and bar.low is not None and bar.high is not None:
        low, high = (max(0.0, min(1.0, end / top)) * 100 for end in (bar.low, bar.high))
        middle = y + 26
        whisker = (
            f'<line class="whisker" x1="{low:.2f}%" x2="{high:.2f}%" y1="{middle}" y2="{middle}"/>'
            + "".join(
                f'<line class="whisker" x1="{x:.2f}%" x2="{x:.2f}%" y1="{middle - 5}" '
                f'y2="{middle + 5}"/>'
                for x in (low, high)
            )
        )
        said += f" [{write(bar.low)} – {write(bar.high)}]"
    return (
        f'<text class="label" x="0" y="{y + 13:.0f}">{escape(bar.label)}</text>'
        '<text class="value" text-anchor="end" x="100%" '
        f'y="{y + 13:.0f}">{escape(write(bar.value))}</text>'
        f'<rect class="track" x="0" y="{y + 21:.0f}" width="100%" height="10" rx="2"/>'
        f'<rect class="bar t{bar.tone}" x="0" y="{y + 21:.0f}" width="{width:.2f}%" height="10" '
        'rx="2">'
        f"<title>{escape(bar.label)}: {escape(said)}</title></rect>{whisker}"
    )


def _binned(row: Sequence[float]) -> list[float]:
    columns = min(len(row), _MAXIMAL_COLUMNS)
    means = []
    for column in range(columns):
        part = [
            value
            for value in row[len(row) * column // columns : len(row) * (column + 1) // columns]
            if math.isfinite(value)
        ]
        means.append(math.fsum(part) / len(part) if part else math.nan)
    return means


def _stretches(row: Sequence[float], edges: Sequence[float]) -> list[tuple[int, int, int]]:
    # Neighbours of one level are one rectangle: a calm router costs a few hundred bytes.
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
