"""The whole page from synthetic runs: complete, self-contained, well-formed, the same bytes each
time.
"""

import json
import math
import re
import sqlite3
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from xushi.base.errors import XushiError
from xushi.base.tracking import Tracking
from xushi.report import write_report

Build = Callable[[Path], Path]
_VOID = {"meta", "link", "br", "img", "hr", "input"}


class _Page(HTMLParser):
    """Checks that tags balance; collects ids, links, text and attributes that could load something."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.loads: list[str] = []
        self.tags: set[str] = set()
        self.handlers: list[str] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            elif name in ("src", "href", "srcset", "data", "action", "xlink:href"):
                (self.targets if (value or "").startswith("#") else self.loads).append(value or "")
            elif name.startswith("on"):
                self.handlers.append(name)
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, (tag, self.open[-5:])
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _read(directory: Path) -> tuple[str, _Page]:
    html = write_report(directory).read_text(encoding="utf-8")
    page = _Page(html)
    assert not page.loads and not page.handlers
    assert not re.search(r"url\(|@import|<(iframe|object|embed|img)", html)
    assert len(page.ids) == len(set(page.ids))
    assert {target[1:] for target in page.targets} <= set(page.ids)
    assert not {"nan", "inf"} & set(
        re.findall(r"[A-Za-z]+", " ".join(re.findall(r'\bd="[^"]*"|="-?\w+%?"', html)))
    )
    return html, page


def test_full_run(full_run: Build, tmp_path: Path) -> None:
    html, page = _read(full_run(tmp_path / "demo"))
    expected = [
        "theme",
        "story",
        "data",
        "pretrain",
        "router",
        "bits",
        "sft",
        "rl",
        "samples",
        "base",
        "machine",
        "recipe",
        "numbers",
    ]
    assert page.ids == expected
    text = "".join(page.text)
    for key, value in json.loads((tmp_path / "demo" / "results.json").read_text()).items():
        assert key in page.text, key
        assert (value if isinstance(value, str) else json.dumps(value)) in page.text, key
    assert (
        "beats xz\u00a0-9 by 4.1\u202f%" in text
        and "does not reach it" in text
        and "elicited a habit" in text
    )
    assert html.count('class="sign right"') == 11 and html.count('class="sign wrong"') == 9
    assert html.count('class="heat"') == 5 and "n_routed_experts = 16" in text
    assert len(html) < 400_000
    assert not re.search(r"https?:", html)


def test_same_run_same_bytes(full_run: Build, tmp_path: Path) -> None:
    first = write_report(full_run(tmp_path / "demo")).read_bytes()
    assert write_report(tmp_path / "demo").read_bytes() == first
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == [
        "recipe.toml",
        "report.html",
        "results.json",
        "samples.json",
        "tracking.sqlite",
    ]


def test_partial_run_leaves_sections_out(full_run: Build, tmp_path: Path) -> None:
    directory = full_run(tmp_path / "partial")
    results = json.loads((directory / "results.json").read_text())
    kept = {
        key: value
        for key, value in results.items()
        if key.split(".")[0] in ("run", "machine", "data", "tokenizer", "model", "pretrain")
        or key in ("seconds.data", "seconds.tokenizer", "seconds.pretrain")
    }
    (directory / "results.json").write_text(json.dumps(kept))
    (directory / "samples.json").unlink()
    with sqlite3.connect(directory / "tracking.sqlite") as store:
        store.execute("DELETE FROM metrics WHERE stage != 'pretrain'")
    html, page = _read(directory)
    assert page.ids == [
        "theme",
        "story",
        "data",
        "pretrain",
        "router",
        "machine",
        "recipe",
        "numbers",
    ]
    assert "einforcement" not in html.partition("<script>")[0].partition("</style>")[2]
    assert html.count("<li class=") == 3


def test_a_model_without_mtp_has_no_word_of_it(full_run: Build, tmp_path: Path) -> None:
    """Its loss is tracked as zero, which would be drawn as a perfect one."""
    run = full_run(tmp_path / "run")
    assert "(MTP)" in write_report(run).read_text(encoding="utf-8")
    tracking = Tracking(run / "tracking.sqlite")
    tracking._write("UPDATE metrics SET value = 0 WHERE name = ?", [("mtp_loss",)])
    tracking.close()
    results = json.loads((run / "results.json").read_text(encoding="utf-8")) | {
        "model.parameters_mtp": 0
    }
    (run / "results.json").write_text(json.dumps(results), encoding="utf-8")
    page = write_report(run).read_text(encoding="utf-8")
    assert "(MTP)" not in page and "multi-token" not in page


@pytest.mark.parametrize(
    "missing", ["results.json", "tracking.sqlite", "recipe.toml", "samples.json"]
)
def test_each_file_may_be_missing_and_is_not_made(
    full_run: Build, tmp_path: Path, missing: str
) -> None:
    directory = full_run(tmp_path / "demo")
    (directory / missing).unlink()
    _read(directory)
    assert not (directory / missing).exists()


def test_hostile_text_stays_text(full_run: Build, tmp_path: Path) -> None:
    evil = (
        "</pre></script><script>alert(1)</script><img src=x "
        'onerror="alert(2)">&amp;\x00\x1b\ud800\u202e'
    )
    directory = full_run(tmp_path / "demo")
    results = json.loads((directory / "results.json").read_text())
    results |= {
        "run.name": evil,
        f"strange.{evil}": evil,
        "machine.cpu": evil,
        "run.recipe_hash": evil,
        "data.sha256": evil,
        "rl.digits": evil,
        "run.version": evil,
    }
    (directory / "results.json").write_text(json.dumps(results))
    (directory / "recipe.toml").write_bytes(b"\xff\xfe" + evil.replace("\ud800", "").encode())
    entry = {
        "prompt": evil,
        "reasoning": evil,
        "content": evil,
        "right": evil,
        "answer": evil,
        "completion": evil,
    }
    (directory / "samples.json").write_text(
        json.dumps({"before": [entry], "after": [entry, entry], "base": [entry]})
    )
    html, page = _read(directory)
    assert html.count("<script>") == 1 and "img" not in page.tags
    shown = evil.replace("\x00", "\ufffd").replace("\x1b", "\ufffd").replace("\ud800", "\ufffd")
    assert sum(shown in text for text in page.text) >= 15


def test_values_that_are_not_finite_are_named_and_not_drawn(
    full_run: Build, tmp_path: Path
) -> None:
    directory = full_run(tmp_path / "demo")
    results = json.loads((directory / "results.json").read_text())
    for index, (key, value) in enumerate(results.items()):
        if isinstance(value, float):
            results[key] = (math.nan, math.inf, -math.inf)[index % 3]
    (directory / "results.json").write_text(json.dumps(results))
    tracking = Tracking(directory / "tracking.sqlite")
    for stage in ("pretrain", "sft", "rl"):
        for name in tracking.names(stage):
            for step, value in ((5, math.nan), (7, math.inf), (10, math.nan)):
                tracking.metrics(stage, step, {name: value})
    tracking.close()
    html, page = _read(directory)
    assert "values were not finite" in html
    assert page.text.count("NaN") + page.text.count("Infinity") + page.text.count(
        "-Infinity"
    ) == sum(isinstance(value, float) for value in results.values())


def test_metrics_that_are_nothing_but_nan_draw_nothing(tmp_path: Path) -> None:
    tracking = Tracking(tmp_path / "tracking.sqlite")
    for name in (
        "loss",
        "heldout_bits_per_byte",
        "router.1.load.0",
        "router.1.max_violation",
        "router.1.dead_experts",
    ):
        tracking.metrics("pretrain", 1, {name: math.nan})
    tracking.metrics("rl", 1, {"reward": math.nan})
    tracking.close()
    html, page = _read(tmp_path)
    assert page.ids == ["theme"] and "<svg" not in html


def test_many_layers_and_a_single_step(tmp_path: Path) -> None:
    tracking = Tracking(tmp_path / "tracking.sqlite")
    tracking.metrics("pretrain", 1, {"loss": 4.0, "heldout_bits_per_byte": 3.0})
    for layer in range(12):
        tracking.metrics(
            "pretrain", 1, {f"router.{layer}.max_violation": 0.5, f"router.{layer}.load.0": 1.0}
        )
    tracking.close()
    html, _ = _read(tmp_path)
    assert "worst layer" in html and html.count('class="heat"') == 12


def test_samples_pair_by_prompt(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    before = [
        {"prompt": p, "reasoning": None, "content": "1", "right": False, "answer": "2"}
        for p in ("aa", "bb") * 2
    ]
    after = [
        {"prompt": p, "reasoning": "r", "content": "2", "right": True, "answer": "2"}
        for p in ("bb", "cc")
    ]
    (tmp_path / "samples.json").write_text(json.dumps({"before": before, "after": after}))
    html, page = _read(tmp_path)
    assert [text for text in page.text if text in ("aa", "bb", "cc")] == [
        "aa",
        "bb",
        "aa",
        "bb",
        "cc",
    ]
    assert html.count("does not think") == 4 and "0 of 4 right before, 2 of 2 right after" in html


def test_what_is_no_run_or_damaged_is_an_error_of_two_lines(tmp_path: Path) -> None:
    with pytest.raises(XushiError, match="holds no run"):
        write_report(tmp_path)
    for name, content in (
        ("results.json", "{"),
        ("results.json", "[1]"),
        ("samples.json", '{"before": 3}'),
        ("samples.json", '{"before": [1]}'),
        ("tracking.sqlite", "no database" * 100),
    ):
        directory = tmp_path / name / str(len(content))
        directory.mkdir(parents=True)
        (directory / "results.json").write_text("{}")
        (directory / name).write_text(content)
        with pytest.raises(XushiError) as caught:
            write_report(directory)
        assert name in caught.value.problem
        assert not (directory / "report.html").exists()
