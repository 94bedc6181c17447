"""Pages for people, and JSON beside them: one of each idea, and one of the ledger.

The same ledger gives the same bytes. What ideas and commands contain is text and never markup.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import quote

import tomli_w

from xushi.base.files import write_atomic, write_json
from xushi.ladder import sentences
from xushi.ladder.account import Account, Line, account
from xushi.ladder.facts import Facts, Pair, Rung, facts
from xushi.ladder.idea import ARMS, BASELINE
from xushi.ladder.ledger import Ledger
from xushi.ladder.numbers import finite
from xushi.ladder.stream import lord_level
from xushi.report.charts import Axes, Reference, Series, line_chart
from xushi.report.elements import (
    document,
    fact_grid,
    figure,
    key_figures,
    kicker,
    paragraph,
    section,
    table,
    text_block,
)
from xushi.report.numbers import count, digits, duration, escape
from xushi.report.scales import Point

_NAME_BYTES = 200  # of an idea's name in the names of its files
_BREAK = (math.nan, math.nan)  # between points that no line joins


def write_idea_page(ledger: Ledger, number: int, command: str) -> Path:
    """Write the page of entry `number`, and its JSON, into the ledger's directory, and return the
    page's path. `command` is the one that repeats it.
    """
    found = facts(ledger, number)
    name = _file_name(found.entry.name, number)
    write_json(ledger.directory / f"{name}.json", finite({"command": command, **found.as_json()}))
    path = ledger.directory / f"{name}.html"
    write_atomic(path, _idea_page(found, command))
    return path


def write_ledger_page(ledger: Ledger) -> Path:
    """Write index.html and index.json into the ledger's directory, and return the page's path."""
    found = account(ledger)
    write_json(ledger.directory / "index.json", finite(found.as_json()))
    path = ledger.directory / "index.html"
    level = lord_level(len(found.lines) + 1, ledger.promoted())
    write_atomic(path, _ledger_page(found, level, ledger.directory))
    return path


def _file_name(name: str, number: int) -> str:
    return f"{name.encode()[:_NAME_BYTES].decode(errors='ignore')}-{number}"


def _idea_page(found: Facts, command: str) -> str:
    entry = found.entry
    ladder = len(entry.idea.all_rungs()) > 1
    rungs = "".join(
        _rung_section(found, rung, number if ladder else None)
        for number, rung in enumerate(found.rungs, start=1)
    )
    body = (
        f"<header>{kicker(escape(f'{entry.name} · entry {entry.number}'))}"
        f"<h1>{escape(entry.idea.question)}</h1>"
        + paragraph(sentences.verdict(found), "lede")
        + paragraph(sentences.promotion(found) or sentences.more(found), "lede")
        + f"{_figures(found)}</header>\n<main>{rungs}"
        + _confirmation_section(found)
        + section("paste", "In words", text_block(sentences.to_paste(found, command)))
        + _question_section(found, command)
        + '</main>\n<footer><p><a href="index.html">All ideas of this ledger</a></p></footer>'
    )
    return document(entry.name, body)


def _figures(found: Facts) -> str:
    result = found.result
    interval = _interval(result["low"], result["high"])
    return key_figures(
        [
            (digits(result["difference"]), f"gain in {found.entry.idea.metric} ({interval})"),
            (count(result["pairs"]), "pairs of runs at the largest rung"),
            (_short(result["p"]), 'p against "no gain", paid for all looks'),
            (_short(result["level"]), "the level that p must meet for a promotion"),
            (_short(result["e_value"]), 'e-value against "no gain"'),
            (duration(result["seconds"]), "of runs"),
        ]
    )


def _rung_section(found: Facts, rung: Rung, number: int | None) -> str:
    keys = ", ".join(f"{name} = {value}" for name, value in rung.keys.items())
    title = "The runs" if number is None else f"Rung {number}: {keys}"
    metric, effect = found.entry.idea.metric, found.entry.idea.smallest_effect
    first, last = rung.pairs[0].seed, rung.pairs[-1].seed
    direction = "higher" if found.entry.idea.higher_is_better else "lower"
    looks = [
        [
            str(look.pairs), digits(look.difference), _interval(look.low, look.high),
            _short(look.p_gain), _short(look.p_harm), _short(look.level),
        ]
        for look in rung.decision.looks
    ]  # fmt: skip
    body = (
        figure(
            _runs_chart(rung.pairs, metric),
            f"Every run, seeds {first} to {last}. {direction.capitalize()} is better.",
            "Both arms",
        )
        + figure(
            _gain_chart(rung, effect),
            "The gain of each pair, and at each look their mean with its interval. What lies far "
            "outside is cut off.",
            "The gain as pairs came in",
        )
        + table(["pairs", "gain", "interval", "p, no gain", "p, no harm", "each at"], looks, 0)
        + _pairs_table(rung.pairs)
    )
    return section(f"rung-{number or 1}", title, body, rung.decision.verdict)


def _runs_chart(pairs: Sequence[Pair], metric: str) -> str:
    arms = [
        Series("baseline", _apart(pair.baseline for pair in pairs), 0),
        Series("variant", _apart(pair.variant for pair in pairs), 1),
    ]
    joins: list[Point] = []
    for place, pair in enumerate(pairs, start=1):
        joins += [(place, pair.baseline), (place, pair.variant), _BREAK]
    axes = Axes(f"{metric} of every run", "pair", metric, x_counts=True)
    return line_chart([Series("", joins, 5, faint=True), *arms], axes)


def _gain_chart(rung: Rung, effect: float) -> str:
    looks = rung.decision.looks
    gains = [pair.gain for pair in rung.pairs]
    shown = [*gains, 0.0, effect, looks[-1].low, looks[-1].high]
    low, high = min(shown), max(shown)
    spans: list[Point] = []
    for look in looks:
        spans += [(look.pairs, look.low), (look.pairs, look.high), _BREAK]
    series = [
        Series("", spans, 5, faint=True),
        Series("upper end", [(look.pairs, look.high) for look in looks], 5),
        Series("lower end", [(look.pairs, look.low) for look in looks], 5),
        Series("mean gain", [(look.pairs, look.difference) for look in looks], 2, dots=True),
        Series("a pair", _apart(gains), 3),
    ]
    axes = Axes(
        "gain of the variant", "pairs", "gain of the variant", x_counts=True,
        y_floor=low - (high - low) / 4, y_limit=high + (high - low) / 4,
    )  # fmt: skip
    return line_chart(series, axes, [Reference("0", 0.0), Reference("smallest effect", effect)])


def _apart(values: Iterable[float]) -> list[Point]:
    """Points at 1, 2, ... that no line joins."""
    points: list[Point] = []
    for place, value in enumerate(values, start=1):
        points += [(place, value), _BREAK]
    return points


def _pairs_table(pairs: Sequence[Pair]) -> str:
    rows = [
        [
            str(pair.seed), digits(pair.baseline, 6), digits(pair.variant, 6), digits(pair.gain),
            duration(pair.seconds),
        ]
        for pair in pairs
    ]  # fmt: skip
    return table(["seed", "baseline", "variant", "gain", "both runs"], rows, 0)


def _confirmation_section(found: Facts) -> str:
    look = found.confirmation
    if look is None:
        return ""
    text = (
        f"{look.pairs} pairs on seeds that nothing had seen: the mean gain is "
        f"{digits(look.difference)} ({_interval(look.low, look.high)}), p against "
        f'"no gain" {_short(look.p_gain)}.'
    )
    return section("confirmation", "Confirmation", paragraph(text) + _pairs_table(found.confirming))


def _question_section(found: Facts, command: str) -> str:
    known = found.entry.known[len(found.rungs) - 1]
    grid = fact_grid(
        [
            ("smallest effect of interest", digits(found.entry.idea.smallest_effect)),
            ("pairs planned", str(found.entry.idea.pairs)),
            ("the baseline's first seed, run twice", _repetition(found)),
            (
                "sd of a run, from earlier ideas",
                digits(math.sqrt(known.value)) if known.degrees else "nothing",
            ),
            ("its degrees of freedom", str(known.degrees) if known.degrees else ""),
            *_document_facts(found),
        ]
    )
    stated = found.entry.idea.model_dump(exclude_defaults=True)
    body = (
        grid
        + _arms_table(found)
        + f"<pre>{escape(tomli_w.dumps(stated).strip())}</pre>"
        + paragraph("The command that repeats it:")
        + f"<pre>{escape(command)}</pre>"
        + "".join(
            paragraph(f"{name} SHA-256 {digest}", "hash")
            for name, digest in found.entry.files.items()
        )
    )
    return section("question", "The question, as it was registered", body)


def _document_facts(found: Facts) -> list[tuple[str, str]]:
    error = found.result.get("document_error")
    if error is None:
        return []
    documents = len(found.arms[BASELINE]["documents"])
    return [(f"standard error of the gain over {documents} held-out documents", digits(error))]


def _arms_table(found: Facts) -> str:
    """What is the same for both arms of a recipe, and what is not."""
    if not found.arms:
        return ""
    rows = [
        [title, *(count(round(found.arms[arm][key])) for arm in ARMS)]
        for key, title in (
            ("tokens", "tokens trained on"),
            ("flops", "training FLOPs"),
            ("parameters", "parameters"),
            ("active_parameters", "active parameters"),
            ("cache_bytes_per_token", "bytes of cache per token, bf16"),
        )
    ]
    return table(["", *ARMS], rows)


def _repetition(found: Facts) -> str:
    if found.repeated is None:
        return ""
    first, again = found.repeated
    return "the same value" if first == again else f"differs by {digits(abs(again - first))}"


def _ledger_page(found: Account, next_level: float, directory: Path) -> str:
    promoted = sum(bool(line.result and line.result["promoted"]) for line in found.lines)
    ideas = "1 idea" if len(found.lines) == 1 else f"{len(found.lines)} ideas"
    grid = key_figures(
        [
            (count(len(found.lines)), "ideas"),
            (count(promoted), "promoted"),
            (duration(found.seconds), "of runs, each paid for once"),
            (_short(next_level), "the level of the next idea"),
        ]
    )
    body = (
        f"<header>{kicker('ledger')}<h1>{ideas}, {promoted} promoted</h1>{grid}</header>\n<main>"
        + section("ideas", "The ideas", _ideas_table(found.lines, directory))
        + section("account", "The account", _account_table(found.lines))
        + "</main>\n<footer><p>index.json beside this page has every number.</p></footer>"
    )
    return document("ledger", body)


def _ideas_table(lines: Sequence[Line], directory: Path) -> str:
    rows = []
    for line in lines:
        result, name = line.result, escape(line.name)
        page = f"{_file_name(line.name, line.number)}.html"
        if (directory / page).exists():
            name = f'<a href="{quote(page)}">{name}</a>'
        cells = [f"{line.number}. {name}<br>{escape(line.question)}"]
        if result is None:
            cells += ["open", "", "", "", "", _short(line.level)]
        else:
            cells += [
                escape(result["verdict"]) + (", promoted" if result["promoted"] else ""),
                digits(result["difference"]),
                _interval(result["low"], result["high"]),
                str(result["pairs"]),
                _short(result["p"]),
                _short(line.level),
            ]
        rows.append([*cells, duration(line.own_seconds)])
    heads = ["idea", "verdict", "gain", "interval", "pairs", "p", "level", "cost"]
    return table(heads, rows, 2)


def _account_table(lines: Sequence[Line]) -> str:
    spent: dict[str, list[float]] = {}
    for line in lines:
        verdict = line.result["verdict"] if line.result else "open"
        spent.setdefault(verdict, []).append(line.own_seconds)
    rows = [
        [escape(verdict), count(len(seconds)), duration(sum(seconds))]
        for verdict, seconds in spent.items()
    ]
    total = sum(map(sum, spent.values()))
    rows.append(["in all", count(len(lines)), duration(total)])
    text = "A run that several ideas use counts for the first of them."
    return table(["verdict", "ideas", "cost"], rows) + paragraph(text, "legend")


def _interval(low: float, high: float) -> str:
    return f"{digits(low)} to {digits(high)}" if math.isfinite(high - low) else sentences.NO_BOUNDS


def _short(value: float) -> str:
    """A probability or an e-value, which may be very small or very large."""
    return digits(value, 2) if 1e-4 <= value < 1e6 else f"{value:.1e}"
