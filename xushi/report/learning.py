"""The report's sections on fine-tuning and reinforcement learning: curves, rates before and after,
samples.
"""

from collections.abc import Sequence
from typing import Any

from xushi.report import words
from xushi.report.charts import Bar, Series, bar_chart, line_chart
from xushi.report.elements import figure, paragraph, section, stage_time, text_block
from xushi.report.numbers import count, digits, escape, percent
from xushi.report.read import Run
from xushi.report.scales import smooth

_RATES = (
    ("greedy", "Greedy: the one most likely answer"),
    ("avg8", "avg@8: the mean of eight sampled answers"),
    ("pass8", "pass@8: at least one of eight is right"),
    ("longer_greedy", "Greedy, longer than any demonstration"),
)
_CONTROLS = (
    ("forced_before", "before RL, made to think"),
    ("sft_equal_time", "instead of RL, fine-tuning for the same time"),
)


def sft_section(run: Run) -> str:
    """Supervised fine-tuning: loss and greedy accuracy."""
    charts = _curves(
        run,
        "sft",
        (("loss", "loss, nats per token", 0, False), ("greedy", "greedy accuracy", 2, True)),
    )
    said = words.stage_sentence(run, "sft")
    if not charts and not said:
        return ""
    return section(
        "sft",
        "Demonstrations",
        paragraph(
            "Supervised fine-tuning reproduces the mixture of its demonstrations: some work the "
            "task out between <think> "
            "and </think>, others answer at once."
            + (f" {said[:1].upper()}{said[1:]}." if said else "")
        )
        + charts,
        stage_time(run, "sft"),
    )


def rl_section(run: Run) -> str:
    """Reward and length over the steps, rates before and after with 95 % intervals, and what they
    do not show.
    """
    main = _curves(
        run, "rl", (("reward", "mean reward", 2, True), ("length", "tokens in an answer", 0, True))
    )
    health = _curves(
        run,
        "rl",
        (
            ("entropy", "entropy, nats", 3, True),
            ("truncated", "share cut off", 1, True),
            ("max_ratio", "largest probability ratio", 4, False),
            ("logprob_difference", "log-probability, trainer minus sampler", 5, True),
            ("loss", "loss", 0, False),
        ),
    )
    bars = figure(_rates_chart(run), _rates_caption(run), "Before and after")
    shown = _what_it_shows(run) if bars else ""
    if not main and not bars:
        return ""
    said = words.stage_sentence(run, "rl")
    opening = "The model answers, a program says right or wrong, and nothing else is taught." + (
        f" {said[:1].upper()}{said[1:]}." if said else ""
    )
    return section(
        "rl",
        "Reinforcement learning",
        paragraph(opening)
        + main
        + bars
        + _lengths(run)
        + shown
        + (f"<h3>Health of the training</h3>{health}" if health else ""),
        stage_time(run, "rl"),
    )


def samples_section(run: Run) -> str:
    """The same tasks before and after reinforcement learning, side by side."""
    before, after = run.samples.get("before", []), run.samples.get("after", [])
    pairs = _paired(before, after)
    if not pairs:
        return ""
    kinds = [name for name, given in (("before", before), ("after", after)) if given]
    right = [
        f"{sum(entry.get('right') is True for entry in given)} of {len(given)} right {name}"
        for name, given in (("before", before), ("after", after))
        if given
    ]
    body = "".join(_sample(prompt, answer, entries, kinds) for prompt, answer, entries in pairs)
    return section(
        "samples",
        "In its own words",
        paragraph(
            "The same tasks, none of them trained on, answered greedily: "
            + ", ".join(right)
            + ". Tasks like these are "
            "what the model can do; it was not taught to converse."
        )
        + body,
    )


def base_section(run: Run) -> str:
    """What the pretrained model writes: completions, not conversation."""
    entries = run.samples.get("base", [])
    if not entries:
        return ""
    body = "".join(
        f'<pre dir="auto"><span class="given">{escape(_string(entry, "prompt"))}</span>'
        f"{escape(_string(entry, 'completion'))}</pre>"
        for entry in entries
    )
    return section(
        "base",
        "The model underneath",
        paragraph(
            "Before fine-tuning it can only go on with a text, in the manner of what it read. The "
            "beginning given to it is "
            "pale. It was never taught to converse."
        )
        + body,
    )


