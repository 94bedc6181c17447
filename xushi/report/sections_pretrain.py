"""The report's sections on pretraining: the model, its curves, the router, and compressors on the
same bytes.
"""

import math
import re
from collections.abc import Sequence
from itertools import accumulate

from xushi.report import words
from xushi.report.charts import (
    Axes,
    Bar,
    Reference,
    Series,
    bar_chart,
    frame_top,
    heat_map,
    line_chart,
)
from xushi.report.elements import (
    above_frame,
    fact_grid,
    figure,
    not_finite,
    paragraph,
    section,
    small_figures,
    stage_time,
)
from xushi.report.numbers import count, digits, memory, size
from xushi.report.read import Run
from xushi.report.scales import Point, early_limit, runs, smooth

COMPRESSORS = (
    ("gzip -9", "evaluate.bits_per_byte_gzip"),
    ("zstd -19", "evaluate.bits_per_byte_zstd"),
    ("xz -9", "evaluate.bits_per_byte_xz"),
)
PRIMED = "evaluate.bits_per_byte_xz_primed"
# Shares relative to an even spread; the legend names the ranges between them.
_LOAD_EDGES = (0.05, 0.5, 0.8, 1.25, 2.0, 4.0)
_LOAD_NAMES = (
    "idle (< 0.05)",
    "0.05 – 0.5",
    "0.5 – 0.8",
    "even (0.8 – 1.25)",
    "1.25 – 2",
    "2 – 4",
    "4 and more",
)
_MAXIMAL_LINES = 6


def pretrain_section(run: Run) -> str:
    """The model's size, its loss and held-out curves against tokens, and curves of its health."""
    charts = loss_figure(run) + heldout_figure(run) + _health_figures(run)
    return section(
        "pretrain", "Pretraining", _model_grid(run) + charts, stage_time(run, "pretrain")
    )


def _model_grid(run: Run) -> str:
    mtp = [
        ("for multi-token prediction", run.written("model.parameters_mtp", count)),
        ("last loss of multi-token prediction", run.written("pretrain.mtp_loss", digits)),
    ]
    return fact_grid(
        [
            ("parameters", run.written("model.parameters_total", count)),
            ("of them active for a token", run.written("model.parameters_active", count)),
            *(mtp if run.number("model.parameters_mtp") else []),
            ("tokens seen", run.written("pretrain.tokens", count)),
            ("passes over the text", run.written("pretrain.epochs", digits)),
            ("optimizer steps", run.written("pretrain.steps", count)),
            ("tokens a second", run.written("pretrain.tokens_per_second", count)),
            ("last loss, nats a token", run.written("pretrain.loss", digits)),
            ("cache for a token", run.written("model.kv_cache_bytes_per_token", memory)),
        ]
    )


def loss_figure(run: Run) -> str:
    """Training loss (steps faint, running mean strong) and the loss of multi-token prediction."""
    points, x_label = _against_tokens(run, run.series("pretrain", "loss"))
    mtp, _ = _against_tokens(run, run.series("pretrain", "mtp_loss"))
    means = smooth(points)
    if not runs(means):
        return ""
    limit = early_limit(points, means)
    lines = [Series("", points, 0, faint=True), Series("next token", means, 0)]
    if any(y for _, y in mtp):  # all zero without MTP layers
        lines.append(Series("one further (MTP)", smooth(mtp), 2))
    axes = Axes("Training loss", x_label, "nats per token", height=260, y_limit=limit)
    caption = "Pale: each step. Strong: the mean over 2\u202f% of the steps around it."
    caption += above_frame(points, frame_top(lines, axes)) + not_finite(points)
    return figure(line_chart(lines, axes), caption, "Training loss")


def heldout_figure(run: Run) -> str:
    """Held-out bits per byte with the compressors as horizontal lines."""
    points, x_label = _against_tokens(run, run.series("pretrain", "heldout_bits_per_byte"))
    levels = [
        Reference(name, value)
        for name, key in (*COMPRESSORS, ("xz -9, primed", PRIMED))
        if (value := run.number(key)) is not None
    ]
    finite = [y for stretch in runs(points) for _, y in stretch]
    if not finite:
        return ""
    top = max([level.value for level in levels], default=math.inf) * 1.5
    limit = max(top, min(finite) * 1.2)
    label = "bits per byte of held-out text"
    lines = [Series("the model", points, 0, dots=len(points) <= 80)]
    axes = Axes("Held-out bits per byte", x_label, label, height=260, y_limit=limit)
    caption = "Measured on a sample of the held-out text."
    if levels:
        caption += " Dashed: what compressors need for all of it."
    caption += above_frame(points, frame_top(lines, axes, levels)) + not_finite(points)
    return figure(line_chart(lines, axes, levels), caption, "Held-out text")


def compression_section(run: Run) -> str:
    """Bits per byte of the model and of every compressor, the best last, and the yardstick in
    words.
    """
    if run.number("evaluate.bits_per_byte") is None:
        return ""
    measured = [("this model", "evaluate.bits_per_byte", 0)]
    measured += [(name, key, 5) for name, key in COMPRESSORS]
    measured.append(("xz -9 after the training text", PRIMED, 1))
    bars = [
        Bar(name, value, tone=tone)
        for name, key, tone in measured
        if (value := run.number(key)) is not None
    ]
    bars.sort(key=lambda bar: -bar.value)
    chart = bar_chart(bars, title="Bits per byte beside compressors")
    return section(
        "bits",
        "How well it knows the text",
        paragraph(words.yardstick(run)) + figure(chart, _compression_caption(run)),
    )


