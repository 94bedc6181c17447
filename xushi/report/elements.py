"""The HTML elements that the page repeats. Arguments that are text are escaped here; a `body` or
`chart` is HTML already.
"""

import math
from collections.abc import Sequence

from xushi.report.numbers import count, digits, duration, escape
from xushi.report.read import Run
from xushi.report.scales import Point, runs


def section(name: str, title: str, body: str, aside: str = "") -> str:
    """A section with its heading, or "" if `body` is empty."""
    if not body:
        return ""
    small = f"<small>{escape(aside)}</small>" if aside else ""
    return f'<section id="{escape(name)}"><h2>{escape(title)}{small}</h2>{body}</section>\n'


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text, or "" without text."""
    attribute = f' class="{kind}"' if kind else ""
    return f"<p{attribute}>{escape(text)}</p>" if text else ""


def figure(chart: str, caption: str = "", heading: str = "") -> str:
    """A chart with its heading and caption, or "" if `chart` is empty."""
    if not chart:
        return ""
    above = f"<h3>{escape(heading)}</h3>" if heading else ""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"{above}<figure>{chart}{below}</figure>"


def small_figures(figures: Sequence[str]) -> str:
    """Figures side by side where the page is wide enough, or "" if all are empty."""
    body = "".join(figures)
    return f'<div class="small">{body}</div>' if body else ""


def above_frame(points: Sequence[Point], top: float) -> str:
    """A sentence for the caption if the curve begins above its frame, which ends at `top`."""
    highest = max(y for stretch in runs(points) for _, y in stretch)
    if highest <= top:
        return ""
    return f" The first values, up to {digits(highest)}, lie above the frame."


def not_finite(points: Sequence[Point]) -> str:
    """A sentence for the caption if some values of the curve are not finite."""
    broken = sum(not math.isfinite(y) for _, y in points)
    if not broken:
        return ""
    return f" {count(broken)} of {count(len(points))} values were not finite and leave gaps."


def fact_grid(pairs: Sequence[tuple[str, str]]) -> str:
    """Terms with their values in a grid; empty values are left out."""
    items = "".join(
        f"<div><dt>{escape(term)}</dt><dd>{escape(value)}</dd></div>"
        for term, value in pairs
        if value
    )
    return f'<dl class="facts">{items}</dl>' if items else ""


def text_block(text: str, kind: str = "") -> str:
    """Text as a model wrote it: spaces and line breaks are kept, and long lines are wrapped."""
    return f'<p class="text written{" " + kind if kind else ""}" dir="auto">{escape(text)}</p>'


def stage_time(run: Run, stage: str) -> str:
    """How long a stage took, for its heading."""
    return run.written(f"seconds.{stage}", duration)
