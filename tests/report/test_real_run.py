"""The page of the miniature run, fact by fact: every number, curve, bar and sample that it shows is
read back from the HTML and compared with what the run recorded.
"""

import itertools
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from xushi.base.tracking import Tracking
from xushi.report import page, write_report
from xushi.report.read import Run, open_run
from xushi.report.scales import Point
from xushi.run.stages import STAGES

from ..miniature import Chain
from .page_tree import Node, parse, section_ids
from .recorded import (
    COMPLETION_FIELDS,
    METRICS,
    NUMBERS_ONLY,
    SAMPLE_FIELDS,
    SHOWN,
    key_pattern,
    metric_pattern,
    plain,
)

SCALES = {
    "": 1.0,
    **{"s": 1.0, "%": 0.01, "B": 1.0, "k": 1e3, "M": 1e6, "G": 1e9},
    **{"kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30},
}
GRID = {  # term of a grid of facts: key
    "text": "data.bytes",
    "documents": "data.documents",
    "tokens to train on": "data.train_tokens",
    "vocabulary": "tokenizer.vocab_size",
    "bytes in a token": "tokenizer.bytes_per_token",
    "parameters": "model.parameters_total",
    "of them active for a token": "model.parameters_active",
    "for multi-token prediction": "model.parameters_mtp",
    "last loss of multi-token prediction": "pretrain.mtp_loss",
    "tokens seen": "pretrain.tokens",
    "passes over the text": "pretrain.epochs",
    "optimizer steps": "pretrain.steps",
    "tokens a second": "pretrain.tokens_per_second",
    "last loss, nats a token": "pretrain.loss",
    "cache for a token": "model.kv_cache_bytes_per_token",
    "cores": "machine.cores",
    "threads used": "machine.threads",
    "memory": "machine.memory_bytes",
    "peak memory of the run": "memory.peak_bytes",
    "peak memory of a subprocess": "memory.peak_children_bytes",
    "seed": "run.seed",
}
TEXT_GRID = {
    "processor": "machine.cpu",
    "device": "machine.device",
    "number format": "machine.dtype",
    "op forms": "machine.op_forms",
    "system": "machine.system",
    "PyTorch": "machine.torch",
    "Python": "machine.python",
    "xushi": "run.version",
}
COMPRESSORS = {
    "this model": "evaluate.bits_per_byte",
    "gzip -9": "evaluate.bits_per_byte_gzip",
    "zstd -19": "evaluate.bits_per_byte_zstd",
    "xz -9": "evaluate.bits_per_byte_xz",
    "xz -9 after the training text": "evaluate.bits_per_byte_xz_primed",
}
CURVES = {  # name of a plot: stage, metric
    "learning rate": ("pretrain", "learning_rate"),
    "gradient norm before clipping": ("pretrain", "gradient_norm"),
    "tokens per second": ("pretrain", "tokens_per_second"),
    "balance loss": ("pretrain", "balance_loss"),
    "sft: loss, nats per token": ("sft", "loss"),
    "rl: mean reward": ("rl", "reward"),
    "rl: tokens in an answer": ("rl", "length"),
    "rl: entropy, nats": ("rl", "entropy"),
    "rl: share of answers cut off": ("rl", "truncated"),
    "rl: share of tasks answered both right and wrong": ("rl", "with_signal"),
    "rl: log-probability of a token, trainer against sampler": ("rl", "logprob_difference"),
    "rl: loss": ("rl", "loss"),
}


@dataclass
class Shown:
    """The page of a run, beside what the run recorded."""

    directory: Path
    page: Node
    results: dict[str, Any]
    samples: dict[str, list[dict[str, Any]]]
    series: Callable[[str, str], list[tuple[int, float]]]
    tracking: Tracking

    def section(self, name: str) -> Node:
        return self.page.one("section", id=name)


@pytest.fixture(scope="module")
def shown(chain: Chain) -> Any:
    written = (chain.directory / "report.html").read_text(encoding="utf-8")
    tracking = Tracking(chain.directory / "tracking.sqlite")
    samples = json.loads((chain.directory / "samples.json").read_text(encoding="utf-8"))
    yield Shown(chain.directory, parse(written), chain.results, samples, tracking.series, tracking)
    tracking.close()


def read(text: str) -> tuple[float, float]:
    """A number as the page writes it, and half a unit of its last digit."""
    text = plain(text).replace("−", "-")
    if match := re.fullmatch(r"(\d+) min (\d\d) s", text):
        return 60.0 * int(match[1]) + int(match[2]), 0.5
    if match := re.fullmatch(r"(\d+) h (\d\d) min", text):
        return 3600.0 * int(match[1]) + 60.0 * int(match[2]), 30.0
    match = re.fullmatch(
        r"(-?\d{1,3}(?: \d{3})*|-?\d+)(?:\.(\d+))?(?:e(-?\d+))? ?([A-Za-z%]*)", text
    )
    assert match is not None, text
    scale = SCALES[match[4]] * 10.0 ** int(match[3] or 0)
    number = float(match[1].replace(" ", "") + "." + (match[2] or "0"))
    return number * scale, 0.5 * 10.0 ** -len(match[2] or "") * scale


def says(text: str, value: float) -> bool:
    """Whether the text is the value, rounded."""
    number, half = read(text)
    return abs(number - value) <= half * (1 + 1e-9) + 1e-12


def test_reading_numbers_back() -> None:
    assert says("4.51\u202fM", 4.505e6) and not says("4.51\u202fM", 4.5e6)
    assert says("1\u202f249", 1249) and says("99.5\u202f%", 0.995) and says("2.86e−6", 2.861e-6)
    assert says("6\u202fmin 37\u202fs", 396.7) and not says("6\u202fmin 37\u202fs", 398)


def test_every_key_is_shown_or_listed_as_a_number_only(chain: Chain) -> None:
    """A new key of results.json fails here until it is put on the page or into `NUMBERS_ONLY`."""
    assert not SHOWN & NUMBERS_ONLY
    assert {key_pattern(key) for key in chain.results} == SHOWN | NUMBERS_ONLY


def test_hand_made_runs_hold_only_what_a_run_writes(shown: Shown) -> None:
    for stage, names in METRICS.items():
        written = {metric_pattern(name) for name in shown.tracking.names(stage)}
        assert names <= written, names - written
    for name, entries in shown.samples.items():
        fields = COMPLETION_FIELDS if name == "base" else SAMPLE_FIELDS
        assert entries and all(set(entry) == fields for entry in entries)
    assert set(shown.samples) == {"before", "after", "base"}


class _Kept:
    """A tracking store read once, since the page is made a few hundred times below."""

    def __init__(self, tracking: Tracking) -> None:
        names = {stage: tracking.names(stage) for stage in ("pretrain", "sft", "rl")}
        kept = {
            (stage, name): tracking.series(stage, name) for stage in names for name in names[stage]
        }
        events = {name: tracking.events(name=name) for name in (None, "started")}
        self.names = names.__getitem__
        self.series = lambda stage, name: kept.get((stage, name), [])
        self.events = lambda name=None: events[name]


def _without_numbers(run: Run) -> str:
    start, _, rest = page.page_of(run).partition('<section id="numbers">')
    return start + rest.partition("</section>")[2]


def test_changing_a_key_changes_the_page_exactly_if_it_is_shown(chain: Chain) -> None:
    with open_run(chain.directory) as run:
        assert run.tracking is not None
        run = replace(run, tracking=_Kept(run.tracking))  # type: ignore[arg-type]
        before = _without_numbers(run)
        for key, value in run.results.items():
            other: Any = f"{value}x" if isinstance(value, str) else value * 1.5 + 1
            other = "tails" if key == "data.heldout_rule" else other
            after = _without_numbers(replace(run, results=run.results | {key: other}))
            assert (after != before) == (key_pattern(key) in SHOWN), key


def test_any_group_of_keys_may_be_missing(chain: Chain) -> None:
    with open_run(chain.directory) as run:
        for group in {key.partition(".")[0] for key in run.results}:
            kept = {key: v for key, v in run.results.items() if not key.startswith(f"{group}.")}
            assert "numbers" in section_ids(parse(page.page_of(replace(run, results=kept))))


def test_the_page_is_that_of_its_directory_and_holds_every_section(shown: Shown) -> None:
    written = (shown.directory / "report.html").read_bytes()
    assert write_report(shown.directory).read_bytes() == written
    assert section_ids(shown.page) == [
        *("story", "data", "pretrain", "router", "bits", "sft", "rl", "samples", "base"),
        *("machine", "recipe", "numbers"),
    ]


def test_the_headline_and_the_sentences_below(shown: Shown) -> None:
    results = shown.results
    model = results["evaluate.bits_per_byte"]
    xz = results["evaluate.bits_per_byte_xz"]
    match = re.fullmatch(
        r"In (.+) on one CPU thread, raw text became a reasoning model: it (.+) on (?:text it "
        r"never saw|held-out text \((.+) of it stands in the training text too\)) and answers (.+) of unseen tasks right\.",
        plain(shown.page.one("h1").text),
    )
    assert match is not None
    assert says(match[1], results["seconds.total"])
    assert (match[3] is None) == (results["data.heldout_overlap"] < 0.01)
    assert match[3] is None or says(match[3], results["data.heldout_overlap"])
    assert says(match[4], results["rl.greedy_after"])
    if abs(model - xz) < 0.01:
        assert match[2].startswith("is level with xz -9 (")
    elif model < xz:
        assert says(match[2].removeprefix("beats xz -9 by "), 1 - model / xz)
    else:
        more = match[2].removeprefix("needs ").removesuffix(" more bits than xz -9")
        assert says(more, model / xz - 1)
    change, yardstick = (plain(node.text) for node in shown.page.all("p", "lede"))
    match = re.fullmatch(
        r"Reinforcement learning took the model from (.+ %) to (.+ %) of unseen tasks right; made "
        r"to think, the model before it was already right on (.+ %) of them, so it .+\.",
        change,
    )
    assert match is not None
    keys = ("greedy_before", "greedy_after", "forced_before")
    for text, key in zip(match.groups(), keys, strict=True):
        assert says(text, results[f"rl.{key}"]), key
    primed = results["evaluate.bits_per_byte_xz_primed"]
    match = re.search(r"first: (.+) bits per byte\. .+ it needs (.+) more\.$", yardstick)
    assert match is not None
    assert says(match[1], primed) and says(match[2], model / primed - 1)


def test_the_figures_of_the_header(shown: Shown) -> None:
    figures = {
        node.one("span").text: plain(node.one("b").text) for node in shown.page.all("div", "figure")
    }
    rates = figures.pop("greedy accuracy, before and after RL").split(" → ")
    for text, when in zip(rates, ("before", "after"), strict=True):
        assert says(text, shown.results[f"rl.greedy_{when}"])
    parameters = next(label for label in figures if label.startswith("parameters, "))
    active = parameters.removeprefix("parameters, ").removesuffix(" active for a token")
    assert says(active, shown.results["model.parameters_active"])
    keys = {
        parameters: "model.parameters_total",
        "bits per byte, held-out": "evaluate.bits_per_byte",
        "tokens of pretraining": "pretrain.tokens",
        "from raw text to here": "seconds.total",
        "of memory at the peak": "memory.peak_bytes",
    }
    assert set(figures) == set(keys)
    assert all(says(text, shown.results[keys[label]]) for label, text in figures.items())


def test_name_day_and_footer(shown: Shown) -> None:
    results = shown.results
    began = datetime.fromtimestamp(shown.tracking.events()[0]["time"], UTC)
    header = shown.page.one("div", "kicker").text
    assert f"{results['run.name']} · {began:%Y-%m-%d}" in header
    assert shown.page.one("head").one("title").text == f"{results['run.name']} · xushi 虚实"
    assert shown.page.one("footer").text == (
        f"xushi {results['run.version']} · recipe {results['run.recipe_hash']} · "
        f"seed {results['run.seed']}"
    )


def test_the_story_tells_of_every_stage_with_its_facts_time_and_share(shown: Shown) -> None:
    results = shown.results
    story = shown.section("story")
    seconds = {
        key.removeprefix("seconds."): value
        for key, value in results.items()
        if key.startswith("seconds.") and key not in ("seconds.total", "seconds.this_start")
    }
    started = [event["stage"] for event in shown.tracking.events(name="started")]
    assert sorted(started) == sorted(seconds)
    stages = {stage.name: stage for stage in STAGES}
    rows = story.all("li")
    assert [row.one("b").text for row in rows] == [stages[name].title for name in started]
    for name, row in zip(started, rows, strict=True):
        assert says(row.one("span", "time").text, seconds[name]), name
        share = float(row.one("i").attributes["style"].removeprefix("width:").removesuffix("%"))
        assert share == pytest.approx(100 * seconds[name] / sum(seconds.values()), abs=0.006)
        assert row.one("a").attributes["href"] == f"#{stages[name].section}"
        text = plain(row.one("span", "did").text)
        pattern = ", ".join(
            re.escape(fact.pattern).replace(r"\{\}", "(.+?)") for fact in stages[name].facts
        )
        match = re.fullmatch(pattern, text, re.IGNORECASE)
        assert match is not None and not text[0].islower(), (name, text)
        for number, fact in zip(match.groups(), stages[name].facts, strict=True):
            assert says(number, results[fact.key]), fact
    whole = story.one("small").text.removesuffix(" in all")
    assert says(whole, results["seconds.total"])


def test_every_grid_of_facts(shown: Shown) -> None:
    grids = {
        plain(pair.one("dt").text): plain(pair.one("dd").text)
        for grid in shown.page.all("dl", "facts")
        for pair in grid.all("div")
    }
    size, share = grids.pop("held out").removesuffix(")").split(" (")
    assert says(size, shown.results["data.heldout_bytes"])
    assert says(share, shown.results["data.heldout_fraction"])
    assert set(grids) == {*GRID, *TEXT_GRID}
    for term, key in GRID.items():
        assert says(grids[term], shown.results[key]), term
    for term, key in TEXT_GRID.items():
        assert grids[term] == shown.results[key] != "", term


def test_the_text_names_what_is_held_out_and_its_hash(shown: Shown) -> None:
    text = shown.section("data").text
    groups = shown.results["data.heldout_groups_named"]
    assert groups and f"held out whole: {groups}." in text
    assert len(groups.split(", ")) == shown.results["data.heldout_groups"]
    shared = re.search(r"\.(\d[\d.]* %) of the held-out text stands in the training", plain(text))
    assert shared is not None and says(shared[1], shown.results["data.heldout_overlap"])
    assert f"SHA-256 {shown.results['data.sha256']}" in text


def test_sections_of_stages_bear_their_times(shown: Shown) -> None:
    for name in ("data", "pretrain", "sft", "rl"):
        small = shown.section(name).one("h2").one("small").text
        assert says(small, shown.results[f"seconds.{name}"]), name


# Curves


def _lines(plot: Node) -> list[tuple[Node, list[Point]]]:
    """The lines of a plot, in the units of its axes."""
    x0, x1 = (float(end) for end in plot.attributes["data-x"].split())
    y0, y1 = (float(end) for end in plot.attributes["data-y"].split())
    height = float(plot.attributes["height"])
    lines = []
    for path in plot.all("path", "line"):
        places = re.findall(r"(-?[\d.]+),(-?[\d.]+)", path.attributes["d"])
        points = [
            (x0 + float(x) / 1000 * (x1 - x0), y0 + (1 - float(y) / height) * (y1 - y0))
            for x, y in places
        ]
        lines.append((path, points))
    return lines


def _plot(shown: Shown, name: str) -> Node:
    return shown.page.one("svg", "plot", **{"aria-label": name})


def _check_line(plot: Node, points: list[Point], expected: list[Point]) -> None:
    """Equal but for the tenth of a pixel to which the page rounds."""
    x0, x1 = (float(end) for end in plot.attributes["data-x"].split())
    y0, y1 = (float(end) for end in plot.attributes["data-y"].split())
    x_half = 0.051 * (x1 - x0) / 1000
    y_half = 0.051 * (y1 - y0) / float(plot.attributes["height"])
    assert len(points) == len(expected) > 1
    for (x, y), (x_expected, y_expected) in zip(points, expected, strict=True):
        assert abs(x - x_expected) <= x_half + 1e-9 * abs(x1)
        assert abs(y - y_expected) <= y_half + 1e-9 * abs(y1)


def _over_tokens(shown: Shown, name: str) -> list[Point]:
    """A metric of pretraining over the target tokens of all steps up to each."""
    targets = dict(shown.series("pretrain", "target_tokens"))
    seen = {step: sum(targets[i] for i in range(1, step + 1)) for step in targets}
    return [(seen[step], value) for step, value in shown.series("pretrain", name)]


def _mean(points: list[Point], share: float) -> list[Point]:
    reach = round(len(points) * share / 2)
    values = [y for _, y in points]
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [(x, sum(part) / len(part)) for (x, _), part in zip(points, windows, strict=True)]


def test_there_is_a_plot_of_each_metric_and_no_other(shown: Shown) -> None:
    names = [plot.attributes["aria-label"] for plot in shown.page.all("svg", "plot")]
    others = ["Training loss", "Held-out bits per byte", "Maximal violation"]
    assert sorted(names) == sorted([*others, *CURVES])


@pytest.mark.parametrize("name", CURVES)
def test_the_smaller_curves(shown: Shown, name: str) -> None:
    stage, metric = CURVES[name]
    plot = _plot(shown, name)
    expected: list[Point] = [(float(step), y) for step, y in shown.series(stage, metric)]
    if stage == "pretrain":
        expected = _over_tokens(shown, metric)
    label = "target tokens" if stage == "pretrain" else "step"
    assert plot.attributes["data-name"] == label
    lines = _lines(plot)
    _check_line(plot, lines[0][1], expected)
    assert len(lines) == (2 if stage == "sft" else 1)  # the longer ones have a running mean
    if len(lines) == 2:
        assert "faint" in lines[0][0].classes
        _check_line(plot, lines[1][1], _mean(expected, 0.05))
    assert lines[-1][0].attributes["data-label"] == name.removeprefix(f"{stage}: ")


def test_the_training_loss(shown: Shown) -> None:
    plot = _plot(shown, "Training loss")
    loss = _over_tokens(shown, "loss")
    lines = _lines(plot)
    assert [path.attributes.get("data-label") for path, _ in lines] == [
        None,
        "next token",
        "one further (MTP)",
    ]
    _check_line(plot, lines[0][1], loss)
    _check_line(plot, lines[1][1], _mean(loss, 0.02))
    _check_line(plot, lines[2][1], _mean(_over_tokens(shown, "mtp_loss"), 0.02))
    figures = shown.section("pretrain").all("figure")
    caption = plain(next(node.text for node in figures if plot in node.all()))
    above = re.search(r"The first values, up to (\S+), lie above the frame", caption)
    top = float(plot.attributes["data-y"].split()[1])
    highest = max(y for _, y in loss)
    assert (above is not None) == (highest > top)
    assert above is None or says(above[1], highest)


def test_the_held_out_curve_and_its_dashed_lines(shown: Shown) -> None:
    plot = _plot(shown, "Held-out bits per byte")
    measured = _over_tokens(shown, "heldout_bits_per_byte")
    assert len(measured) == 7  # every thirty steps of two hundred, and after the last
    _check_line(plot, _lines(plot)[0][1], measured)
    y0, y1 = (float(end) for end in plot.attributes["data-y"].split())
    dashed = sorted(
        y0 + (1 - float(line.attributes["y1"]) / 260) * (y1 - y0)
        for line in plot.all("line", "reference")
    )
    keys = [key for name, key in COMPRESSORS.items() if name != "this model"]
    values = sorted(shown.results[key] for key in keys)
    assert dashed == pytest.approx(values, abs=0.051 * (y1 - y0) / 260)
    # From top to bottom the names stand in the order of their values.
    names = [node.text for node in plot.all("text", "name") if "reference" in node.classes]
    short = {"xz -9, primed": "xz -9 after the training text"}
    order = [shown.results[COMPRESSORS[short.get(name, name)]] for name in names]
    assert len(order) == 4 and order == sorted(order, reverse=True)


# The router


def test_the_heat_maps_hold_each_expert_s_share_over_time(shown: Shown) -> None:
    edges = (0.05, 0.5, 0.8, 1.25, 2.0, 4.0)
    maps = shown.section("router").all("svg", "heat")
    assert len(maps) == 2
    for layer, chart in zip((1, 2), maps, strict=True):
        drawn: dict[tuple[int, int], int] = {}
        for path in chart.all("path"):
            for x, y, width in re.findall(r"M(\d+),(\d+)h(\d+)v1", path.attributes["d"]):
                for column in range(int(x), int(x) + int(width)):
                    assert (int(y), column) not in drawn
                    drawn[int(y), column] = int(path.classes[0].removeprefix("h"))
        expected = {}
        for expert in range(8):
            load = [y for _, y in shown.series("pretrain", f"router.{layer}.load.{expert}")]
            for column in range(90):
                part = load[len(load) * column // 90 : len(load) * (column + 1) // 90]
                share = 8 * math.fsum(part) / len(part)
                expected[expert, column] = sum(share >= edge for edge in edges)
        assert drawn == expected
        ends = [node.text for node in chart.all("text")[2:]]
        tokens = _over_tokens(shown, f"router.{layer}.load.0")
        assert says(ends[0], tokens[0][0])
        assert says(ends[1].removesuffix(" target tokens"), tokens[-1][0])


def test_the_captions_and_lines_of_the_router(shown: Shown) -> None:
    section = shown.section("router")
    for layer, caption in zip((1, 2), section.all("figcaption"), strict=True):
        violation = [y for _, y in shown.series("pretrain", f"router.{layer}.max_violation")]
        dead = [y for _, y in shown.series("pretrain", f"router.{layer}.dead_experts")]
        match = re.fullmatch(
            r"The busiest expert ends (\d+ %) above an even share \(at worst (\d+ %)\)\. "
            r"Dead experts at the end: (\d+)(?: \(at worst (\d+)\))?\.",
            plain(caption.text),
        )
        assert match is not None
        assert says(match[1], violation[-1]) and says(match[2], max(violation))
        assert int(match[3]) == dead[-1] and int(match[4] or match[3]) == max(dead)
    plot = _plot(shown, "Maximal violation")
    for layer, (path, points) in zip((1, 2), _lines(plot), strict=True):
        assert path.attributes["data-label"] == f"layer {layer}"
        curve = _over_tokens(shown, f"router.{layer}.max_violation")
        _check_line(plot, points, _mean(curve, 0.02))


# Bars


@dataclass
class Row:
    """A bar as it is drawn: its texts, and its places in percent of the track."""

    group: str
    label: str
    value: str
    width: float
    tip: str
    whisker: tuple[float, float] | None


def _bars(chart: Node) -> list[Row]:
    rows: list[Row] = []
    group = ""
    places: list[float] = []
    for node in chart.children:
        assert isinstance(node, Node)
        if "group" in node.classes:
            group = node.text
        elif "label" in node.classes:
            rows.append(Row(group, node.text, "", 0.0, "", None))
            places.append(float(node.attributes["y"]))
        elif "value" in node.classes:
            rows[-1].value = plain(node.text)
        elif "bar" in node.classes:
            assert node.attributes["x"] == "0"
            rows[-1].width = float(node.attributes["width"].removesuffix("%"))
            rows[-1].tip = plain(node.text)
        elif "whisker" in node.classes and rows[-1].whisker is None:
            low, high = (node.attributes[end].removesuffix("%") for end in ("x1", "x2"))
            rows[-1].whisker = (float(low), float(high))
    assert places == sorted(places)
    return rows


def test_the_bars_of_bits_per_byte_go_from_most_to_fewest(shown: Shown) -> None:
    rows = _bars(shown.section("bits").one("svg", "bars"))
    assert sorted(row.label for row in rows) == sorted(COMPRESSORS)
    values = [shown.results[COMPRESSORS[row.label]] for row in rows]
    assert values == sorted(values, reverse=True)
    for row, value in zip(rows, values, strict=True):
        assert says(row.value, value)
        assert row.width == pytest.approx(100 * value / (1.02 * max(values)), abs=0.006)
        assert row.tip == f"{row.label}: {row.value}" and row.whisker is None
    caption = plain(shown.section("bits").one("figcaption").text)
    match = re.search(
        r"the same (.+?) of held-out text.* given (.+?) of the training text", caption
    )
    assert match is not None
    assert says(match[1], shown.results["data.heldout_bytes"])
    assert says(match[2], shown.results["evaluate.xz_primed_training_bytes"])


def test_the_bars_before_and_after_reinforcement_learning(shown: Shown) -> None:
    rows = _bars(shown.section("rl").one("svg", "bars"))
    longer = f"Greedy, tasks longer than trained on: {shown.results['rl.longer_tasks_are']}"
    groups = {
        "greedy": "Greedy: the one most likely answer",
        "avg8": "avg@8: the mean of 8 sampled answers",
        "pass8": "pass@8: at least one of 8 sampled answers is right",
        "longer_greedy": longer,
    }
    expected = [
        (group, f"{when} RL", f"rl.{name}_{when}")
        for name, group in groups.items()
        for when in ("before", "after")
    ]
    controls = {
        "before RL, made to think": "rl.forced_before",
        "instead of RL, fine-tuning for as many FLOPs": "rl.sft_equal_flops",
    }
    expected += [("Controls, greedy", label, key) for label, key in controls.items()]
    assert [(row.group, row.label) for row in rows] == [
        (group, label) for group, label, _ in expected
    ]
    for row, (_, label, key) in zip(rows, expected, strict=True):
        value = shown.results[key]
        ends = [shown.results[f"{key}_{end}"] for end in ("low", "high")]
        assert says(row.value, value), key
        assert row.width == pytest.approx(100 * value, abs=0.006), key
        assert row.whisker == pytest.approx([100 * end for end in ends], abs=0.006), key
        match = re.fullmatch(r"(.+): (.+ %) \[(.+ %) – (.+ %)\]", row.tip)
        assert match is not None and match[1] == label and match[2] == row.value, key
        assert says(match[3], ends[0]) and says(match[4], ends[1]), key


def test_what_is_said_of_reinforcement_learning(shown: Shown) -> None:
    section = shown.section("rl")
    results = shown.results
    captions = [plain(node.text) for node in section.all("figcaption")]
    assert captions == [
        f"{results['rl.tasks']} tasks never trained on: {results['rl.tasks_are']}. Whiskers: 95 % "
        "intervals over tasks."
    ]
    text = plain(section.text)
    match = re.search(r"answer has (\S+) tokens on average before and (\S+) after", text)
    assert match is not None
    assert says(match[1], results["rl.length_before"])
    assert says(match[2], results["rl.length_after"])
    match = re.search(r"thinks in (\S+ %) of its answers before and (\S+ %) after", text)
    assert match is not None
    assert says(match[1], results["rl.thinking_before"])
    assert says(match[2], results["rl.thinking_after"])
    match = re.search(r"differed by at most (\S+) in the log-probability", text)
    assert match is not None and says(match[1], results["rl.max_logprob_difference"])
    verdict = plain(section.one("div", "verdict").text)
    assert plain(shown.page.all("p", "lede")[0].text) in verdict
    match = re.search(r"fine-tuning end at (.+?), against (.+?) with", verdict)
    assert match is not None
    assert says(match[1], results["rl.sft_equal_flops"])
    assert says(match[2], results["rl.greedy_after"])
    match = re.search(r"trained on, it went from (\S+ %) to (\S+ %)", verdict)
    assert match is not None
    assert says(match[1], results["rl.longer_greedy_before"])
    assert says(match[2], results["rl.longer_greedy_after"])


# Texts


def test_the_samples_stand_side_by_side_before_on_the_left(shown: Shown) -> None:
    section = shown.section("samples")
    rows = section.all("div", "sample")
    before, after = shown.samples["before"], shown.samples["after"]
    assert len(rows) == len(before) == len(after)
    for row, *entries in zip(rows, before, after, strict=True):
        asked = row.one("div", "asked")
        assert asked.one("p").text == entries[0]["prompt"] == entries[1]["prompt"]
        assert asked.one("span").text == f"right answer: {entries[0]['answer']}"
        for answer, entry, when in zip(
            row.one("div", "pair").all("div", "answer"), entries, ("before", "after"), strict=True
        ):
            sign = {"right": "✓ right", "wrong": "✗ wrong"}[entry["verdict"]]
            assert answer.one("h4").text == f"{when} RL {sign}"
            assert answer.one("span", "sign").classes[1] == sign[2:]
            paragraphs = [node.text for node in answer.all("p")]
            assert paragraphs == [entry["reasoning"] or "does not think", entry["content"]]
    for name, entries in (("before", before), ("after", after)):
        right = sum(entry["verdict"] == "right" for entry in entries)
        assert f"{right} of {len(entries)} right {name}" in section.text


def test_the_completions_and_the_recipe_are_shown_as_they_are(shown: Shown) -> None:
    texts = [node.text for node in shown.section("base").all("pre")]
    base = shown.samples["base"]
    assert [text.replace("\ufffd", "") for text in texts] == [
        (entry["prompt"] + entry["completion"]).replace("\ufffd", "") for entry in base
    ]
    given = [node.text for node in shown.section("base").all("span", "given")]
    assert given == [entry["prompt"] for entry in base]
    recipe = (shown.directory / "recipe.toml").read_text(encoding="utf-8")
    assert shown.section("recipe").one("pre").text == recipe.strip()
    digest = shown.results["run.recipe_hash"]
    assert shown.section("recipe").one("small").text == f"hash {digest[:12]}"


def test_every_number_with_every_digit(shown: Shown) -> None:
    tables = shown.section("numbers").all("table")
    rows = [
        (table.one("caption").text, row.one("th").text, row.one("td").text)
        for table in tables
        for row in table.all("tr")
    ]
    expected: Mapping[str, Any] = shown.results
    written = {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in expected.items()
    }
    assert {key: value for _, key, value in rows} == written and len(rows) == len(written)
    assert all(group == key.split(".")[0] for group, key, _ in rows)
    keys = [key for _, key, _ in rows]
    assert all(a < b for a, b in itertools.pairwise(keys))