def _curves(run: Run, stage: str, wanted: Sequence[tuple[str, str, int, bool]]) -> str:
    charts = []
    for name, label, tone, from_zero in wanted:
        points = run.series(stage, name)
        lines = [Series("", points, tone)]
        if len(points) >= 60:
            lines = [Series("", points, tone, faint=True), Series("", smooth(points, 0.05), tone)]
        charts.append(
            figure(
                line_chart(
                    lines,
                    title=f"{stage}: {label}",
                    x_label="step",
                    y_label=label,
                    height=150,
                    y_floor=0.0 if from_zero else float("inf"),
                )
            )
        )
    body = "".join(charts)
    return f'<div class="small">{body}</div>' if body else ""


def _rates_chart(run: Run) -> str:
    bars = []
    for name, group in _RATES:
        for when, label, tone in (("before", "before RL", 5), ("after", "after RL", 0)):
            bars += _bar(run, f"rl.{name}_{when}", label, tone, group)
    for name, label in _CONTROLS:
        bars += _bar(run, f"rl.{name}", label, 1, "Controls, greedy")
    return bar_chart(
        bars, title="Share of right answers before and after", write=percent, maximum=1.0
    )


def _bar(run: Run, key: str, label: str, tone: int, group: str) -> list[Bar]:
    value = run.number(key)
    if value is None:
        return []
    return [Bar(label, value, run.number(f"{key}_low"), run.number(f"{key}_high"), tone, group)]


def _rates_caption(run: Run) -> str:
    tasks, sizes = run.number("rl.tasks"), run.text("rl.digits")
    where = (
        f"{count(tasks)} tasks never trained on" if tasks is not None else "Tasks never trained on"
    )
    where += f", of {sizes} digits" if sizes else ""
    intervals = any(key.startswith("rl.") and key.endswith("_low") for key in run.results)
    return where + "." + (" Whiskers: 95\u202f% intervals over tasks." if intervals else "")


def _lengths(run: Run) -> str:
    before, after = run.number("rl.length_before"), run.number("rl.length_after")
    if before is None or after is None:
        return ""
    return paragraph(
        f"An answer takes {digits(before)} tokens on average before and {digits(after)} after."
    )


def _what_it_shows(run: Run) -> str:
    sentences = [words.elicitation(run), words.equal_time(run), words.longer(run)]
    if not any(sentences):
        return ""
    caution = (
        "One environment and one seed: the intervals cover the choice of tasks, not the "
        "luck of a training run."
    )
    return (
        '<div class="verdict"><h3>What this shows, and what it does not</h3>'
        + paragraph(" ".join(one for one in [*sentences, caution] if one))
        + "</div>"
    )


def _paired(
    before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]
) -> list[tuple[str, str, dict[str, dict[str, Any]]]]:
    # By prompt, in the order of appearance: the two lists need not be equally long or equally
    # ordered.
    pairs: dict[str, dict[str, dict[str, Any]]] = {}
    for name, entries in (("before", before), ("after", after)):
        for entry in entries:
            prompt, copies = _string(entry, "prompt"), 0
            while name in pairs.get(f"{prompt}\0{copies}", {}):
                copies += 1
            pairs.setdefault(f"{prompt}\0{copies}", {})[name] = entry
    return [
        (
            key.rpartition("\0")[0],
            max((_string(entry, "answer") for entry in entries.values()), key=bool),
            entries,
        )
        for key, entries in pairs.items()
    ]


def _sample(
    prompt: str, answer: str, entries: dict[str, dict[str, Any]], kinds: Sequence[str]
) -> str:
    expected = f"<span>right answer: {escape(answer)}</span>" if answer else ""
    columns = "".join(
        _answer(kind, entries[kind]) if kind in entries else "<div></div>" for kind in kinds
    )
    return (
        f'<div class="sample"><div class="asked">{text_block(prompt)}{expected}</div>'
        f'<div class="{"pair" if len(kinds) > 1 else "single"}">{columns}</div></div>'
    )


def _answer(kind: str, entry: dict[str, Any]) -> str:
    sign = {
        True: '<span class="sign right">✓ right</span>',
        False: '<span class="sign wrong">✗ wrong</span>',
    }
    reasoning, content = _string(entry, "reasoning"), _string(entry, "content")
    right = entry.get("right")
    thought = (
        text_block(reasoning, "thought")
        if reasoning.strip()
        else '<p class="silent">does not think</p>'
    )
    said = text_block(content) if content.strip() else '<p class="silent">gives no answer</p>'
    return (
        f'<div class="answer"><h4>{escape(kind)} RL '
        f"{sign[right] if isinstance(right, bool) else ''}</h4>"
        f"{thought}{said}</div>"
    )


def _string(entry: dict[str, Any], key: str) -> str:
    value = entry.get(key)
    return "" if value is None else str(value)
