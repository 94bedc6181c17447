"""Commands about runs: train, run, launch, replay, report, export-metrics."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from xushi.base.errors import BadInput
from xushi.cli.app import (
    JsonOption,
    RecipeArgument,
    RunArgument,
    SetOption,
    app,
    default_recipe,
    print_table,
)

OutOption = Annotated[Path | None, typer.Option(help="the run directory; runs/<name> if left out")]
PathsArgument = Annotated[
    list[str], typer.Argument(help="files, directories or patterns such as '~/notes/**/*.md'")
]
ExcludeOption = Annotated[
    list[str] | None,
    typer.Option(metavar="GLOB", help="leave out what matches, such as 'drafts/*' or '*.log'"),
]
NameOption = Annotated[str, typer.Option(help="the run's name")]
ModelOption = Annotated[
    Path | None,
    typer.Option("--recipe", help="whose model and training to take; recipes/demo.toml"),
]
StagesOption = Annotated[
    str | None, typer.Option(help="comma-separated: data,tokenizer,pretrain[,sft[,rl]]")
]
WithoutOption = Annotated[
    str | None, typer.Option(metavar="STAGE", help="leave this stage out, as a control")
]
UpdateOption = Annotated[
    bool, typer.Option(help="use a directory of another recipe; changed stages run again")
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="print what it would cost, and start nothing")
]
SlurmOption = Annotated[bool, typer.Option("--slurm", help="write a job file for sbatch")]
RayOption = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="start on this Ray cluster (auto: the one here)"),
]
NodesOption = Annotated[int, typer.Option(min=1, max=100_000, help="machines")]
ProcessesOption = Annotated[
    int, typer.Option(min=1, max=10_000, help="processes on each; with GPUs one for each GPU")
]
RestartsOption = Annotated[
    int,
    typer.Option(
        min=0, max=1_000_000, help="how often to restart when a process or a machine is lost"
    ),
]
GpusOption = Annotated[bool, typer.Option("--gpus", help="one GPU for each process")]
SharedOutOption = Annotated[
    Path | None, typer.Option(help="the run directory, which all machines must see")
]


@app.command()
def train(
    paths: PathsArgument,
    exclude: ExcludeOption = None,
    name: NameOption = "text",
    out: OutOption = None,
    recipe: ModelOption = None,
    assignments: SetOption = None,
    update: UpdateOption = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a model on your own text, measure and export it. The same command continues after an
    interruption, also if the text changed.
    """
    from xushi.run.own_text import OwnText, own_text_recipe

    asked = OwnText(paths, recipe or default_recipe(), exclude or [], assignments or [], name)
    directory = out or _default_directory(asked.recipe_with({}))
    loaded, update = own_text_recipe(asked, directory, update)
    if dry_run:
        _print_plan(loaded, as_json)
    else:
        _run(loaded, directory, update, as_json, asked.hash)


@app.command("run")
def run_command(
    recipe: RecipeArgument = None,
    assignments: SetOption = None,
    out: OutOption = None,
    stages: StagesOption = None,
    without: WithoutOption = None,
    update: UpdateOption = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run a recipe: every stage from raw text to a served model. The same command continues after
    an interruption.
    """
    from xushi.run.recipe import load_recipe

    loaded = load_recipe(
        recipe or default_recipe(),
        assignments or [],
        [part.strip() for part in stages.split(",")] if stages is not None else None,
        without,
    )
    directory = out or _default_directory(loaded)
    if dry_run:
        _print_plan(loaded, as_json)
    else:
        _run(loaded, directory, update, as_json)


def _default_directory(recipe: Any) -> Path:
    """Where a run goes without --out."""
    suffix = f"-without-{recipe.without}" if recipe.without else ""
    return Path("runs") / f"{recipe.name}{suffix}"


def _print_plan(recipe: Any, as_json: bool) -> None:
    from xushi.run import describe, plan_sentence

    plan = describe(recipe)
    if as_json:
        print(json.dumps(plan))
        return
    print(plan_sentence(plan))
    print()
    print(recipe.to_toml())
    print_table(plan)


def _run(recipe: Any, directory: Path, update: bool, as_json: bool, asked: str = "") -> None:
    from xushi.report import write_report
    from xushi.run import run

    try:
        results = run(recipe, directory, update, asked)
        if results is None:
            return  # a process that is not the first
        page = write_report(directory)
    except KeyboardInterrupt:
        print(
            f"\nstopped; everything done so far is in {directory}\n"
            "run the same command again to continue",
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
    slurm: SlurmOption = False,
    ray: RayOption = None,
    nodes: NodesOption = 1,
    processes: ProcessesOption = 1,
    restarts: RestartsOption = 10,
    gpus: GpusOption = False,
    assignments: SetOption = None,
    out: SharedOutOption = None,
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
    directory = out or _default_directory(loaded)
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


@app.command()
def report(run_directory: RunArgument) -> None:
    """Write report.html again from a run's numbers."""
    from xushi.report import write_report

    print(write_report(run_directory))


@app.command()
def replay(
    run_directory: RunArgument,
    step: Annotated[int, typer.Option(min=1, max=1_000_000_000, help="the step, from 1")],
    stage: Annotated[str, typer.Option(help="a stage that trains")] = "pretrain",
    loss: Annotated[
        bool, typer.Option(help="compute its loss again, from the last checkpoint before it")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Show what a training step was trained on, and compute its loss again."""
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


def _headline(results: dict[str, Any]) -> None:
    """The few numbers that say whether it worked."""
    for key in (
        "evaluate.bits_per_byte",
        "evaluate.bits_per_byte_xz",
        "evaluate.bits_per_byte_xz_primed",
        "rl.greedy_before",
        "rl.greedy_after",
        "rl.forced_before",
        "rl.sft_equal_flops",
        "seconds.total",
    ):
        if key in results:
            print(f"{key:<36} {results[key]:.3f}")
