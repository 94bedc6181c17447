"""Commands on ideas: try one, list what was tried, judge published logs."""

import itertools
import json
import os
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from xushi.base.errors import BadInput
from xushi.base.progress import say
from xushi.cli.app import JsonOption, app

if TYPE_CHECKING:
    from xushi.ladder import Judged, Result

EXIT_CODES = {"better": 0, "none": 10, "worse": 11, "unsettled": 12}

LedgerOption = Annotated[
    Path, typer.Option("--ledger", metavar="DIR", help="where questions, runs and verdicts are")
]


@app.command("try")
def try_ideas(
    ideas: Annotated[
        list[Path] | None, typer.Argument(metavar="IDEA...", help="files such as ideas/muon.toml")
    ] = None,
    ledger: LedgerOption = Path("ladder"),
    workers: Annotated[
        int | None, typer.Option(min=1, help="runs at once; default: the cores, with a thread each")
    ] = None,
    logs: Annotated[
        Path | None, typer.Option("--judge", metavar="CSV", help="judge published runs instead")
    ] = None,
    columns: Annotated[
        str, typer.Option(help="with --judge: its columns ARM,RUN,METRIC and, if it has one, SEED")
    ] = "arm,run,metric",
    arms: Annotated[
        str | None,
        typer.Option(help="with --judge: BASELINE,VARIANT; default: each arm and the one before"),
    ] = None,
    smallest_effect: Annotated[
        float | None, typer.Option(help="with --judge: what would not interest anybody")
    ] = None,
    higher_is_better: Annotated[
        bool, typer.Option("--higher-is-better", help="with --judge: more of the metric is better")
    ] = False,
    as_json: JsonOption = False,
) -> int:
    """Ask whether a variant beats its baseline, by pairs of runs. The exit code is 0 for better, 10
    for no effect of interest, 11 for worse and 12 for unsettled.
    """
    if logs is not None:
        if ideas:
            raise BadInput("an idea and --judge are given", "give one of the two")
        return _judge_logs(logs, columns, arms, smallest_effect, higher_is_better, as_json)
    if not ideas:
        raise BadInput("no idea is given", "give a file such as ideas/muon.toml, or --judge LOGS")
    names = [idea.stem for idea in ideas]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise BadInput(
            f"two ideas have the name {twice[0]}", "rename one of the files: names are by file"
        )
    from xushi.base.machine import inspect
    from xushi.ladder import try_idea

    at_once = workers or inspect().usable_cores
    for idea in ideas:
        result = try_idea(idea, ledger, at_once, Path.cwd())
        _write_pages(ledger, result.entry, idea)
        print(json.dumps(_as_json(result)) if as_json else _sentence(result))
    return EXIT_CODES[result.verdict]


@app.command()
def tried(ledger: LedgerOption = Path("ladder"), as_json: JsonOption = False) -> None:
    """List the questions of a ledger, their verdicts, and what they cost."""
    from xushi.ladder import Ledger
    from xushi.ladder.account import account
    from xushi.ladder.ledger import FILE
    from xushi.ladder.page import write_ledger_page

    if not (ledger / FILE).is_file():
        raise BadInput(f"there is no ledger at {ledger}", "try an idea first, or give --ledger DIR")
    book = Ledger(ledger)
    try:
        found = account(book)
        page = write_ledger_page(book)
    finally:
        book.close()
    say(f"page: {page}")
    if as_json:
        print(json.dumps(found.as_json()))
    else:
        print(found.table())


@app.command(hidden=True)
def arm(
    recipe: Path,
    assignments: Annotated[list[str] | None, typer.Argument()] = None,
) -> None:
    """Pretrain a recipe and print what it came to: what `xushi try` runs for an idea about one."""
    from xushi.ladder.arm import measure
    from xushi.ladder.jobs import DIRECTORY

    place = os.environ.get(DIRECTORY)
    if not place:
        raise BadInput(f"{DIRECTORY} is not set", "use xushi try, which runs this")
    print(json.dumps(measure(recipe, assignments or [], Path(place) / "run")))


def _write_pages(directory: Path, entry: int, idea: Path) -> None:
    from xushi.ladder import Ledger
    from xushi.ladder.page import write_idea_page, write_ledger_page

    book = Ledger(directory)
    try:
        command = shlex.join(["xushi", "try", str(idea), "--ledger", str(directory)])
        say(f"page: {write_idea_page(book, entry, command)}")
        write_ledger_page(book)
    finally:
        book.close()


def _judge_logs(
    path: Path,
    columns: str,
    arms: str | None,
    smallest_effect: float | None,
    higher_is_better: bool,
    as_json: bool,
) -> int:
    from xushi.ladder import judge, read_logs
    from xushi.ladder.numbers import finite

    if smallest_effect is None or not smallest_effect > 0:
        raise BadInput(
            "--judge needs --smallest-effect", "give what would not interest anybody, such as 0.001"
        )
    names = [name.strip() for name in columns.split(",")]
    if len(names) not in (3, 4):
        raise BadInput(f"--columns {columns} has {len(names)} names", "give ARM,RUN,METRIC[,SEED]")
    read = read_logs(path, names, higher_is_better)
    known = list(read.runs)
    pairs = list(itertools.pairwise(known))
    if arms is not None:
        named = [name.strip() for name in arms.split(",")]
        if len(named) != 2:
            raise BadInput(f"--arms {arms} names {len(named)} arms", "give BASELINE,VARIANT")
        pairs = [(named[0], named[1])]
    found = [judge(read, baseline, variant, smallest_effect) for baseline, variant in pairs]
    for each in found:
        print(json.dumps(finite(asdict(each))) if as_json else _line(each))
    return EXIT_CODES[found[-1].verdict] if len(found) == 1 else 0


def _as_json(result: "Result") -> dict[str, object]:
    from xushi.ladder.numbers import finite

    table: dict[str, object] = finite(asdict(result))
    return table | {"interval": [table.pop("low"), table.pop("high")]}


def _sentence(result: "Result") -> str:
    return (
        f"{result.name}: {result.verdict}{', promoted' if result.promoted else ''}: "
        f"gain {result.difference:.4g} ({result.low:.4g} to {result.high:.4g}), "
        f"{result.pairs} pairs, {result.seconds:.0f} s: {result.reason}"
    )


def _line(judged: "Judged") -> str:
    return (
        f"{judged.variant} against {judged.baseline}: {judged.verdict}: "
        f"gain {judged.difference:.4g} ({judged.low:.4g} to {judged.high:.4g}), "
        f"{judged.variant_runs} and {judged.baseline_runs} runs"
        f"{', paired' if judged.paired else ''}: {judged.reason}"
    )