def _compression_caption(run: Run) -> str:
    heldout = run.written("data.heldout_bytes", size)
    primed = run.written("evaluate.xz_primed_training_bytes", size)
    return (
        "Bits per byte on the same "
        + (f"{heldout} of held-out text" if heldout else "held-out text")
        + "; fewer is better. Compressed sizes are whole files with their headers. The compressors "
        "carry no trained weights and start from nothing"
        + (f", but one was given {primed} of the training text first." if primed else ".")
    )


def router_section(run: Run) -> str:
    """Which experts the tokens went to, layer by layer."""
    names = run.names("pretrain")
    layers = sorted(
        {int(match[1]) for name in names if (match := re.fullmatch(r"router\.(\d+)\..+", name))}
    )
    maps = [_layer_figure(run, layer, names) for layer in layers]
    lines = _violation_figure(run, layers)
    if not any(maps) and not lines:
        return ""
    opening = (
        "Every token chooses a few experts in each mixture-of-experts layer. A bias that follows "
        "the load is meant to keep them evenly busy. A quiet picture is a healthy router."
    )
    return section(
        "router",
        "The router",
        paragraph(opening) + (_load_legend() if any(maps) else "") + small_figures(maps) + lines,
    )


def _load_legend() -> str:
    items = "".join(
        f'<li><i class="h{level}"></i>{name.replace("<", "&lt;")}</li>'
        for level, name in enumerate(_LOAD_NAMES)
    )
    return f'<ul class="legend"><li>an expert\'s share of an even spread:</li>{items}</ul>'


def _layer_figure(run: Run, layer: int, names: Sequence[str]) -> str:
    pattern = re.compile(rf"router\.{layer}\.load\.(\d+)")
    experts = sorted(int(match[1]) for name in names if (match := pattern.fullmatch(name)))
    loads = [run.series("pretrain", f"router.{layer}.load.{expert}") for expert in experts]
    points, x_label = _against_tokens(run, max(loads, key=len, default=[]))
    if not points:
        return ""
    if x_label == "step":
        ends = (f"step {points[0][0]:.0f}", f"step {points[-1][0]:.0f}")
    else:
        ends = (count(points[0][0]), f"{count(points[-1][0])} {x_label}")
    chart = heat_map(
        [[share * len(experts) for _, share in load] for load in loads],
        edges=_LOAD_EDGES,
        title=f"Load of each expert of layer {layer} over time",
        x_ends=ends,
        label=f"layer {layer}, its {len(experts)} experts from top to bottom",
    )
    return figure(chart, " ".join([*_violation(run, layer), *_dead(run, layer)]))


def _violation(run: Run, layer: int) -> list[str]:
    values = _finite(run, f"router.{layer}.max_violation")
    if not values:
        return []
    return [
        f"The busiest expert ends {100 * values[-1]:.0f}\u202f% above an even share "
        f"(at worst {100 * max(values):.0f}\u202f%)."
    ]


def _dead(run: Run, layer: int) -> list[str]:
    values = _finite(run, f"router.{layer}.dead_experts")
    if not values:
        return []
    worst = f" (at worst {count(max(values))})" if max(values) > values[-1] else ""
    return [f"Dead experts at the end: {count(values[-1])}{worst}."]


def _finite(run: Run, name: str) -> list[float]:
    return [y for stretch in runs(run.series("pretrain", name)) for _, y in stretch]


def _violation_figure(run: Run, layers: Sequence[int]) -> str:
    label = "maximal violation: the busiest expert's load over an even share, minus one"
    curves = {
        layer: _against_tokens(run, run.series("pretrain", f"router.{layer}.max_violation"))
        for layer in layers
    }
    x_label = next((label for points, label in curves.values() if points), "")
    if len(layers) <= _MAXIMAL_LINES:
        series = [
            Series(f"layer {layer}", smooth(points), i)
            for i, (layer, (points, _)) in enumerate(curves.items())
        ]
    else:
        worst: dict[float, float] = {}
        for points, _ in curves.values():
            for x, y in points:
                worst[x] = max(worst.get(x, -math.inf), y)
        series = [Series("worst layer", smooth(sorted(worst.items())), 1)]
    axes = Axes("Maximal violation", x_label, label, height=170, y_lowest=0.0)
    caption = not_finite([point for points, _ in curves.values() for point in points])
    return figure(line_chart(series, axes), caption.strip(), heading="How far from even")


def _health_figures(run: Run) -> str:
    wanted = (
        ("learning_rate", "learning rate", 3),
        ("gradient_norm", "gradient norm before clipping", 1),
        ("tokens_per_second", "tokens per second", 2),
        ("balance_loss", "balance loss", 4),
    )
    charts = []
    for name, label, tone in wanted:
        points, x_label = _against_tokens(run, run.series("pretrain", name))
        axes = Axes(label, x_label, label, height=110, y_lowest=0.0)
        chart = line_chart([Series("", points, tone)], axes)
        charts.append(figure(chart, not_finite(points).strip()))
    return small_figures(charts)


def _against_tokens(run: Run, points: list[Point]) -> tuple[list[Point], str]:
    """A curve over target tokens, as each step recorded how many it had, with the axis's label;
    over steps if a step did not record them.
    """
    recorded = dict(run.series("pretrain", "target_tokens"))
    last = int(max((step for step, _ in points), default=0))
    tokens = [recorded.get(step, math.nan) for step in range(min(last, len(recorded)) + 1)]
    tokens[0] = 0.0
    seen = list(accumulate(tokens))
    if last >= len(seen) or not math.isfinite(seen[last]):
        return points, "step"
    return [(seen[int(step)], y) for step, y in points], "target tokens"
