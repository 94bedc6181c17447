"""Whole pages of synthetic runs: self-contained, well-formed, the same bytes each time, and right
in every edge case. What a full run shows is tested on a real one (`test_real_run.py`).
"""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xushi.base.errors import XushiError
from xushi.base.messages import Message, ToolCall
from xushi.base.tracking import Tracking
from xushi.report import write_report

from .conftest import RESULTS, pretraining, write_run
from .page_tree import Node, parse, section_ids
from .recorded import plain, sample

Build = Callable[[Path], Path]


def _page(directory: Path) -> Node:
    return parse(write_report(directory).read_text(encoding="utf-8"))


def _results(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "results.json").read_text())


def test_the_sections_of_a_full_run(full_run: Build, tmp_path: Path) -> None:
    page = _page(full_run(tmp_path / "demo"))
    assert section_ids(page) == [
        *("story", "data", "pretrain", "router", "bits", "sft", "rl", "samples", "base"),
        *("machine", "recipe", "numbers"),
    ]


def test_same_run_same_bytes(full_run: Build, tmp_path: Path) -> None:
    directory = full_run(tmp_path / "demo")
    before = sorted(path.name for path in directory.iterdir())
    first = write_report(directory).read_bytes()
    assert write_report(directory).read_bytes() == first
    assert len(first) < 400_000
    after = sorted(path.name for path in directory.iterdir())
    assert after == sorted([*before, "report.html"])


def test_a_run_of_pretraining_alone_leaves_sections_out(tmp_path: Path) -> None:
    groups = ("run", "machine", "data", "tokenizer", "model", "pretrain")
    seconds = ("seconds.data", "seconds.tokenizer", "seconds.pretrain")
    results = {
        key: value
        for key, value in RESULTS.items()
        if key.split(".")[0] in groups or key in seconds
    }
    metrics = {"pretrain": pretraining(np.random.default_rng(0), 20)}
    page = _page(write_run(tmp_path / "partial", results, metrics))
    assert section_ids(page) == [
        *("story", "data", "pretrain", "router", "machine", "recipe", "numbers"),
    ]
    assert "einforcement" not in page.one("main").text + page.one("header").text
    assert len(page.one(id="story").all("li")) == 3


def test_a_run_without_reinforcement_learning_does_not_speak_of_before_and_after(
    tmp_path: Path,
) -> None:
    gone = ("rl.steps", "seconds.rl", "rl.sft_equal_flops")
    results = {
        key: value
        for key, value in RESULTS.items()
        if (key not in gone and not key.startswith("rl.")) or "_before" in key or "tasks" in key
    }
    entry = sample("p", "1", True, "1")
    page = _page(write_run(tmp_path, results, {}, {"before": [entry, entry]}))
    section = page.one("section", id="rl")
    assert "has no reinforcement learning" in section.text
    assert "Unseen tasks" in section.text and "after" not in section.text
    labels = [node.text for node in section.all("text", "label")]
    assert labels == ["the model"] * 4 + ["the model, made to think"]
    shown = page.one(id="samples")
    assert [node.text.strip() for node in shown.all("h4")] == ["the model ✓ right"] * 2
    assert "2 of 2 right. Tasks" in shown.text and not shown.all("div", "pair")
    header = plain(page.one("header").text)
    assert "answers 11.7 % of unseen tasks right" in header and "Reinforcement" not in header
    assert "11.7 %greedy accuracy, unseen tasks" in header


