"""The report's sections on the run itself: stages, text, machine, recipe, and every number."""

from typing import Any

from xushi.data.left_out import REASONS, in_short
from xushi.report import stages, words
from xushi.report.elements import fact_grid, paragraph, section, stage_time
from xushi.report.numbers import count, digits, duration, escape, memory, percent, raw, size
from xushi.report.read import Run
from xushi.run.stages.data import GROUPS_NAMED


def story_section(run: Run, body: str) -> str:
    """The stages in order, each with what it did and its share of the time. `body` is the rest of
    the page: a stage is linked to its section there.
    """
    names = stages.story(run)
    times = {name: run.number(f"seconds.{name}") for name in names}
    total = sum(seconds for seconds in times.values() if seconds is not None)
    rows = [_story_row(run, name, times[name], total, body) for name in names]
    whole = run.written("seconds.total", duration)
    return section(
        "story",
        "From text to model",
        f'<ol class="story">{"".join(rows)}</ol>' if rows else "",
        f"{whole} in all" if whole else "",
    )


def _story_row(run: Run, name: str, seconds: float | None, total: float, body: str) -> str:
    title = escape(stages.title(name))
    target = stages.section_of(name)
    if f'<section id="{target}">' in body:
        title = f'<a href="#{target}">{title}</a>'
    bar = ""
    if seconds is not None and total > 0:
        share = max(0.0, 100 * seconds / total)
        bar = f'<span class="share"><i style="width:{share:.2f}%"></i></span>'
    return (
        f'<li class="{"named" if seconds is None else "real"}"><b>{title}</b>'
        f'<span class="did">{escape(stages.sentence(run, name))}</span>'
        f'<span class="time">{escape(run.written(f"seconds.{name}", duration))}</span>{bar}</li>'
    )


def data_section(run: Run) -> str:
    """The corpus and the tokenizer."""
    share = run.written("data.heldout_fraction", percent)
    heldout = run.written("data.heldout_bytes", size)
    grid = fact_grid(
        [
            ("text", run.written("data.bytes", size)),
            ("documents", run.written("data.documents", count)),
            ("tokens to train on", run.written("data.train_tokens", count)),
            ("held out", heldout + (f" ({share})" if share else "")),
            ("vocabulary", run.written("tokenizer.vocab_size", count)),
            ("bytes in a token", run.written("tokenizer.bytes_per_token", digits)),
        ]
    )
    digest = run.text("data.sha256")
    body = (
        grid
        + paragraph(_heldout(run))
        + paragraph(words.overlap(run))
        + paragraph(_left_out(run))
        + paragraph(f"SHA-256 {digest}" if digest else "", "hash")
    )
    return section("data", "The text", body, stage_time(run, "data"))


def _left_out(run: Run) -> str:
    """What the sources leave out, by reason."""
    counts = {reason: int(run.number(f"data.left_out.{reason}") or 0) for reason in REASONS}
    told = in_short(counts)
    return f"Left out: {told}." if told else ""


def _heldout(run: Run) -> str:
    """What the held-out text is: whole groups by name, or the tail of every document."""
    if run.text("data.heldout_rule") == "tails":
        return "The tail of every document is held out."
    named = run.text("data.heldout_groups_named")
    groups = run.number("data.heldout_groups")
    if not named or groups is None:
        return ""
    those = "One group is" if groups == 1 else f"{count(groups)} groups are"
    return f"{those} held out whole{', such as' if groups > GROUPS_NAMED else ':'} {named}."


def machine_section(run: Run) -> str:
    """The machine and the software that the run used."""
    grid = fact_grid(
        [
            ("processor", run.text("machine.cpu")),
            ("device", run.text("machine.device")),
            ("cores", run.text("machine.cores")),
            ("threads used", run.text("machine.threads")),
            ("memory", run.written("machine.memory_bytes", memory)),
            ("peak memory of the run", run.written("memory.peak_bytes", memory)),
            ("peak memory of a subprocess", run.written("memory.peak_children_bytes", memory)),
            ("number format", run.text("machine.dtype")),
            ("op forms", run.text("machine.op_forms")),
            ("system", run.text("machine.system")),
            ("PyTorch", run.text("machine.torch")),
            ("Python", run.text("machine.python")),
            ("xushi", run.text("run.version")),
            ("seed", run.text("run.seed")),
        ]
    )
    return section("machine", "The machine", grid)


def recipe_section(run: Run) -> str:
    """The recipe as the run directory holds it."""
    digest = run.text("run.recipe_hash")
    if not run.recipe.strip():
        return ""
    text = "Everything that was asked for. The same recipe on the same machine gives the same bits."
    return section(
        "recipe",
        "The recipe",
        paragraph(text) + f"<pre>{escape(run.recipe.strip())}</pre>",
        f"hash {digest[:12]}" if digest else "",
    )


def numbers_section(run: Run) -> str:
    """Every key of results.json with every digit of its value."""
    groups: dict[str, list[tuple[str, Any]]] = {}
    for key in sorted(run.results):
        groups.setdefault(key.partition(".")[0], []).append((key, run.results[key]))
    tables = "".join(_table(group, rows) for group, rows in groups.items())
    text = paragraph("As results.json holds them.")
    body = f'{text}<div class="numbers">{tables}</div>' if tables else ""
    return section("numbers", "Every number", body)


def _table(group: str, rows: list[tuple[str, Any]]) -> str:
    cells = "".join(
        f'<tr><th scope="row">{escape(key)}</th><td>{escape(raw(value))}</td></tr>'
        for key, value in rows
    )
    return f"<table><caption>{escape(group)}</caption>{cells}</table>"
