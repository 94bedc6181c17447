"""What the pages show is what the ledger holds, and what ideas contain stays text."""

import json
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import pytest

from xushi.base.errors import BadInput
from xushi.ladder.facts import facts
from xushi.ladder.idea import Idea
from xushi.ladder.ledger import Ledger
from xushi.ladder.looks import planned_looks
from xushi.ladder.page import _gain_chart, write_idea_page, write_ledger_page
from xushi.ladder.stream import lord_level
from xushi.ladder.verdict import ALPHA, Decision, decide, look_at_pairs
from xushi.report.numbers import digits

BASELINE = [3.5, 3.25, 3.75, 3.625]
VARIANT = [3.375, 3.0, 3.5, 3.5]
HOSTILE = "</pre><script>alert(1)</script>\"'><img src=x onerror=alert(2)>"
REPEAT = "xushi try 'ideas/<b>.toml'"


class Page(HTMLParser):
    """The text of a page, its tags, and the cells of each row of its tables."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text, self.tags, self.links = "", [], []
        self.rows: list[list[str]] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name == "href"]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.tags and self.tags[-1] in ("td", "th", "a", "br") and self.rows:
            self.rows[-1][-1] += data


@pytest.fixture
def ledger(tmp_path: Path):
    opened = Ledger(tmp_path / "ladder")
    yield opened
    opened.close()


def idea(**keys: object) -> Idea:
    stated = {
        "question": "Is it better?",
        "baseline": "train {seed} {size}",
        "variant": "train {seed} {size} --new",
        "metric": "loss",
        "smallest_effect": 0.0625,
        "pairs": 4,
        "sizes": [10],
    }
    return Idea.model_validate({**stated, **keys})


def run(ledger: Ledger, entry: int, use: tuple[int, str, str, int], job: str, value: float) -> None:
    """A run that took 100 seconds and as many as its seed says."""
    ledger.start(job, ["train"], 1, "")
    metric = ledger.entries()[entry - 1].idea.metric
    ledger.end(job, 100.0 + use[3], {metric: value}, None)
    ledger.use(entry, *use, job)


def add(
    ledger: Ledger,
    name: str,
    stated: Idea,
    promoted: bool = False,
    own: Sequence[float] = VARIANT,
    again: float = BASELINE[0],
) -> int:
    """An idea with four pairs that judge (seeds 1 to 4) and two that confirm (seeds 11, 12). All
    ideas share the runs of the baseline.
    """
    number = ledger.register(name, name, stated, {"train.py": "0a1b"}).number
    for purpose, seeds in (("judge", (1, 2, 3, 4)), ("confirm", (11, 12))):
        for place, seed in enumerate(seeds):
            for arm, values in (("baseline", BASELINE), ("variant", own)):
                job = f"{arm if arm == 'baseline' else name} {purpose} {seed}"
                run(ledger, number, (0, purpose, arm, seed), job, values[place])
    run(ledger, number, (0, "repeat", "baseline", 1), "again", again)
    sign = -1 if stated.higher_is_better else 1
    decision = decide(
        [sign * value for value in BASELINE],
        [sign * value for value in own],
        stated.smallest_effect,
        planned_looks(4),
    )
    ledger.decide(number, 0, {"verdict": "unsettled", "promoted": False, "rungs": 1})
    ledger.decide(number, 0, result_of(number, decision, promoted))
    return number


def result_of(number: int, decision: Decision, promoted: bool = False) -> dict[str, object]:
    look = decision.looks[-1]
    return {
        "entry": number, "verdict": decision.verdict, "reason": decision.reason,
        "promoted": promoted, "difference": look.difference, "low": look.low, "high": look.high,
        "pairs": look.pairs, "p": 0.012345, "level": 0.0234, "e_value": 7.77, "rungs": 1,
        "seconds": 1234.0, "more_pairs": 9 if decision.verdict == "unsettled" else None,
    }  # fmt: skip


def test_the_page_of_an_idea_shows_what_the_ledger_holds(ledger: Ledger) -> None:
    path = write_idea_page(ledger, add(ledger, "new", idea(), promoted=True), REPEAT)
    page = Page(path)
    assert path == ledger.directory / "new-1.html"
    for seed, base, own, gain in [
        ("1", "3.50000", "3.37500", "0.125"),
        ("2", "3.25000", "3.00000", "0.250"),
        ("3", "3.75000", "3.50000", "0.250"),
        ("4", "3.62500", "3.50000", "0.125"),
        ("11", "3.50000", "3.37500", "0.125"),
        ("12", "3.25000", "3.00000", "0.250"),
    ]:
        assert [seed, base, own, gain] in [row[:4] for row in page.rows]
    for shown in ("0.1875 (", "It is promoted", "0.012", "0.023", "7.8", "20\u202fmin 34\u202fs"):
        assert shown in page.text
    assert "the same value" in page.text and "train.py SHA-256 0a1b" in page.text
    assert page.text.count(REPEAT) == 2  # in the paragraph, and by itself


def test_the_json_of_an_idea_has_the_rules_own_looks(ledger: Ledger) -> None:
    number = add(ledger, "new", idea(), again=3.5625)
    page = write_idea_page(ledger, number, REPEAT)
    assert "differs by 0.0625" in Page(page).text
    path = page.with_suffix(".json")
    found = json.loads(path.read_text(encoding="utf-8"))
    decision = decide(BASELINE, VARIANT, 0.0625, planned_looks(4))
    (rung,) = found["rungs"]
    assert rung["looks"] == [asdict(look) for look in decision.looks]
    assert (rung["verdict"], rung["keys"]) == (decision.verdict, {"size": 10})
    assert [(pair["seed"], pair["gain"]) for pair in rung["pairs"]] == [
        *((1, 0.125), (2, 0.25), (3, 0.25), (4, 0.125))
    ]
    assert [pair["seconds"] for pair in rung["pairs"]] == [202.0, 204.0, 206.0, 208.0]
    fresh = look_at_pairs(BASELINE[:2], VARIANT[:2], ledger.entries()[0].known[0], ALPHA)
    assert found["confirmation"]["look"] == asdict(fresh)
    assert found["result"] == ledger.decisions()[-1][2]
    assert (found["repeated"], found["command"]) == ([3.5, 3.5625], REPEAT)


def test_where_higher_is_better_a_rise_is_a_gain(ledger: Ledger) -> None:
    number = add(ledger, "new", idea(higher_is_better=True))
    found = facts(ledger, number)
    assert [pair.gain for pair in found.rungs[0].pairs] == [-0.125, -0.25, -0.25, -0.125]
    assert found.rungs[0].pairs[0].baseline == 3.5  # as printed
    assert found.rungs[0].decision.verdict == "worse"
    page = Page(write_idea_page(ledger, number, REPEAT))
    assert "Worse after 4 pairs" in page.text and "loss is higher with the variant" in page.text


@pytest.mark.parametrize(
    ("p_gain", "promoted", "said"),
    [(0.2, False, "do not confirm"), (0.02, False, "above 0.02"), (0.02, True, "It is promoted")],
)
def test_why_it_is_promoted_or_not(
    ledger: Ledger, p_gain: float, promoted: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = add(ledger, "new", idea(), promoted)
    look = look_at_pairs(BASELINE, VARIANT, ledger.entries()[0].known[0], ALPHA)
    changed = type(look)(**{**asdict(look), "p_gain": p_gain})
    monkeypatch.setattr("xushi.ladder.facts.look_at_pairs", lambda *_: changed)
    text = Page(write_idea_page(ledger, number, REPEAT)).text
    assert said in text and text.count("promoted: on 4 fresh pairs") == 2


def test_each_rung_has_its_own_runs(ledger: Ledger) -> None:
    number = add(ledger, "new", idea(sizes=[10, 20]))
    for seed, base, own in ((1, 2.5, 2.75), (2, 2.25, 2.375)):
        run(ledger, number, (1, "judge", "baseline", seed), f"large {seed}", base)
        run(ledger, number, (1, "judge", "variant", seed), f"large new {seed}", own)
    run(ledger, number, (1, "judge", "baseline", 3), "without its pair", 2.0)
    top = decide([2.5, 2.25], [2.75, 2.375], 0.0625, planned_looks(4))
    ledger.decide(number, 1, {**result_of(number, top), "rungs": 2})
    low, high = facts(ledger, number).rungs
    assert [pair.gain for pair in low.pairs] == [0.125, 0.25, 0.25, 0.125]
    assert [pair.gain for pair in high.pairs] == [-0.25, -0.125] and high.decision == top
    text = Page(write_idea_page(ledger, number, REPEAT)).text
    assert "Rung 1: size = 10" in text and "Rung 2: size = 20" in text


def test_an_open_question_says_what_would_settle_it(ledger: Ledger) -> None:
    number = add(ledger, "new", idea(), own=[3.75, 3.0, 3.875, 3.5])
    text = Page(write_idea_page(ledger, number, REPEAT)).text
    # A pair of these seeds takes 205 seconds in the mean.
    assert text.count("about 9 more pairs would settle it, which is 30\u202fmin 45\u202fs") == 2


def test_an_interval_without_bounds(ledger: Ledger) -> None:
    """Runs that do not differ at all say nothing of chance. JSON has no infinity."""
    number = ledger.register("new", "new", idea(), {}).number
    for seed in (1, 2, 3, 4):
        run(ledger, number, (0, "judge", "baseline", seed), f"baseline {seed}", 3.5)
        run(ledger, number, (0, "judge", "variant", seed), f"variant {seed}", 3.25)
    decision = decide([3.5] * 4, [3.25] * 4, 0.0625, planned_looks(4))
    assert math.isinf(decision.looks[-1].low)
    ledger.decide(number, 0, result_of(number, decision))
    page = write_idea_page(ledger, number, REPEAT)
    index = write_ledger_page(ledger)
    assert Page(page).text.count("0.25 (without bounds)") == 2
    assert "without bounds" in Page(index).text
    assert " inf" not in Page(page).text + Page(index).text
    for path in (page, index):
        text = path.with_suffix(".json").read_text(encoding="utf-8")
        json.loads(text, parse_constant=lambda name: pytest.fail(name))
    found = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    assert [found["rungs"][0]["looks"][1][end] for end in ("low", "high")] == [None, None]


def test_the_gains_chart(ledger: Ledger) -> None:
    """Points that no line joins, each look's interval, lines at zero and at the smallest effect. The
    first look's interval is so wide that it is cut off.
    """
    (rung,) = facts(ledger, add(ledger, "new", idea(smallest_effect=0.0078125))).rungs
    first, last = rung.decision.looks
    chart = _gain_chart(rung, 0.0078125)
    low, high = map(float, re.findall(r'data-y="(\S+) (\S+)"', chart)[0])
    assert first.low < low < last.low and last.high < high < first.high

    def value(y: str) -> float:
        return low + (1 - float(y) / 240) * (high - low)

    tolerance = 0.05 / 240 * (high - low) * 1.01  # places are written with one decimal
    paths = re.findall(r'<path class="([^"]*)".*? d="([^"]*)"', chart)
    (spans,) = [d for kind, d in paths if "faint" in kind]
    ends = [value(y) for y in re.findall(r",(-?[\d.]+)", spans)]
    assert ends == pytest.approx([first.low, first.high, last.low, last.high], abs=tolerance)
    assert spans.count("M") == spans.count("L") == 2
    (pairs,) = [d for kind, d in paths if "t3" in kind]
    assert pairs.count("M") == 4 and "L" not in pairs
    lines = re.findall(r'<line class="reference".*?y1="([\d.]+)"', chart)
    assert [value(y) for y in lines] == pytest.approx([0.0, 0.0078125], abs=tolerance)


def test_a_hostile_idea_stays_text(ledger: Ledger) -> None:
    command = f"train {{seed}} {{size}} {shlex.quote(HOSTILE)}"
    stated = idea(question=HOSTILE, metric=HOSTILE, variant=command, sizes=[HOSTILE, 20])
    number = add(ledger, HOSTILE.replace("/", ":"), stated)
    path = write_idea_page(ledger, number, HOSTILE)
    for page in (Page(path), Page(write_ledger_page(ledger))):
        assert page.tags.count("script") == 1 and "img" not in page.tags
        assert HOSTILE in page.text
    link = next(each for each in page.links if each)
    assert ":" not in link and "<" not in link


def test_the_ledgers_page_is_the_account(ledger: Ledger) -> None:
    write_idea_page(ledger, add(ledger, "new", idea(), promoted=True), REPEAT)
    add(ledger, "other", idea(higher_is_better=True))
    ledger.register("open", "open", idea(pairs=8), {})
    page = Page(write_ledger_page(ledger))
    # Baseline and variant: 2 x (101 + 102 + 103 + 104 + 111 + 112) seconds, and 101 to repeat one.
    cost = "22\u202fmin 47\u202fs"
    rows = {row[0].split("Is")[0]: row for row in page.rows if row[0][:1].isdigit()}
    assert list(rows) == ["1. new", "2. other", "3. open"]
    assert [rows["1. new"][place] for place in (1, 2, 4, 5, 7)] == [
        *("better, promoted", "0.188", "4", "0.012", cost)
    ]
    assert rows["2. other"][1:3] == ["worse", "−0.188"] and rows["3. open"][1] == "open"
    assert ["worse", "1", "10\u202fmin 33\u202fs"] in page.rows  # its own variant alone
    assert ["in all", "3", "33\u202fmin 20\u202fs"] in page.rows
    assert digits(lord_level(4, [1]), 2) in page.text
    assert page.links == ["new-1.html"]  # the others have no page
    written = json.loads((ledger.directory / "index.json").read_text(encoding="utf-8"))
    assert [each["result"] and each["result"]["verdict"] for each in written["ideas"]] == [
        *("better", "worse", None)
    ]
    assert math.isclose(written["seconds"], 2000.0)


def test_an_entry_without_a_result_has_no_page(ledger: Ledger) -> None:
    number = ledger.register("open", "open", idea(), {}).number
    with pytest.raises(BadInput, match="no result"):
        write_idea_page(ledger, number, REPEAT)


def test_a_page_needs_no_pytorch() -> None:
    """Importing it takes seconds, and what runs commands has no other use for it."""
    code = "import sys, xushi.ladder.page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