def test_a_stage_that_the_page_does_not_know_has_its_name_time_and_numbers(tmp_path: Path) -> None:
    results = {key: value for key, value in RESULTS.items() if not key.startswith("seconds.")}
    times = {"data": 1.0, "tokenizer": 1.0, "pretrain": 4.0, "evaluate": 2.0}
    results |= {f"seconds.{name}": value for name, value in times.items()}
    directory = write_run(tmp_path, results)
    # Keys of somebody's own stage, so they are not in the list of what our stages write.
    extra = {"seconds.distil <2>": 8.0, "seconds.total": 16.0, "distil.teachers": 3}
    (directory / "results.json").write_text(json.dumps(results | extra))
    tracking = Tracking(directory / "tracking.sqlite")
    for name in ("data", "tokenizer", "pretrain", "distil <2>", "evaluate"):
        tracking.event(name, "started")
    tracking.close()
    page = _page(directory)
    rows = page.one(id="story").all("li")
    names = [row.one("b").text for row in rows]
    started = ["Data", "Tokenizer", "Pretraining", "distil <2>", "Evaluation"]
    assert names[:5] == started
    row = rows[3]
    assert plain(row.one("span", "time").text) == "8.0 s" and row.one("span", "did").text == ""
    assert row.one("i").attributes["style"] == "width:50.00%"
    assert row.one("a").attributes["href"] == "#numbers"
    cells = [cell.text for cell in page.one(id="numbers").all("td")]
    assert "3" in cells and "8.0" in cells
    keys = [cell.text for cell in page.one(id="numbers").all("th")]
    assert keys == sorted(results | extra)


def test_the_page_shows_the_day_of_the_first_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write_run(tmp_path, {})
    tracking = Tracking(directory / "tracking.sqlite")
    for day in (1_700_000_000.0, 1_800_000_000.0):
        monkeypatch.setattr("time.time", lambda day=day: day)
        tracking.event("data", "started")
    tracking.close()
    monkeypatch.undo()
    assert _page(directory).one("span", "day").text == "· 2023-11-14"


def test_a_stage_that_was_started_over_stands_where_it_ran_last(tmp_path: Path) -> None:
    directory = write_run(tmp_path, {"seconds.data": 1.0, "seconds.pretrain": 1.0})
    tracking = Tracking(directory / "tracking.sqlite")
    for name in ("pretrain", "data", "pretrain"):
        tracking.event(name, "started")
    tracking.close()
    rows = _page(directory).one(id="story").all("b")
    assert [row.text for row in rows] == ["Data", "Pretraining"]


def test_a_model_without_mtp_has_no_word_of_it(tmp_path: Path) -> None:
    """Its loss is tracked as zero, which would be drawn as a perfect one."""
    metrics = pretraining(np.random.default_rng(0), 20)
    assert "(MTP)" in _page(write_run(tmp_path / "mtp", RESULTS, {"pretrain": metrics})).text
    metrics["mtp_loss"] = [(step, 0.0) for step, _ in metrics["mtp_loss"]]
    results = RESULTS | {"model.parameters_mtp": 0, "pretrain.mtp_loss": 0.0}
    page = _page(write_run(tmp_path / "without", results, {"pretrain": metrics}))
    assert "(MTP)" not in page.text and "multi-token" not in page.text


@pytest.mark.parametrize(("model", "place"), [(1.9, 1), (1.5, 3), (1.55, 3), (1.2, 4), (2.0, 0)])
def test_the_bars_of_bits_per_byte_go_from_most_to_fewest(
    tmp_path: Path, model: float, place: int
) -> None:
    page = _page(write_run(tmp_path, RESULTS | {"evaluate.bits_per_byte": model}))
    bars = page.one(id="bits").one("svg", "bars")
    others = ["gzip -9", "zstd -19", "xz -9", "xz -9 after the training text"]
    labels = [node.text for node in bars.all("text", "label")]
    assert labels == [*others[:place], "this model", *others[place:]]


