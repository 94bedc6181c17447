"""How reliably a run's fine-tuned model learns from rewards: repeat its RL with other seeds.

    python bench/rl_draws.py RUN [--draws N] [--set rl.key=value]...

Each draw has its own tasks and samples; draw 0 has those of the run. Nothing in the run changes.
Printed are the greedy accuracy on the unseen tasks of the evaluation, the lowest reward from the
fourth step on, and the last reward. The last line is JSON.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import torch
import typer

from xushi.base.seeds import derive
from xushi.base.tracking import Tracking
from xushi.evaluate import accuracy, play_greedily
from xushi.rl import ReinforcementStep
from xushi.run.place import RunPlace
from xushi.run.recipe import load_recipe
from xushi.run.stages.rl import RL
from xushi.train import Training


def draw(run: Path, assignments: list[str], number: int) -> dict[str, float]:
    """The figures of one repetition of the RL."""
    recipe = load_recipe(run / "recipe.toml", assignments)
    stage = RL(recipe)
    with tempfile.TemporaryDirectory() as aside:
        tracking = Tracking(Path(aside) / "tracking.sqlite")
        place = RunPlace(run, tracking)
        model = stage.trained_model(place, stage.start)
        step = ReinforcementStep(
            place.tokenizer(),
            stage.environment.make(),
            stage.config,
            derive(recipe.seed + number, "rl"),
        )
        Training(stage.name, model, step, Path(aside) / "saved", tracking).run()
        rewards = [value for _, value in tracking.series(stage.name, "reward")]
        tracking.close()
    unseen = stage.environment.make(recipe.evaluate.environment)
    episodes = play_greedily(model, place.tokenizer(), unseen, recipe.evaluate, recipe.seed)
    return {
        "draw": number,
        "greedy": accuracy(episodes).value,
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
