"""The HTML elements that the page repeats. Arguments that are text are escaped here; a `body` or
`chart` is HTML already.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from xushi.report.numbers import count, digits, duration, escape
from xushi.report.scales import Point, runs
from xushi.report.style import SCRIPT, STYLE

if TYPE_CHECKING:
    from xushi.report.read import Run

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def document(title: str, body: str) -> str:
    """A whole page. It refers to nothing outside itself, and a content security policy forbids it
    to, whatever a text in it contains.
    """
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{escape(title)} · xushi 虚实</title><style>{STYLE}</style></head>\n<body>"
        f"{body}<script>{SCRIPT}</script></body></html>\n"
    )


def kicker(about: str) -> str:
    """The line above a page's title: the project's mark, what the page is `about` (HTML), and the
    switch between light and dark.
    """
    return (
        '<div class="kicker"><span class="mark">xushi</span>'
        '<span class="hanzi" lang="zh-Hans"><span class="void">虚</span>实</span>'
        f'<span class="run">{about}</span>'
        '<button id="theme" type="button" hidden>light / dark</button></div>'
    )


def key_figures(entries: Sequence[tuple[str, str]]) -> str:
    """A row of large values with their labels; those without a value are left out."""
    items = "".join(
        f'<div class="figure"><b>{escape(value)}</b><span>{escape(label)}</span></div>'
        for value, label in entries
        if value
    )
    return f'<div class="figures">{items}</div>' if items else ""


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


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """A table of HTML cells, or "" without rows. The first `texts` columns are text, the others
    numbers.
    """
    if not rows:
        return ""
    kinds = ["" if column < texts else ' class="n"' for column in range(len(heads))]
    head = "".join(
        f'<th scope="col"{kind}>{escape(text)}</th>'
        for kind, text in zip(kinds, heads, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, row, strict=True))
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide"><table class="rows"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def text_block(text: str, kind: str = "") -> str:
    """Text as a model wrote it: spaces and line breaks are kept, and long lines are wrapped."""
    return f'<p class="text written{" " + kind if kind else ""}" dir="auto">{escape(text)}</p>'


def stage_time(run: "Run", stage: str) -> str:
    """How long a stage took, for its heading."""
    return run.written(f"seconds.{stage}", duration)