@pytest.mark.parametrize(
    ("first", "early", "last", "above"),
    # In the third case the axis is cut off, and rounding takes it above the first values again.
    [(9.0, 2.0, 2.0, True), (2.5, 2.0, 2.0, False), (2.8, 2.2, 0.0, False), (2.0, 2.0, 2.0, False)],
)
def test_what_lies_above_the_frame_is_said(
    tmp_path: Path, first: float, early: float, last: float, above: bool
) -> None:
    fall = (early - last) / 100
    loss = [(step, first if step < 3 else early - fall * step) for step in range(1, 101)]
    page = _page(write_run(tmp_path, {}, {"pretrain": {"loss": loss}, "sft": {"loss": loss}}))
    for name in ("pretrain", "sft"):
        section = page.one("section", id=name)
        top = float(section.all("svg", "plot")[0].attributes["data-y"].split()[1])
        assert (first > top) == above
        sentence = f"The first values, up to {first:.2f}, lie above the frame."
        assert (sentence in section.text) == above


def test_every_number_of_samples_has_its_rates(tmp_path: Path) -> None:
    results = {
        "rl.steps": 5,
        "rl.avg1_before": 0.1,
        "rl.pass1_before": 0.2,
        "rl.avg16_after": 0.3,
        "rl.pass16_after": 0.4,
    }
    section = _page(write_run(tmp_path, results)).one("section", id="rl")
    assert [node.text for node in section.all("text", "group")] == [
        "avg@1: the mean of one sampled answer",
        "pass@1: at least one of one sampled answer is right",
        "avg@16: the mean of 16 sampled answers",
        "pass@16: at least one of 16 sampled answers is right",
    ]
    values = [plain(node.text) for node in section.all("text", "value")]
    assert values == ["10 %", "20 %", "30 %", "40 %"]


@pytest.mark.parametrize(
    ("targets", "label", "places"),
    [
        ([(1, 100.0), (2, 200.0), (3, 400.0)], "target tokens", [100, 300, 700]),
        ([(1, 100.0), (3, 400.0)], "step", [1, 2, 3]),
        ([(1, 100.0), (2, math.nan), (3, 400.0)], "step", [1, 2, 3]),
        ([(1, 100.0), (2, 200.0)], "step", [1, 2, 3]),
        ([], "step", [1, 2, 3]),
    ],
)
def test_curves_run_over_the_tokens_that_each_step_recorded_else_over_steps(
    tmp_path: Path, targets: list[tuple[int, float]], label: str, places: list[float]
) -> None:
    series = {"loss": [(1, 3.0), (2, 2.0), (3, 1.0)]}
    if targets:
        series["target_tokens"] = targets
    directory = write_run(tmp_path, {"pretrain.steps": 3, "pretrain.tokens": 900}, {})
    tracking = Tracking(directory / "tracking.sqlite")
    for name, points in series.items():
        for step, value in points:
            tracking.metrics("pretrain", step, {name: value})
    tracking.close()
    plot = _page(directory).one("svg", "plot")
    assert plot.attributes["data-name"] == label
    low, high = (float(end) for end in plot.attributes["data-x"].split())
    drawn = re.findall(r"(-?[\d.]+),", plot.all("path", "line")[0].attributes["d"])
    assert [low + float(x) / 1000 * (high - low) for x in drawn] == pytest.approx(places, abs=0.1)


@pytest.mark.parametrize(
    ("rule", "groups", "named", "expected"),
    [
        ("groups", 1, "a/one, two", "One group is held out whole: a/one, two."),
        ("groups", 12, "a/one, two", "12 groups are held out whole: a/one, two."),
        ("groups", 13, "a/one, two", "13 groups are held out whole, such as a/one, two."),
        ("tails", 0, "", "The tail of every document is held out."),
    ],
)
def test_what_is_held_out(
    tmp_path: Path, rule: str, groups: int, named: str, expected: str
) -> None:
    results = {
        "data.bytes": 5,
        "data.heldout_rule": rule,
        "data.heldout_groups": groups,
        "data.heldout_groups_named": named,
    }
    text = _page(write_run(tmp_path, results)).one(id="data").text
    assert expected in text


