"""How reliably a run's fine-tuned model learns from rewards: its RL again for several draws of
tasks and samples.

    python bench/rl_draws.py RUN [--draws N] [--set rl.key=value]...

Draw 0 is the run's own. Nothing in the run is changed. Prints greedy accuracy on the evaluation's
unseen tasks and the reward on the way (its lowest from the fourth step on, and its last), and,
last, one line of JSON.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import mean

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import torch

from xushi.base.seeds import derive
from xushi.base.tracking import Tracking
from xushi.evaluate import answer_tasks
from xushi.run.recipe import load_recipe
from xushi.rl import reinforce
from xushi.run.context import RunContext


def draw(run: Path, assignments: list[str], number: int) -> dict[str, float]:
    recipe = load_recipe(run / "recipe.toml", assignments)
    context = RunContext(run, recipe, Tracking(run / "tracking.sqlite"))
    model, tokenizer, environment = (
        context.trained_model("sft"),
        context.tokenizer(),
        context.environment(),
    )
    with tempfile.TemporaryDirectory() as aside:
        tracking = Tracking(Path(aside) / "tracking.sqlite")
        reinforce(
            model,
            tokenizer,
            environment,
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


def main() -> None:
    words = sys.argv[1:]
    assignments = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    draws = int(words[words.index("--draws") + 1]) if "--draws" in words else 3
    run = Path(words[0])
    torch.set_num_threads(load_recipe(run / "recipe.toml", []).threads or 2)
    print(f"{'draw':>6}{'greedy':>9}{'lowest':>9}{'last':>9}")
    results = []
    for number in range(draws):
        results.append(result := draw(run, assignments, number))
        print(
            f"{number:>6}{result['greedy']:>9.3f}{result['lowest']:>9.2f}{result['last']:>9.2f}",
            flush=True,
        )
    print(json.dumps({"run": str(run), "set": assignments, "draws": results}))


if __name__ == "__main__":
    main()
