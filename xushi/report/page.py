"""`write_report`: the whole page from a run directory, one self-contained file.

The same run directory gives the same bytes: the page holds no time but the run's own. It refers to
nothing outside itself, and a content security policy forbids it to, whatever a sample contains.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from xushi.base.files import write_atomic
from xushi.report import words
from xushi.report.elements import facts, paragraph, section, stage_time
from xushi.report.learning import base_section, rl_section, samples_section, sft_section
from xushi.report.numbers import count, digits, duration, escape, memory, percent, raw, size
from xushi.report.read import Run, open_run
from xushi.report.style import SCRIPT, STYLE
from xushi.report.training import compression_section, pretrain_section, router_section

_STAGES = (
    ("data", "Data", "data"),
    ("tokenizer", "Tokenizer", "data"),
    ("pretrain", "Pretraining", "pretrain"),
    ("sft", "Demonstrations", "sft"),
    ("rl", "Rewards", "rl"),
    ("evaluate", "Evaluation", "bits"),
    ("export", "Export", "numbers"),
)
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def write_report(run_directory: Path) -> Path:
    """Write `report.html` into a run directory from what it holds and return its path.

    Raises `XushiError` where the directory holds no run, a file in it is damaged, or it cannot be
    written.
    """
    with open_run(run_directory) as run:
        page = _page(run)
    path = run_directory / "report.html"
    write_atomic(path, page)
    return path


def _page(run: Run) -> str:
    sections = (
        _data_section,
        pretrain_section,
        router_section,
        compression_section,
        sft_section,
        rl_section,
        samples_section,
        base_section,
        _machine_section,
        _recipe_section,
        _numbers_section,
    )
    body = "".join(make(run) for make in sections)
    story = _story_section(run, body)
    name = run.text("run.name") or run.directory.resolve().name
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{escape(name)} · xushi 虚实</title><style>{STYLE}</style></head>\n<body>"
        f"{_header(run, name)}\n<main>{story}{body}</main>\n{_footer(run)}<script>{SCRIPT}</script>"
        "</body></html>\n"
    )


def _header(run: Run, name: str) -> str:
    started = run.started()
    day = "" if started is None else f" · {datetime.fromtimestamp(started, UTC):%Y-%m-%d}"
    lede = paragraph(words.yardstick(run), "lede") + paragraph(words.elicitation(run), "lede")
    return (
        '<header><div class="kicker"><span class="mark">xushi</span><span class="hanzi" '
        'lang="zh-Hans">'
        f'<span class="void">虚</span>实</span><span>{escape(name + day)}</span>'
        '<button id="theme" type="button" hidden>light / dark</button></div>'
        f"<h1>{escape(words.headline(run))}</h1>{lede}{_figures(run)}</header>"
    )


def _figures(run: Run) -> str:
    before, after = run.number("rl.greedy_before"), run.number("rl.greedy_after")
    accuracy = "" if before is None or after is None else f"{percent(before)} → {percent(after)}"
    active = run.number("model.parameters_active")
    entries = [
        (_read(run, "evaluate.bits_per_byte", digits), "bits per byte, held-out"),
        (accuracy, "greedy accuracy, before and after RL"),
        (
            _read(run, "model.parameters_total", count),
            "parameters" + (f", {count(active)} active for a token" if active is not None else ""),
        ),
        (_read(run, "pretrain.tokens", count), "tokens of pretraining"),
        (_read(run, "seconds.total", duration), "from raw text to here"),
        (_read(run, "memory.peak_bytes", memory), "of memory at the peak"),
    ]
    items = "".join(
        f'<div class="figure"><b>{escape(value)}</b><span>{escape(label)}</span></div>'
        for value, label in entries
        if value
    )
    return f'<div class="figures">{items}</div>' if items else ""


def _story_section(run: Run, body: str) -> str:
    rows = []
    times = {stage: run.number(f"seconds.{stage}") for stage, _, _ in _STAGES}
    total = max(
        run.number("seconds.total") or 0.0,
        sum(value for value in times.values() if value is not None),
    )
    for stage, title, target in _STAGES:
        said, seconds = words.stage_sentence(run, stage), times[stage]
        if not said and seconds is None:
            continue
        linked = f'<a href="#{target}">{title}</a>' if f'<section id="{target}">' in body else title
        share = max(0.0, 100 * seconds / total) if seconds is not None and total > 0 else None
        bar = (
            ""
            if share is None
            else f'<span class="share"><i style="width:{share:.2f}%"></i></span>'
        )
        time = "" if seconds is None else escape(duration(seconds))
        rows.append(
            f'<li class="{"real" if seconds is not None else "named"}"><b>{linked}</b>'
            f'<span class="said">{escape(said[:1].upper() + said[1:])}</span>'
            f'<span class="time">{time}</span>{bar}</li>'
        )
    whole = run.number("seconds.total")
    return section(
        "story",
        "From text to model",
        f'<ol class="story">{"".join(rows)}</ol>' if rows else "",
        "" if whole is None else f"{duration(whole)} in all",
    )


def _data_section(run: Run) -> str:
    share = _read(run, "data.heldout_fraction", percent)
    grid = facts(
        [
            ("text", _read(run, "data.bytes", size)),
            ("documents", _read(run, "data.documents", count)),
            ("tokens to train on", _read(run, "data.train_tokens", count)),
            ("held out", _read(run, "data.heldout_bytes", size) + (f" ({share})" if share else "")),
            ("groups held out whole", _read(run, "data.heldout_groups", count)),
            ("vocabulary", _read(run, "tokenizer.vocab_size", count)),
            ("bytes in one token", _read(run, "tokenizer.bytes_per_token", digits)),
        ]
    )
    digest = run.text("data.sha256")
    body = grid + paragraph(f"SHA-256 {digest}" if digest else "", "hash")
    return section("data", "The text", body, stage_time(run, "data"))


def _machine_section(run: Run) -> str:
    grid = facts(
        [
            ("processor", run.text("machine.cpu")),
            ("cores", run.text("machine.cores")),
            ("threads used", run.text("machine.threads")),
            ("memory", _read(run, "machine.memory_bytes", memory)),
            ("peak memory of the run", _read(run, "memory.peak_bytes", memory)),
            ("number format", run.text("machine.dtype")),
            ("op forms", run.text("machine.op_forms")),
            ("PyTorch", run.text("machine.torch")),
            ("Python", run.text("machine.python")),
            ("xushi", run.text("run.version")),
            ("seed", run.text("run.seed")),
        ]
    )
    return section("machine", "The machine", grid)


def _recipe_section(run: Run) -> str:
    digest = run.text("run.recipe_hash")
    if not run.recipe.strip():
        return ""
    return section(
        "recipe",
        "The recipe",
        paragraph(
            "Everything that was asked for. The same recipe on the same machine gives the same "
            "bits."
        )
        + f"<pre>{escape(run.recipe.strip())}</pre>",
        f"hash {digest[:12]}" if digest else "",
    )


def _numbers_section(run: Run) -> str:
    groups: dict[str, list[tuple[str, Any]]] = {}
    for key in sorted(run.results):
        groups.setdefault(key.partition(".")[0], []).append((key, run.results[key]))
    tables = "".join(
        f"<table><caption>{escape(group)}</caption>"
        + "".join(
            f'<tr><th scope="row">{escape(key)}</th><td>{escape(raw(value))}</td></tr>'
            for key, value in rows
        )
        + "</table>"
        for group, rows in groups.items()
    )
    return section(
        "numbers",
        "Every number",
        paragraph("As they stand in results.json.") + f'<div class="numbers">{tables}</div>'
        if tables
        else "",
    )


def _footer(run: Run) -> str:
    parts = [
        f"xushi {run.text('run.version')}".strip(),
        f"recipe {run.text('run.recipe_hash')}" if run.text("run.recipe_hash") else "",
        f"seed {run.text('run.seed')}" if run.text("run.seed") else "",
    ]
    return f"<footer><p>{escape(' · '.join(part for part in parts if part))}</p></footer>"


def _read(run: Run, key: str, write: Any) -> str:
    value = run.number(key)
    return "" if value is None else str(write(value))
