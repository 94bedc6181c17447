"""Reinforcement learning from the environment's verdicts."""

from typing import TYPE_CHECKING, Any

from xushi.base.seeds import derive
from xushi.base.tracking import BatchRecord
from xushi.rl import ReinforcementStep, check_layout
from xushi.run.place import RunPlace
from xushi.run.stages.base import Costs, Fact, Results
from xushi.run.stages.checks import check_length
from xushi.run.stages.lengths import fewest_tokens
from xushi.run.stages.training import TrainingStage, end_mean
from xushi.train import Layout, Step

if TYPE_CHECKING:
    from xushi.run.recipe import Recipe

# Sampling an answer costs about as much again as learning from it (measured on the demo,
# docs/lab-log.md).
COST_PER_TRAINED_TOKEN = 2.0


class RLFigures(Results):
    """`reward` is a mean over the last tenth of the steps."""

    steps: int
    answers: int
    reward: float | None
    max_logprob_difference: float | None


class RLResults(Results):
    """What reinforcement learning returns."""

    rl: RLFigures


class RL(TrainingStage):
    """Reads the checkpoint of the stage before; writes checkpoints/rl."""

    name = "rl"
    title = "Reinforcement learning"
    section = "rl"
    needs_environment = True
    facts = (
        Fact("rl.answers", "{} answers scored"),
        Fact("rl.steps", "{} steps"),
        Fact("rl.reward", "last mean reward {}", "digits"),
    )

    def __init__(self, recipe: "Recipe") -> None:
        super().__init__(recipe)
        assert recipe.rl is not None and recipe.environment is not None, "see check"
        self.config = recipe.rl
        self.environment = recipe.environment

    @classmethod
    def check(cls, recipe: "Recipe") -> None:
        """Fine-tuning comes before, the tables are there, and a row fits the model's context."""
        if "sft" not in recipe.stages:
            raise ValueError(
                'stage rl needs stage sft before it; a control run leaves it out by without = "sft"'
            )
        if recipe.rl is None or recipe.environment is None:
            raise ValueError(f"stage {cls.name} needs the tables [{cls.name}] and [environment]")
        check_length(f"{cls.name}.sequence_length", recipe.rl.sequence_length, recipe.model)

    def check_layout(self, layout: Layout) -> None:
        """Each process needs a task of its own."""
        if self.together(layout):
            check_layout(self.config, layout)

    def together(self, layout: Layout) -> bool:
        """All processes, unless they hold different layers: sampling needs a whole model."""
        return layout.pipeline == 1

    def seconds(self, costs: Costs) -> float:
        """Every answer is taken to be as long as the longest one."""
        tokens = fewest_tokens(self.environment.make().longest_transcript())
        answers = self.config.steps * self.config.prompts * self.config.samples
        return answers * tokens * costs.training_token * COST_PER_TRAINED_TOKEN

    def step(self, place: RunPlace) -> Step:
        """Sample, score, update."""
        return ReinforcementStep(
            place.tokenizer(), self.environment.make(), self.config, derive(self.seed, "rl")
        )

    def results(self, place: RunPlace) -> RLResults:
        """Steps and answers as far as training went, and the reward at its end."""
        rewards = place.tracking.series(self.name, "reward")
        steps = rewards[-1][0] if rewards else self.steps_trained(place)
        differences = [v for _, v in place.tracking.series(self.name, "logprob_difference")]
        return RLResults(
            rl=RLFigures(
                steps=steps,
                answers=steps * self.config.prompts * self.config.samples,
                reward=end_mean(place.tracking, self.name, "reward"),
                max_logprob_difference=max(differences, default=None),
            )
        )

    def spans(self, place: RunPlace, record: BatchRecord) -> list[dict[str, Any]]:
        """The questions of a step; the answers are sampled again when its loss is computed."""
        environment = self.environment.make()
        spans = []
        for number in range(record.cursor, record.cursor + record.items):
            question = environment.reply(environment.task("train", number), ())
            text = question.content if question else ""
            spans.append(
                {
                    "sequence": number,
                    "source": environment.name,
                    "meta": {"task": number},
                    "first_byte": 0,
                    "end_byte": len(text.encode()),
                    "text": text,
                }
            )
        return spans
