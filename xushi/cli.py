"""The door: one verb per job, each a thin call into the rooms below. Nothing heavy is imported
before it is needed.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

# Set before torch is imported anywhere. Waiting threads must not burn a shared machine, but to
# sleep at once costs a wake-up at each of the thousands of small products of a step: a spin of some
# microseconds is 1.6 times as fast as none and as the default's long one (docs/lab-log.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
# oneDNN keeps a compiled kernel per matrix shape, and sampling meets new shapes at every step: its
# default of 1,024 holds up to a gigabyte, and this is as fast.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import typer

from xushi.base.errors import BadInput, XushiError

app = typer.Typer(
    name="xushi",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Raw text in, a served DeepSeek-style reasoning model out.",
)

bench_app = typer.Typer(help="Measure this machine.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

env_app = typer.Typer(
    help="Environments: tasks whose answers can be verified.", no_args_is_help=True
)
app.add_typer(env_app, name="env")

RecipeArgument = Annotated[
    Path | None, typer.Argument(help="the recipe; recipes/demo.toml if left out")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="override a key of the recipe"),
]
RunArgument = Annotated[Path, typer.Argument(help="a run directory, such as runs/demo")]


@app.command("run")
def run_command(
    recipe: RecipeArgument = None,
    assignments: SetOption = None,
    out: Annotated[
        Path | None, typer.Option(help="the run directory; runs/<name> if left out")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="train on these files instead of the recipe's sources")
    ] = None,
    stages: Annotated[
        str | None, typer.Option(help="comma-separated: data,tokenizer,pretrain[,sft[,rl]]")
    ] = None,
    without: Annotated[
        str | None, typer.Option(metavar="STAGE", help="leave this stage out, as a control")
    ] = None,
    update: Annotated[
        bool, typer.Option(help="use a directory of another recipe; changed stages run again")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say what it would cost, and start nothing")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print figures as JSON")] = False,
) -> None:
    """Run a recipe: every stage from raw text to a served model; the same command goes on after an
    interruption.
    """
    from xushi.report import write_report
    from xushi.run import describe, run
    from xushi.run.recipe import load_recipe

    loaded = load_recipe(
        recipe or default_recipe(),
        assignments or [],
        text,
        [part.strip() for part in stages.split(",")] if stages is not None else None,
        without,
    )
    directory = out or Path("runs") / (
        loaded.name + (f"-without-{loaded.without}" if loaded.without else "")
    )
    if dry_run:
        plan = describe(loaded)
        if as_json:
            print(json.dumps(plan))
        else:
            print(loaded.to_toml())
            _table(plan)
        return
    try:
        results = run(loaded, directory, update)
        if results is None:
            return  # the first process speaks for all
        page = write_report(directory)
    except KeyboardInterrupt:
        print(
            f"\nstopped; everything done so far is in {directory}\n"
            "run the same command again and it goes on from there",
            file=sys.stderr,
        )
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps(results))
        return
    _headline(results)
    print(f"\nreport: {page}\nnext:   xushi chat {directory}\n        xushi serve {directory}")


@app.command()
def launch(
    recipe: RecipeArgument = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="write a job file for sbatch")] = False,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="start on this Ray cluster (auto: the one here)"),
    ] = None,
    nodes: Annotated[int, typer.Option(help="machines")] = 1,
    processes: Annotated[
        int, typer.Option(help="processes on each; with GPUs one for each GPU")
    ] = 1,
    restarts: Annotated[
        int, typer.Option(help="how often to start anew when a process or a machine is lost")
    ] = 10,
    gpus: Annotated[bool, typer.Option("--gpus", help="one GPU for each process")] = False,
    assignments: SetOption = None,
    out: Annotated[
        Path | None, typer.Option(help="the run directory, which all machines must see")
    ] = None,
) -> None:
    """Run a recipe on many machines; with layout.fewest in it, on those that are left when some are
    lost.
    """
    from xushi.run.launch import Launch, launch_on_ray, write_slurm_job
    from xushi.run.recipe import load_recipe

    if slurm == (ray is not None):
        raise BadInput("a launch is either --slurm or --ray ADDRESS", "give one of them")
    file = recipe or default_recipe()
    loaded = load_recipe(file, assignments or [])
    directory = out or Path("runs") / loaded.name
    words = (
        str(file),
        "--out",
        str(directory),
        *(word for each in assignments or [] for word in ("--set", each)),
    )
    plan = Launch(nodes, processes, restarts, words)
    if ray is not None:
        launch_on_ray(loaded, plan, ray, gpus)
    else:
        print(f"sbatch {write_slurm_job(loaded, plan, directory, gpus)}")


def default_recipe() -> Path:
    """The demo's recipe: the checkout's, or the copy inside an installed package."""
    here = Path("recipes/demo.toml")
    return here if here.exists() else Path(__file__).parent / "recipes" / "demo.toml"


@app.command()
def chat(run_directory: RunArgument) -> None:
    """Talk to a run's model in the terminal."""
    from xushi.serve import chat as terminal_chat

    terminal_chat(run_directory)


