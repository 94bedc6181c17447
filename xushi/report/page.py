"""`write_report`: the whole page from a run directory, one self-contained file.

The same run directory gives the same bytes: the page holds no time but the run's own. It refers to
nothing outside itself, and a content security policy forbids it to, whatever a sample contains.
"""

from datetime import UTC, datetime
from pathlib import Path

from xushi.base.files import write_atomic
from xushi.report import words
from xushi.report.elements import document, key_figures, kicker, paragraph
from xushi.report.numbers import count, digits, duration, escape, memory, percent
from xushi.report.read import Run, open_run
from xushi.report.sections_pretrain import compression_section, pretrain_section, router_section
from xushi.report.sections_rl import base_section, rl_section, samples_section, sft_section
from xushi.report.sections_run import (
    data_section,
    machine_section,
    numbers_section,
    recipe_section,
    story_section,
)

_SECTIONS = (
    data_section,
    pretrain_section,
    router_section,
    compression_section,
    sft_section,
    rl_section,
    samples_section,
    base_section,
    machine_section,
    recipe_section,
    numbers_section,
)


def write_report(run_directory: Path) -> Path:
    """Write `report.html` into a run directory from what it holds and return its path.

    Raises `XushiError` if the directory holds no run, a file in it is damaged, or the page cannot
    be written.
    """
    with open_run(run_directory) as run:
        page = page_of(run)
    path = run_directory / "report.html"
    write_atomic(path, page)
    return path


def page_of(run: Run) -> str:
    """The page as HTML."""
    body = "".join(make(run) for make in _SECTIONS)
    name = run.text("run.name") or run.directory.resolve().name
    return document(
        name,
        f"{_header(run, name)}\n<main>{story_section(run, body)}{body}</main>\n{_footer(run)}",
    )


def _header(run: Run, name: str) -> str:
    began = run.began()
    day = ""
    if began is not None:
        date = datetime.fromtimestamp(began, UTC)
        day = f' <span class="day">· {date:%Y-%m-%d}</span>'
    sentences = (words.control_run(run), words.reinforcement(run), words.yardstick(run))
    return (
        f"<header>{kicker(escape(name) + day)}"
        f"<h1>{escape(words.headline(run))}</h1>"
        + "".join(paragraph(sentence, "lede") for sentence in sentences)
        + f"{_figures(run)}</header>"
    )


def _figures(run: Run) -> str:
    before = run.written("rl.greedy_before", percent)
    after = run.written("rl.greedy_after", percent)
    accuracy = "greedy accuracy, before and after RL" if after else "greedy accuracy, unseen tasks"
    active = run.written("model.parameters_active", count)
    entries = [
        (run.written("evaluate.bits_per_byte", digits), "bits per byte, held-out"),
        (" → ".join(rate for rate in (before, after) if rate), accuracy),
        (
            run.written("model.parameters_total", count),
            "parameters" + (f", {active} active for a token" if active else ""),
        ),
        (run.written("pretrain.tokens", count), "tokens of pretraining"),
        (run.written("seconds.total", duration), "from raw text to here"),
        (run.written("memory.peak_bytes", memory), "of memory at the peak"),
    ]
    return key_figures(entries)


def _footer(run: Run) -> str:
    digest = run.text("run.recipe_hash")
    seed = run.text("run.seed")
    parts = [
        f"xushi {run.text('run.version')}".strip(),
        f"recipe {digest}" if digest else "",
        f"seed {seed}" if seed else "",
    ]
    return f"<footer><p>{escape(' · '.join(part for part in parts if part))}</p></footer>"
