"""The report's sections on pretraining: the model, its curves, the router, and compressors on the
same bytes.
"""

import math
import re
from collections.abc import Callable, Sequence

from xushi.report import words
from xushi.report.charts import Bar, Reference, Series, bar_chart, heat_map, line_chart
from xushi.report.elements import facts, figure, paragraph, section, stage_time
from xushi.report.numbers import count, digits, memory, size
from xushi.report.read import Run
from xushi.report.scales import Point, runs, smooth

YARDSTICKS = (
    ("gzip -9", "evaluate.bits_per_byte_gzip"),
    ("zstd -19", "evaluate.bits_per_byte_zstd"),
    ("xz -9", "evaluate.bits_per_byte_xz"),
)
PRIMED = ("xz -9 after the training text", "evaluate.bits_per_byte_xz_primed")
# Shares relative to an even spread; the legend names the spans between them.
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
_LINES_APART = 6


def pretrain_section(run: Run) -> str:
    """The model's size, loss and held-out curves against tokens, and the smaller health curves."""
    mtp = [("for multi-token prediction", _written(run, "model.parameters_mtp"))]
    model = facts(
        [
            ("parameters", _written(run, "model.parameters_total")),
            ("of them active for a token", _written(run, "model.parameters_active")),
            *(mtp if run.number("model.parameters_mtp") else []),
            ("tokens seen", _written(run, "pretrain.tokens")),
            ("optimizer steps", _written(run, "pretrain.steps")),
            ("tokens a second", _written(run, "pretrain.tokens_per_second")),
            ("last loss, nats a token", _written(run, "pretrain.loss", digits)),
            ("latent cache for a token", _written(run, "model.kv_cache_bytes_per_token", memory)),
        ]
    )
    charts = loss_figure(run) + heldout_figure(run) + _health_figures(run)
    return section("pretrain", "Pretraining", model + charts, stage_time(run, "pretrain"))