@app.command()
def serve(
    run_directory: RunArgument,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on")] = 8000,
) -> None:
    """Serve a run's models: the OpenAI-compatible API, and a chat page at /."""
    from xushi.serve import serve as serve_run

    serve_run(run_directory, host, port)


@app.command()
def report(run_directory: RunArgument) -> None:
    """Write report.html again from a run's numbers."""
    from xushi.report import write_report

    print(write_report(run_directory))


@app.command()
def replay(
    run_directory: RunArgument,
    step: Annotated[int, typer.Option(help="the step, from 1")],
    stage: Annotated[str, typer.Option(help="pretrain or sft")] = "pretrain",
    loss: Annotated[
        bool, typer.Option(help="compute its loss again, from the last checkpoint before it")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="print figures as JSON")] = False,
) -> None:
    """Show which bytes a training step saw, and compute its loss again."""
    from xushi.run import replay as replay_step
    from xushi.run import replay_sentences

    result = replay_step(run_directory, step, stage, loss)
    print(json.dumps(result) if as_json else replay_sentences(result))


@app.command("export-metrics")
def export_metrics_command(
    run_directory: RunArgument,
    to: Annotated[
        str, typer.Option(help="tensorboard, wandb (offline) or trackio")
    ] = "tensorboard",
    out: Annotated[
        Path | None, typer.Option(help="where its files go; <run>/<name> if left out")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="go on with what a run writes, until Ctrl-C")
    ] = False,
) -> None:
    """Write a run's metrics for another program's page."""
    from xushi.run import export_metrics

    export_metrics(run_directory, to, out, follow)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="print findings as JSON")] = False,
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
    rounds: Annotated[int, typer.Option(help="steps that are timed")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="print figures as JSON")] = False,
) -> None:
    """Time whole training steps: tokens per second, share of the machine's limit, where the time
    goes.
    """
    from xushi.base.allocator import keep_freed_memory
    from xushi.run import benchmark_training, named_shape, sentences

    if dtype not in ("auto", "fp32", "bf16"):
        raise BadInput(f"--dtype {dtype} is not known", "give auto, fp32 or bf16")
    if rounds < 1:
        raise BadInput(f"--rounds {rounds} times nothing", "give at least 1")
    shape = named_shape(name)
    keep_freed_memory()
    result = benchmark_training(shape if dtype == "auto" else shape.but(dtype=dtype), rounds)
    if as_json:
        print(json.dumps(result))
        return
    print(sentences(result))


