"""Commands about this machine and what lies on it: doctor, bench, cache, env."""

import json
from pathlib import Path
from typing import Annotated

import typer

from xushi.base.errors import BadInput
from xushi.cli.app import JsonOption, app, check_dtype

bench_app = typer.Typer(help="Measure this machine.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

env_app = typer.Typer(
    help="Environments: tasks whose answers can be verified.", no_args_is_help=True
)
app.add_typer(env_app, name="env")


@app.command()
def doctor(
    as_json: JsonOption = False,
) -> None:
    """Say what this machine can do, and what to do where it cannot."""
    from xushi.base.doctor import doctor_report
    from xushi.base.machine import best_training_dtype

    try:
        from xushi.ops import native

        forms = native.status(best_training_dtype()[0])
    except (ImportError, OSError):  # the report says so of torch
        forms = "none, since torch cannot be imported"
    findings = doctor_report(forms)
    if as_json:
        print(json.dumps([finding._asdict() for finding in findings]))
        return
    for finding in findings:
        print(f"{finding.name:<12} {finding.value}\n{'':<12} {finding.verdict}")


@app.command()
def cache(
    empty: Annotated[bool, typer.Option("--empty", help="remove what no process uses")] = False,
    older_than: Annotated[
        float | None,
        typer.Option(
            metavar="DAYS", min=0, help="with --empty: only what was not used for so long"
        ),
    ] = None,
) -> None:
    """Show what is kept for all runs (corpora, tokens, compiled kernels), and remove it."""
    from xushi.base.artifacts import Artifacts, cache_directory, cache_table

    if older_than is not None and not empty:
        raise BadInput("--older-than goes with --empty", "add --empty, or leave it out")
    kept = Artifacts()
    if empty:
        removed = kept.empty(older_than or 0.0)
        print(f"removed {len(removed)} entries, {sum(entry.bytes for entry in removed):,} bytes")
    entries = kept.entries()
    print(f"{cache_directory()}\n{cache_table(entries)}")


@bench_app.command("train")
def bench_train(
    name: Annotated[
        str,
        typer.Argument(
            metavar="[S|M|RECIPE]",
            help="a model of 20 (S) or 307 (M) million parameters, or a recipe's file for its own",
        ),
    ] = "S",
    dtype: Annotated[
        str, typer.Option(help="fp32, bf16, or auto: what training takes here")
    ] = "auto",
    rounds: Annotated[int, typer.Option(min=1, max=1_000_000, help="steps that are timed")] = 5,
    as_json: JsonOption = False,
) -> None:
    """Time whole training steps: tokens per second, share of the machine's limit, where the time
    goes.
    """
    from xushi.base.allocator import keep_freed_memory
    from xushi.run import benchmark_training, named_shape, sentences

    check_dtype(dtype)
    shape = named_shape(name)
    keep_freed_memory()
    result = benchmark_training(shape if dtype == "auto" else shape.but(dtype=dtype), rounds)
    if as_json:
        print(json.dumps(result))
        return
    print(sentences(result))


@env_app.command("check")
def env_check(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="FILE_OR_NAME", help="a built-in one, or a class of a file: game.py:Counting"
        ),
    ],
    as_json: JsonOption = False,
) -> None:
    """Prove an environment's contract, without a model; exit code 1 if a promise is broken."""
    from xushi.envs.check import as_lines, as_table, check_environment, kept

    findings = check_environment(kind, Path.cwd())
    print(json.dumps(as_table(findings)) if as_json else as_lines(findings))
    if not kept(findings):
        raise typer.Exit(1)