@pytest.mark.parametrize(
    "missing", ["results.json", "tracking.sqlite", "recipe.toml", "samples.json"]
)
def test_each_file_may_be_missing_and_is_not_made(
    full_run: Build, tmp_path: Path, missing: str
) -> None:
    directory = full_run(tmp_path / "demo")
    (directory / missing).unlink()
    _page(directory)
    assert not (directory / missing).exists()


def test_hostile_text_stays_text(full_run: Build, tmp_path: Path) -> None:
    evil = (
        "</pre></script><script>alert(1)</script><img src=x "
        'onerror="alert(2)">&amp;\x00\x1b\ud800\u202e'
    )
    directory = full_run(tmp_path / "demo")
    texts = ("run.name", "machine.cpu", "run.recipe_hash", "run.version", "run.without")
    texts += ("data.sha256", "data.heldout_groups_named", "rl.tasks_are", "rl.longer_tasks_are")
    results = _results(directory) | {f"strange.{evil}": evil, f"seconds.{evil}": 1.0}
    results |= dict.fromkeys(texts, evil)
    (directory / "results.json").write_text(json.dumps(results))
    (directory / "recipe.toml").write_bytes(b"\xff\xfe" + evil.replace("\ud800", "").encode())
    names = ("prompt", "right", "answer", "completion")
    call = {"function": {"name": evil, "arguments": evil}}
    answer = {"role": "assistant", "content": evil, "reasoning_content": evil, "tool_calls": [call]}
    entry: dict[str, Any] = dict.fromkeys(names, evil)
    entry["transcript"] = [
        {},
        answer,
        {"role": evil, "content": evil},
        evil,
        {"tool_calls": [evil]},
    ]
    (directory / "samples.json").write_text(
        json.dumps({"before": [entry], "after": [entry, entry], "base": [entry]})
    )
    page = _page(directory)
    assert len(page.all("script")) == 1 and not page.all("img")
    shown = evil.replace("\x00", "\ufffd").replace("\x1b", "\ufffd").replace("\ud800", "\ufffd")
    assert page.text.count(shown) >= 40


def test_values_that_are_not_finite_are_named_and_not_drawn(
    full_run: Build, tmp_path: Path
) -> None:
    directory = full_run(tmp_path / "demo")
    results = _results(directory)
    for index, (key, value) in enumerate(results.items()):
        if isinstance(value, float):
            results[key] = (math.nan, math.inf, -math.inf)[index % 3]
    (directory / "results.json").write_text(json.dumps(results))
    tracking = Tracking(directory / "tracking.sqlite")
    for stage in ("pretrain", "sft", "rl"):
        for name in set(tracking.names(stage)) - {"target_tokens"}:
            for step, value in ((5, math.nan), (7, math.inf), (10, math.nan)):
                tracking.metrics(stage, step, {name: value})
    tracking.close()
    page = _page(directory)
    assert "3 of 120 values were not finite" in plain(page.text)
    for name in ("pretrain", "router", "rl"):
        charts = [node for node in page.one(id=name).all("figure") if node.all("svg", "plot")]
        assert charts and all("not finite" in plain(chart.text) for chart in charts)
    cells = [cell.text for cell in page.one(id="numbers").all("td")]
    broken = sum(cells.count(text) for text in ("NaN", "Infinity", "-Infinity"))
    assert broken == sum(isinstance(value, float) for value in results.values())


def test_metrics_that_are_nothing_but_nan_draw_nothing(tmp_path: Path) -> None:
    names = ("loss", "heldout_bits_per_byte", "router.1.load.0", "router.1.max_violation")
    series = {name: [(1, math.nan)] for name in (*names, "router.1.dead_experts")}
    directory = write_run(tmp_path, {}, {"pretrain": series, "rl": {"reward": [(1, math.nan)]}})
    (directory / "recipe.toml").unlink()
    page = _page(directory)
    assert section_ids(page) == [] and not page.all("svg")


