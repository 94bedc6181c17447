"""The report's sections on fine-tuning and reinforcement learning: curves, rates before and after,
samples.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from xushi.report import stages, words
from xushi.report.charts import Axes, Bar, Series, bar_chart, frame_top, line_chart
from xushi.report.elements import (
    above_frame,
    figure,
    not_finite,
    paragraph,
    section,
    small_figures,
    stage_time,
    text_block,
)
from xushi.report.numbers import count, digits, escape, percent
from xushi.report.read import Run
from xushi.report.scales import early_limit, runs, smooth

_SMOOTHED_FROM = 60  # points


@dataclass(frozen=True)
class _Curve:
    """A metric of a stage to draw, with its label and colour."""

    name: str
    label: str
    tone: int
    lowest: float | None = 0.0
    falls: bool = False  # fast at first: the first values may lie above the frame


_PROGRESS = (_Curve("reward", "mean reward", 2), _Curve("length", "tokens in an answer", 0))
_HEALTH = (
    _Curve("entropy", "entropy, nats", 3),
    _Curve("truncated", "share of answers cut off", 1),
    _Curve("with_signal", "share of tasks answered both right and wrong", 4),
    _Curve("logprob_difference", "log-probability of a token, trainer against sampler", 5),
    _Curve("loss", "loss", 0, lowest=None),
)


def has_rl(run: Run) -> bool:
    """Whether this run trained by reinforcement learning."""
    return run.number("rl.steps") is not None or bool(run.series("rl", "reward"))


def sft_section(run: Run) -> str:
    """Supervised fine-tuning: its numbers and its loss."""
    loss = _Curve("loss", "loss, nats per token", 0, lowest=None, falls=True)
    charts = _curves(run, "sft", (loss,))
    facts = stages.sentence(run, "sft")
    if not charts and not facts:
        return ""
    text = (
        "Supervised fine-tuning reproduces the mixture of its demonstrations: some work the task "
        "out between <think> and </think>, others answer at once."
    )
    return section(
        "sft",
        "Fine-tuning",
        paragraph(f"{text} {facts}." if facts else text) + charts,
        stage_time(run, "sft"),
    )


def rl_section(run: Run) -> str:
    """Rewards and lengths over the steps, and rates before and after with 95 % intervals. Without
    reinforcement learning: the rates of the model as it is.
    """
    rates = figure(_rates_chart(run), _rates_caption(run), _rates_heading(run))
    answers = paragraph(words.answers(run))
    if not has_rl(run):
        text = (
            "This run has no reinforcement learning: these are the answers of the fine-tuned model."
        )
        return section("rl", "Unseen tasks", paragraph(text) + rates + answers if rates else "")
    text = "The model answers, a program says right or wrong, and nothing else is taught."
    facts = stages.sentence(run, "rl")
    body = _curves(run, "rl", _PROGRESS) + rates + answers + _what_it_shows(run) + _health(run)
    return section(
        "rl",
        "Reinforcement learning",
        paragraph(f"{text} {facts}." if facts else text) + body if body else "",
        stage_time(run, "rl"),
    )


def samples_section(run: Run) -> str:
    """The same tasks before and after reinforcement learning, side by side."""
    before = run.samples.get("before", [])
    after = run.samples.get("after", [])
    columns = {"before": "before RL", "after": "after RL"}
    if not after:
        columns = {"before": "the model"}
    elif not before:
        del columns["before"]
    right = [
        f"{sum(entry.get('verdict') == 'right' for entry in entries)} of {len(entries)} right"
        + (f" {when}" if len(columns) > 1 else "")
        for when, entries in (("before", before), ("after", after))
        if entries
    ]
    pairs = _paired(before, after)
    if not pairs:
        return ""
    text = (
        f"The same tasks, none of them trained on, answered greedily: {', '.join(right)}. Tasks "
        "like these are what the model can do; it was not taught to converse."
    )
    body = "".join(_sample(pair, columns) for pair in pairs)
    return section("samples", "In its own words", paragraph(text) + body)


def base_section(run: Run) -> str:
    """Completions by the pretrained model."""
    entries = run.samples.get("base", [])
    if not entries:
        return ""
    text = (
        "Before fine-tuning it can only go on with a text, in the manner of what it read. The "
        "beginning that it was given is pale. It was never taught to converse."
    )
    body = "".join(
        f'<pre dir="auto"><span class="given">{escape(_string(entry, "prompt"))}</span>'
        f"{escape(_string(entry, 'completion'))}</pre>"
        for entry in entries
    )
    return section("base", "The model underneath", paragraph(text) + body)


def _curves(run: Run, stage: str, curves: Sequence[_Curve]) -> str:
    return small_figures([_curve_figure(run, stage, curve) for curve in curves])


def _curve_figure(run: Run, stage: str, curve: _Curve) -> str:
    points = run.series(stage, curve.name)
    if not runs(points):
        return ""
    means = smooth(points, 0.05)
    lines = [Series("", points, curve.tone)]
    if len(points) >= _SMOOTHED_FROM:
        lines = [replace(lines[0], faint=True), Series("", means, curve.tone)]
    limit = early_limit(points, means) if curve.falls else math.inf
    title = f"{stage}: {curve.label}"
    axes = Axes(title, "step", curve.label, height=150, y_lowest=curve.lowest, y_limit=limit)
    caption = above_frame(points, frame_top(lines, axes)) + not_finite(points)
    return figure(line_chart(lines, axes), caption.strip())


def _health(run: Run) -> str:
    charts = _curves(run, "rl", _HEALTH)
    largest = run.written("rl.max_logprob_difference", digits)
    text = (
        f"Trainer and sampler differed by at most {largest} in the log-probability of a token."
        if largest
        else ""
    )
    return f"<h3>Health of the training</h3>{charts}{paragraph(text)}" if charts else ""


def _rates(run: Run) -> list[tuple[str, str]]:
    """(name in the keys `rl.<name>_before` and `_after`, heading) of every measured rate."""
    samples = {
        int(match[1])
        for key in run.results
        if (match := re.fullmatch(r"rl\.(?:avg|pass)(\d+)_(?:before|after)", key))
    }
    sampled = []
    for k in sorted(samples):
        answers = f"{k} sampled answers" if k > 1 else "one sampled answer"
        sampled.append((f"avg{k}", f"avg@{k}: the mean of {answers}"))
        sampled.append((f"pass{k}", f"pass@{k}: at least one of {answers} is right"))
    longer = run.text("rl.longer_tasks_are")
    return [
        ("greedy", "Greedy: the one most likely answer"),
        *sampled,
        (
            "longer_greedy",
            "Greedy, tasks longer than trained on" + (f": {longer}" if longer else ""),
        ),
    ]


def _rates_chart(run: Run) -> str:
    before, after, forced = ("before RL", "after RL", "before RL, made to think")
    if not has_rl(run):
        before, forced = ("the model", "the model, made to think")
    bars = []
    for name, group in _rates(run):
        bars += _bar(run, f"rl.{name}_before", Bar(before, 0.0, tone=5, group=group))
        bars += _bar(run, f"rl.{name}_after", Bar(after, 0.0, tone=0, group=group))
    equal_flops = "instead of RL, fine-tuning for as many FLOPs"
    for key, label in (("rl.forced_before", forced), ("rl.sft_equal_flops", equal_flops)):
        bars += _bar(run, key, Bar(label, 0.0, tone=1, group="Controls, greedy"))
    title = "Share of right answers"
    return bar_chart(bars, title=title, write=percent, maximum=1.0)


def _bar(run: Run, key: str, bar: Bar) -> list[Bar]:
    """`bar` with the value and interval of `key`, if that was measured."""
    value = run.number(key)
    if value is None:
        return []
    return [replace(bar, value=value, low=run.number(f"{key}_low"), high=run.number(f"{key}_high"))]


def _rates_heading(run: Run) -> str:
    return "Before and after" if has_rl(run) else ""


def _rates_caption(run: Run) -> str:
    tasks = run.written("rl.tasks", count)
    kind = run.text("rl.tasks_are")
    where = f"{tasks} tasks never trained on" if tasks else "Tasks never trained on"
    intervals = any(key.startswith("rl.") and key.endswith("_low") for key in run.results)
    return (
        where
        + (f": {kind}." if kind else ".")
        + (" Whiskers: 95\u202f% intervals over tasks." if intervals else "")
    )


def _what_it_shows(run: Run) -> str:
    sentences = [words.reinforcement(run), words.equal_flops(run), words.longer(run)]
    if not any(sentences):
        return ""
    caution = (
        "One environment and one seed: the intervals cover the choice of tasks, not the luck of a "
        "training run."
    )
    text = " ".join(sentence for sentence in (*sentences, caution) if sentence)
    return (
        '<div class="verdict"><h3>What this shows, and what it does not</h3>'
        f"{paragraph(text)}</div>"
    )


@dataclass(frozen=True)
class _Pair:
    """A task with its right answer and the samples of it under "before" and "after"."""

    prompt: str
    answer: str
    entries: dict[str, dict[str, Any]]


def _paired(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> list[_Pair]:
    """Pairs by prompt, in order of appearance: the two lists need not have the same length or
    order. A prompt that is asked again is a pair of its own.
    """
    pairs: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for name, entries in (("before", before), ("after", after)):
        asked: dict[str, int] = {}
        for entry in entries:
            prompt = _string(entry, "prompt")
            asked[prompt] = asked.get(prompt, 0) + 1
            pairs.setdefault((prompt, asked[prompt]), {})[name] = entry
    return [
        _Pair(prompt, max((_string(entry, "answer") for entry in found.values()), key=bool), found)
        for (prompt, _), found in pairs.items()
    ]


def _sample(pair: _Pair, columns: dict[str, str]) -> str:
    expected = f"<span>right answer: {escape(pair.answer)}</span>" if pair.answer else ""
    answers = "".join(
        _answer(title, pair.entries[name]) if name in pair.entries else "<div></div>"
        for name, title in columns.items()
    )
    return (
        f'<div class="sample"><div class="asked">{text_block(pair.prompt)}{expected}</div>'
        f'<div class="{"pair" if len(columns) > 1 else "single"}">{answers}</div></div>'
    )


_SIGNS = {
    "right": '<span class="sign right">✓ right</span>',
    "wrong": '<span class="sign wrong">✗ wrong</span>',
    "error": '<span class="sign">? not judged</span>',
}


def _answer(title: str, entry: dict[str, Any]) -> str:
    sign = _SIGNS.get(_string(entry, "verdict"), "")
    return f'<div class="answer"><h4>{escape(title)} {sign}</h4>{_transcript(entry)}</div>'


def _transcript(entry: dict[str, Any]) -> str:
    """What followed the question: thoughts, answers, tool calls and what came back."""
    messages = _dicts(entry.get("transcript"))[1:]
    if not messages:
        return ""
    own = [message for message in messages if message.get("role") == "assistant"]
    parts = [_message(message) for message in messages]
    if not any(_string(message, "reasoning_content").strip() for message in own):
        parts.insert(0, '<p class="silent">does not think</p>')
    if not own or not _string(own[-1], "content").strip():
        parts.append('<p class="silent">gives no answer</p>')
    return "".join(parts)


def _message(message: dict[str, Any]) -> str:
    content = _string(message, "content")
    if message.get("role") != "assistant":
        return text_block(f"{_string(message, 'role')}: {content}", "observed")
    calls = [call.get("function") for call in _dicts(message.get("tool_calls"))]
    texts = [(_string(message, "reasoning_content"), "thought"), (content, "")]
    texts += [
        (f"{_string(call, 'name')} {_string(call, 'arguments')}", "call") for call in _dicts(calls)
    ]
    return "".join(text_block(text, kind) for text, kind in texts if text.strip())


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _string(entry: dict[str, Any], key: str) -> str:
    value = entry.get(key)
    return "" if value is None else str(value)