@app.command()
def inspect(
    model: Annotated[
        str, typer.Argument(help="a model's directory, or a preset such as deepseek-v3")
    ],
    context: Annotated[int, typer.Option(help="tokens of context for cache and FLOPs")] = 4096,
    mtp: Annotated[bool, typer.Option(help="count multi-token prediction in training")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="print figures as JSON")] = False,
) -> None:
    """Count a model's parameters, cache and FLOPs without loading it."""
    from xushi.model import preset, read_config
    from xushi.plan import group_layers, inspect_model

    if context < 1:
        raise BadInput(f"--context {context} is not a length", "give at least 1")
    counted = inspect_model(
        read_config(model) if Path(model).is_dir() else preset(model), context, mtp
    )
    if as_json:
        print(json.dumps(counted))
        return
    layers = counted.pop("layers")
    _table(counted)
    columns = [
        name
        for name in ("attention", "feed_forward", "hyper_connections", "active")
        if any(layer[name] for layer in layers)
    ]
    groups = group_layers(layers)
    width = max(12, *(len(span) + 2 for span, _ in groups))
    print(
        f"\n{'layers':<{width}}{'':<26}"
        + "".join(f"{name.replace('_', '-'):>18}" for name in columns)
    )
    for span, layer in groups:
        print(
            f"{span:<{width}}{layer['kind']:<26}"
            + "".join(f"{layer[name]:>18,}" for name in columns)
        )


@app.command()
def export(
    directory: Annotated[
        Path, typer.Argument(help="a model's directory, such as runs/demo/export/reasoning")
    ],
    out: Annotated[Path, typer.Argument(help="the file to write, such as demo.gguf")],
    kind: Annotated[
        str, typer.Option("--type", help="how matrices are stored: bf16 or q8_0")
    ] = "bf16",
    as_json: Annotated[bool, typer.Option("--json", help="print figures as JSON")] = False,
) -> None:
    """Write a model as a GGUF file, which llama.cpp and what is built on it load."""
    from xushi.model.gguf_export import export_gguf

    written = export_gguf(directory, out, kind)
    if as_json:
        print(json.dumps(written))
    else:
        _table(written)


@env_app.command("check")
def env_check(
    kind: Annotated[
        str, typer.Argument(metavar="FILE_OR_NAME", help="such as game.py:Counting or digit_sum")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="print findings as JSON")] = False,
) -> None:
    """Prove an environment's contract, without a model; exit code 1 if a promise is broken."""
    from xushi.envs.check import as_lines, as_table, check_environment, kept

    findings = check_environment(kind, Path.cwd())
    print(json.dumps(as_table(findings)) if as_json else as_lines(findings))
    if not kept(findings):
        raise typer.Exit(1)


def _table(values: dict[str, Any]) -> None:
    for key, value in values.items():
        shown = f"{value:,}" if isinstance(value, int) else value
        if isinstance(value, float):
            shown = f"{value:,.1f}" if value >= 10 else f"{value:.3g}"
        print(f"{key:<44} {shown}")


def _headline(results: dict[str, Any]) -> None:
    """The few numbers that say whether it worked."""
    for key in (
        "evaluate.bits_per_byte",
        "evaluate.bits_per_byte_xz",
        "evaluate.bits_per_byte_xz_primed",
        "rl.greedy_before",
        "rl.greedy_after",
        "rl.forced_before",
        "rl.sft_equal_time",
        "seconds.total",
    ):
        if key in results:
            print(f"{key:<36} {results[key]:.3f}")


def guarded(action: Callable[[], Any]) -> int:
    """Run `action`; what a user can cause becomes two lines and an exit code, never a traceback."""
    try:
        action()
    except XushiError as error:
        rank = os.environ.get("RANK", "0")  # torchrun's: what all of them meet is said once in full
        said = (
            f"error: {error.problem}\n{error.remedy}"
            if rank == "0"
            else f"process {rank}: {error.problem}"
        )
        print(said, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # the reader went away, as with | head
        return 0
    return 0


def main() -> None:
    """The console script."""
    code = 0
    if len(sys.argv) == 1:
        sys.argv.append("--help")

    def action() -> None:
        nonlocal code
        result = app(standalone_mode=False)
        code = result if isinstance(result, int) else 0

    try:
        failed = guarded(action)
    except (typer.Exit, SystemExit) as leaving:
        failed = int(getattr(leaving, "exit_code", getattr(leaving, "code", 0)) or 0)
    except Exception as error:  # click's own usage errors know how to show themselves
        if not hasattr(error, "format_message"):
            raise
        print(f"error: {error.format_message()}\nsee xushi --help", file=sys.stderr)
        failed = 2
    sys.exit(failed or code)