def test_many_layers_and_a_single_step(tmp_path: Path) -> None:
    series = {"loss": [(1, 4.0)], "heldout_bits_per_byte": [(1, 3.0)]}
    for layer in range(12):
        series[f"router.{layer}.max_violation"] = [(1, 0.5 + layer / 10)]
        series[f"router.{layer}.load.0"] = [(1, 1.0)]
    page = _page(write_run(tmp_path, {}, {"pretrain": series}))
    assert len(page.all("svg", "heat")) == 12
    worst = [node for node in page.all("svg", "plot") if "worst layer" in node.text]
    assert len(worst) == 1
    low, high = (float(end) for end in worst[0].attributes["data-y"].split())
    dot = worst[0].one("circle")
    value = low + (1 - float(dot.attributes["cy"]) / 170) * (high - low)
    assert value == pytest.approx(1.6, abs=0.01)


def test_samples_pair_by_prompt_and_repeated_prompts_by_their_turn(tmp_path: Path) -> None:
    before = [sample(prompt, f"{prompt}{i}", False, "2") for i, prompt in enumerate("abab")]
    after = [sample(prompt, f"{prompt}{i}", True, "2") for i, prompt in enumerate("bbc")]
    page = _page(write_run(tmp_path, {}, {}, {"before": before, "after": after}))
    shown = page.one(id="samples")
    rows = [
        [node.text for node in sample.all("p", "text")] for sample in shown.all("div", "sample")
    ]
    assert rows == [["a", "a0"], ["b", "b1", "b0"], ["a", "a2"], ["b", "b3", "b1"], ["c", "c2"]]
    assert "0 of 4 right before, 3 of 3 right after" in shown.text
    assert shown.text.count("does not think") == 7


def test_an_answer_that_was_not_judged_is_neither_right_nor_wrong(tmp_path: Path) -> None:
    entries = [sample("p", "1", right, "1") for right in (True, False, True)]
    entries[2]["verdict"] = "error"
    shown = _page(write_run(tmp_path, {}, {}, {"before": entries})).one(id="samples")
    signs = [node.text for node in shown.all("span", "sign")]
    assert signs == ["✓ right", "✗ wrong", "? not judged"]
    assert "1 of 3 right" in shown.text


def test_an_episode_of_several_turns_is_shown_in_order(tmp_path: Path) -> None:
    messages = [
        Message("user", "How many?"),
        Message("assistant", "", "I count.", (ToolCall("count", '{"from": 1}'),)),
        Message("tool", "1 2 3"),
        Message("assistant", "Three."),
    ]
    entry = sample("How many?", "Three.", True, "3")
    entry["transcript"] = [message.to_dict() for message in messages]
    silent = sample("How many?", "", False, "3")
    page = _page(write_run(tmp_path, {}, {}, {"before": [silent], "after": [entry]}))
    before, after = page.one(id="samples").all("div", "answer")
    assert [node.text for node in before.all("p")] == ["does not think", "gives no answer"]
    assert [(node.classes[-1], node.text) for node in after.all("p")] == [
        ("thought", "I count."),
        ("call", 'count {"from": 1}'),
        ("observed", "tool: 1 2 3"),
        ("written", "Three."),
    ]


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
        assert name in caught.value.problem and caught.value.remedy
        assert not (directory / "report.html").exists()


def test_a_stage_of_an_earlier_recipe_is_not_shown(tmp_path: Path) -> None:
    """After --update to fewer stages the store still has the series of the others."""
    results = {"pretrain.steps": 3, "seconds.pretrain": 1.0}
    directory = write_run(tmp_path, results, {})
    tracking = Tracking(directory / "tracking.sqlite")
    for step in (1, 2, 3):
        tracking.metrics("rl", step, {"reward": 0.5})
        tracking.metrics("pretrain", step, {"loss": 3.0 / step})
    tracking.close()
    page = write_report(directory).read_text(encoding="utf-8")
    assert 'id="pretrain"' in page and 'id="rl"' not in page
