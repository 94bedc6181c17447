"""Where values lie on a chart: the range of an axis, round ticks, and thinning of long series that
keeps their extremes.

Pure arithmetic. Not for: drawing (`charts.py`).
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Point = tuple[float, float]


@dataclass(frozen=True)
class Scale:
    """A linear map from [low, high] to [0, 1], with round tick values inside."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        """The place of `value`: 0 at `low`, 1 at `high`."""
        return (value - self.low) / (self.high - self.low)


# Of a scale's width: below it floating point has no digits left for a step.
_SMALLEST = 1e-300


def linear(values: Iterable[float], ticks: int = 5, rounded: bool = False) -> Scale | None:
    """A scale over the finite values with about `ticks` ticks; None without finite values. With
    `rounded` both ends are moved outwards to a tick.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None
    low = min(finite)
    high = max(finite)
    if high - low <= max(1e-12 * max(abs(low), abs(high)), _SMALLEST):
        margin = abs(low) * 0.05
        low, high = (low - margin, high + margin) if margin > _SMALLEST else (min(low, 0.0), 1.0)
    step = _round_step(high / ticks - low / ticks)
    if rounded:
        low = math.floor(low / step + 1e-9) * step
        high = math.ceil(high / step - 1e-9) * step
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return Scale(low, high, tuple(i * step for i in range(first, last + 1)))


def counts(values: Sequence[float], ticks: int) -> Scale | None:
    """A scale over whole numbers, half a step wider at both ends, with at most `ticks` ticks; None
    without values.
    """
    if not values:
        return None
    low, high = math.floor(min(values)), math.ceil(max(values))
    step = -(-(high - low + 1) // ticks)
    return Scale(low - 0.5, high + 0.5, tuple(range(low, high + 1, step)))


def thin(points: Sequence[Point], buckets: int = 300) -> list[Point]:
    """At most four points for each bucket of neighbours: first, lowest, highest and last, in order.

    No spike is lost. A bucket without a finite value leaves one NaN, so a gap stays a gap.
    """
    if len(points) <= 4 * buckets:
        return list(points)
    kept: list[Point] = []
    for bucket in range(buckets):
        part = range(len(points) * bucket // buckets, len(points) * (bucket + 1) // buckets)
        finite = [i for i in part if math.isfinite(points[i][1])]
        if not finite:
            kept.append((points[part[0]][0], math.nan))
            continue
        ends = {
            finite[0],
            finite[-1],
            min(finite, key=lambda i: points[i][1]),
            max(finite, key=lambda i: points[i][1]),
        }
        kept.extend(points[i] for i in sorted(ends))
    return kept


def runs(points: Sequence[Point]) -> list[list[Point]]:
    """The stretches of points without a break by a value that is not finite."""
    stretches: list[list[Point]] = [[]]
    for point in points:
        if all(map(math.isfinite, point)):
            stretches[-1].append(point)
        elif stretches[-1]:
            stretches.append([])
    return [stretch for stretch in stretches if stretch]


def smooth(points: Sequence[Point], share: float = 0.02) -> list[Point]:
    """A running mean: each point becomes the mean of the `share` of all points around it. A value
    that is not finite ends the window.
    """
    reach = round(len(points) * share / 2)
    result: list[Point] = []
    for stretch in runs(points):
        sums = [0.0, *itertools.accumulate(y for _, y in stretch)]
        for i, (x, _) in enumerate(stretch):
            start = max(0, i - reach)
            end = min(len(stretch), i + reach + 1)
            result.append((x, (sums[end] - sums[start]) / (end - start)))
        result.append((stretch[-1][0], math.nan))
    return result[:-1]


def early_limit(points: Sequence[Point], means: Sequence[Point]) -> float:
    """Where to cut an axis off so that the fall of the first steps does not press the rest of the
    curve flat; infinity if nothing lies far above. `means` is the running mean of `points`.
    """
    ys = [y for stretch in runs(means) for _, y in stretch]
    early = ys[len(ys) // 25]
    highest = max(y for stretch in runs(points) for _, y in stretch)
    return early * 1.05 if highest > 1.3 * early else math.inf


def tick_text(value: float, step: float) -> str:
    """A tick's label, such as 0.25, 1.5, 20 k or 3 M. `step`, the distance between ticks, decides
    how many decimals it has.
    """
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit or (value == 0 and step >= limit):
            scale = 1e3 if unit == "k" else limit
            return _plain(value / scale, step / scale) + (f"\u202f{unit}" if value else "")
    return _plain(value, step)


@dataclass(frozen=True)
class TickLabel:
    """A tick's text below a plot at `place`, from 0 to 1; those at the edges stay inside."""

    text: str
    place: float

    @property
    def anchor(self) -> str:
        """Which part of the text is at `place`: SVG's text-anchor."""
        return "end" if self.place > 0.96 else "start" if self.place < 0.04 else "middle"

    def extent(self, width: float) -> tuple[float, float]:
        """Left and right end in pixels on a plot of `width` pixels."""
        length = PIXELS_PER_CHARACTER * len(self.text)
        left = self.place * width - length * {"start": 0.0, "middle": 0.5, "end": 1.0}[self.anchor]
        return left, left + length


CHART_WIDTHS = (280, 420, 640)
"""Widths of a chart in pixels from which more of its ticks are shown; the style sheet has them."""
PIXELS_PER_CHARACTER = 7.0
LABEL_SPACE = 6.0


def shown_from(labels: Sequence[TickLabel], beside: float) -> list[int | None]:
    """For each label the first of `CHART_WIDTHS` at which it is shown; None: at none.

    Every n-th label is shown, with the least n for which none overlap. `beside` is what is left and
    right of the plot, in pixels.
    """
    shown: list[int | None] = [None] * len(labels)
    stride = 1
    for width in reversed(CHART_WIDTHS):
        first = stride
        while _overlap(labels[::stride], max(1.0, width - beside)):
            stride += first
        for number in range(0, len(labels), stride):
            shown[number] = width
    return shown


def _overlap(labels: Sequence[TickLabel], width: float) -> bool:
    extents = [label.extent(width) for label in labels]
    return any(b[0] < a[1] + LABEL_SPACE for a, b in itertools.pairwise(extents))


def _plain(value: float, step: float) -> str:
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 2
    if decimals > 4 and value:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}".replace("-", "−")
    if not value:
        return "0"
    if abs(round(step, decimals) - step) > 1e-9 * step:
        decimals += 1  # a step of 2.5, 0.25, ...
    return f"{value:.{decimals}f}".replace("-", "−")


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(
        power * mark for mark in (1.0, 2.0, 2.5, 5.0, 10.0) if power * mark >= rough * (1 - 1e-9)
    )