def loss_figure(run: Run) -> str:
    """Training loss (each step faint, running mean strong) and the loss of multi-token prediction."""
    points, x_label = _against_tokens(run, run.series("pretrain", "loss"))
    ahead, _ = _against_tokens(run, run.series("pretrain", "mtp_loss"))
    means = [y for stretch in runs(smooth(points)) for _, y in stretch]
    if not means:
        return ""
    # The fall of the first steps would press the rest of the curve flat against the axis.
    early = means[min(len(means) - 1, len(means) // 25)]
    highest = max(y for stretch in runs(points) for _, y in stretch)
    limit = early * 1.05 if highest > 1.3 * early else math.inf
    lines = [Series("", points, 0, faint=True), Series("next token", smooth(points), 0)]
    if any(y for _, y in ahead):  # all zero without MTP layers
        lines.append(Series("one further (MTP)", smooth(ahead), 2))
    chart = line_chart(
        lines,
        title="Training loss",
        x_label=x_label,
        y_label="nats per token",
        y_limit=limit,
        height=260,
    )
    caption = "Pale: each step. Strong: the mean over 2\u202f% of the steps around it."
    if limit < math.inf:
        caption += f" The first steps start at {digits(highest)}, above the frame."
    return figure(chart, caption + _broken(points), "Training loss")


def heldout_figure(run: Run) -> str:
    """Held-out bits per byte with the compressors as horizontal lines."""
    points, x_label = _against_tokens(run, run.series("pretrain", "heldout_bits_per_byte"))
    lines = [
        Reference(name, value)
        for name, key in (*YARDSTICKS, ("xz -9, primed", PRIMED[1]))
        if (value := run.number(key)) is not None
    ]
    finite = [y for stretch in runs(points) for _, y in stretch]
    if not finite:
        return ""
    top = max([line.value for line in lines], default=math.inf) * 1.5
    limit = max(top, min(finite) * 1.2)
    chart = line_chart(
        [Series("the model", points, 0, dots=len(points) <= 80)],
        title="Held-out bits per byte",
        x_label=x_label,
        y_label="bits per byte of held-out text",
        references=lines,
        y_limit=limit,
        height=260,
    )
    caption = "Dashed: what compressors need for the same bytes." if lines else ""
    if max(finite) > limit:
        caption += f" The first measurement, {digits(max(finite))}, lies above the frame."
    return figure(chart, caption + _broken(points), "Text it never saw")


def compression_section(run: Run) -> str:
    """Bits per byte of the model and of every compressor, fewest last, and the honest yardstick in
    words.
    """
    model = run.number("evaluate.bits_per_byte")
    if model is None:
        return ""
    bars = [Bar("this model", model, tone=0)]
    bars += [
        Bar(name, value, tone=5)
        for name, key in YARDSTICKS
        if (value := run.number(key)) is not None
    ]
    if (primed := run.number(PRIMED[1])) is not None:
        bars.append(Bar(PRIMED[0], primed, tone=1))
    bars.sort(key=lambda bar: -bar.value)
    heldout = run.number("data.heldout_bytes")
    where = (
        f"the same {size(heldout)} of held-out text"
        if heldout is not None
        else "the same held-out text"
    )
    chart = bar_chart(bars, title="Bits per byte beside compressors")
    return section(
        "bits",
        "How well it knows the text",
        paragraph(words.yardstick(run))
        + figure(
            chart,
            f"Bits per byte on {where}; fewer is better. Compressed sizes are whole files with "
            "their headers. The "
            "compressors carry no trained weights, and except for the primed one they start from "
            "nothing.",
        ),
    )


def router_section(run: Run) -> str:
    """Which experts the tokens went to, layer by layer."""
    names = run.names("pretrain")
    layers = sorted(
        {int(match[1]) for name in names if (match := re.fullmatch(r"router\.(\d+)\..+", name))}
    )
    maps = "".join(_layer_figure(run, layer, names) for layer in layers)
    lines = _violation_figure(run, layers)
    if not maps and not lines:
        return ""
    legend = "".join(
        f'<li><i class="h{level}"></i>{name.replace("<", "&lt;")}</li>'
        for level, name in enumerate(_LOAD_NAMES)
    )
    return section(
        "router",
        "The router",
        paragraph(
            "Every token chooses a few experts in each mixture-of-experts layer. A bias that "
            "follows the load is meant to "
            "keep them evenly busy: a quiet picture is a healthy router."
        )
        + (
            f'<ul class="legend"><li>an expert\'s share of an even spread:</li>{legend}</ul>'
            if maps
            else ""
        )
        + f'<div class="small">{maps}</div>'
        + lines,
    )


def _layer_figure(run: Run, layer: int, names: Sequence[str]) -> str:
    pattern = re.compile(rf"router\.{layer}\.load\.(\d+)")
    experts = sorted(int(match[1]) for name in names if (match := pattern.fullmatch(name)))
    loads = [run.series("pretrain", f"router.{layer}.load.{expert}") for expert in experts]
    points, label = _against_tokens(run, max(loads, key=len, default=[]))
    if not points:
        return ""
    ends = (
        count(points[0][0]),
        f"{count(points[-1][0])} tokens" if label == "tokens" else f"step {points[-1][0]:.0f}",
    )
    chart = heat_map(
        [[share * len(experts) for _, share in load] for load in loads],
        edges=_LOAD_EDGES,
        title=f"Load of each expert of layer {layer} over time",
        x_ends=ends,
        label=f"layer {layer}, its {len(experts)} experts from top to bottom",
    )
    said = []
    violation = [
        y
        for stretch in runs(run.series("pretrain", f"router.{layer}.max_violation"))
        for _, y in stretch
    ]
    if violation:
        said.append(
            f"The busiest expert ends {100 * violation[-1]:.0f}\u202f% above an even share "
            f"(at worst {100 * max(violation):.0f}\u202f%)."
        )
    dead = [
        y
        for stretch in runs(run.series("pretrain", f"router.{layer}.dead_experts"))
        for _, y in stretch
    ]
    if dead:
        said.append(
            f"Dead experts at the end: {count(dead[-1])}"
            + (f" (at worst {count(max(dead))})." if max(dead) > dead[-1] else ".")
        )
    return figure(chart, " ".join(said))


def _violation_figure(run: Run, layers: Sequence[int]) -> str:
    curves = {
        layer: _against_tokens(run, run.series("pretrain", f"router.{layer}.max_violation"))
        for layer in layers
    }
    x_label = next((label for points, label in curves.values() if points), "")
    if len(layers) <= _LINES_APART:
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
    return figure(
        line_chart(
            series,
            title="Maximal violation",
            x_label=x_label,
            height=170,
            y_floor=0.0,
            y_label="maximal violation: the busiest expert's load over an even share, minus one",
        ),
        heading="How far from even",
    )


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
        charts.append(
            figure(
                line_chart(
                    [Series("", points, tone)],
                    title=label,
                    x_label=x_label,
                    y_label=label,
                    height=110,
                    y_floor=0.0,
                )
            )
        )
    body = "".join(charts)
    return f'<div class="small">{body}</div>' if body else ""


def _against_tokens(run: Run, points: list[Point]) -> tuple[list[Point], str]:
    steps, tokens = run.number("pretrain.steps"), run.number("pretrain.tokens")
    if not steps or not tokens:
        return points, "step"
    return [(step * tokens / steps, y) for step, y in points], "tokens"


def _broken(points: Sequence[Point]) -> str:
    broken = sum(not math.isfinite(y) for _, y in points)
    return (
        f" {count(broken)} of {count(len(points))} values were not finite and leave gaps."
        if broken
        else ""
    )


def _written(run: Run, key: str, write: Callable[[float], str] = count) -> str:
    value = run.number(key)
    return "" if value is None else write(value)
