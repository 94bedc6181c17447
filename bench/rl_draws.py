"""How reliably a run's fine-tuned model learns from rewards: repeat its RL with other seeds.

    python bench/rl_draws.py RUN [--draws N] [--set rl.key=value]...

Each draw has its own tasks and samples; draw 0 has those of the run. Nothing in the run is changed.
Printed are the greedy accuracy on the unseen tasks of the evaluation, the lowest reward from the
fourth step on, and the last reward. The last line is JSON.
"""

import json
import os
import tempfile
from pathlib import Path
from statistics import mean
from typing import Annotated

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import torch
import typer
from xushi.run.context import RunContext

from xushi.base.seeds import derive
from xushi.base.tracking import Tracking
from xushi.evaluate import answer_tasks
from xushi.rl import reinforce
from xushi.run.recipe import load_recipe


def draw(run: Path, assignments: list[str], number: int) -> dict[str, float]:
    """The figures of one repetition of the RL."""
    recipe = load_recipe(run / "recipe.toml", assignments)
    context = RunContext(run, recipe, Tracking(run / "tracking.sqlite"))
    model = context.trained_model("sft")
    tokenizer = context.tokenizer()
    with tempfile.TemporaryDirectory() as aside:
        tracking = Tracking(Path(aside) / "tracking.sqlite")
        reinforce(
            model,
            tokenizer,
            context.environment(),
            recipe.rl,
            derive(recipe.seed + number, "rl"),
            Path(aside),
            tracking,
        )
        rewards = [value for _, value in tracking.series("rl", "reward")]
    unseen = context.environment(recipe.evaluate.min_digits, recipe.evaluate.max_digits)
    tasks = [unseen.task("test", index) for index in range(recipe.evaluate.tasks)]
    answers = answer_tasks(
        model,
        tokenizer,
        unseen,
        tasks,
        samples=1,
        temperature=0.0,
        max_tokens=recipe.evaluate.max_tokens,
        seed=recipe.seed,
    )
    return {
        "draw": number,
        "greedy": mean(answer.right for (answer,) in answers),
        "lowest": min(rewards[3:]),
        "last": rewards[-1],
    }


def main(
    run: Path,
    draws: int = 3,
    assignments: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE")] = None,
) -> None:
    """Repeat the RL of a run and print what each repetition learned."""
    torch.set_num_threads(load_recipe(run / "recipe.toml", []).threads or 2)
    print(f"{'draw':>6}{'greedy':>9}{'lowest':>9}{'last':>9}")
    results = []
    for number in range(draws):
        result = draw(run, assignments or [], number)
        results.append(result)
        print(
            f"{number:>6}{result['greedy']:>9.3f}{result['lowest']:>9.2f}{result['last']:>9.2f}",
            flush=True,
        )
    print(json.dumps({"run": str(run), "set": assignments or [], "draws": results}))


if __name__ == "__main__":
    typer.run(main)
