"""The control of reinforcement learning: fine-tuning continued for as many FLOPs as it took."""

from typing import TYPE_CHECKING, Any

from xushi.base.tracking import BatchRecord
from xushi.model import Batch
from xushi.plan import train_flops_per_token
from xushi.run.place import RunPlace
from xushi.run.stages.base import Fact, Results
from xushi.run.stages.conversations import demonstration_spans, demonstrations
from xushi.run.stages.rl import RL
from xushi.run.stages.sft import SFT
from xushi.run.stages.training import TrainingStage, last_main_stage, model_config
from xushi.train import Data, LanguageModelStep, Step

if TYPE_CHECKING:
    from xushi.run.recipe import Recipe


class ControlFigures(Results):
    """How long the control was trained."""

    steps: int


class ControlResults(Results):
    """What the control returns."""

    control: ControlFigures


class Control(TrainingStage):
    """Fine-tuning continued for as many FLOPs as RL took: what mere further training would give.

    A run has it if `evaluate.control` says so.
    """

    name = "control"
    title = "Control"
    section = "rl"
    in_recipe = False
    follows = RL.name
    main = False
    facts = (
        Fact(
            "control.steps",
            "{} more steps of fine-tuning, as many FLOPs as reinforcement learning took",
        ),
    )

    def __init__(self, recipe: "Recipe") -> None:
        super().__init__(recipe)
        assert recipe.sft is not None and recipe.environment is not None, "see check of sft"
        self.config = recipe.sft
        self.environment = recipe.environment
        self.start = last_main_stage(recipe, before=RL)  # where RL starts, too

    @classmethod
    def wanted(cls, recipe: "Recipe") -> bool:
        """Where it is asked for and there is something to compare."""
        return recipe.evaluate.control and SFT.wanted(recipe) and RL.wanted(recipe)

    @property
    def first(self) -> int:
        """The number of the first demonstration that fine-tuning has not seen."""
        return self.config.steps * self.config.batch_examples

    def steps(self, place: RunPlace) -> int:
        """As many as take the FLOPs of RL. Decided once: the tracking store may be moved away."""
        tracking = place.tracking
        spent = sum(flops for _, flops in tracking.series(RL.name, "flops"))
        # Without a record, as after the store was moved away, as many as fine-tuning had.
        wanted = max(1, round(spent / self._step_flops(place))) if spent else self.config.steps
        kept = tracking.decide(self.name, "steps", wanted) if place.layout.is_first else 0
        return int(place.layout.team.broadcast(kept))

    def _step_flops(self, place: RunPlace) -> float:
        """FLOPs of a step, from the demonstrations of the first one."""
        examples = self.config.batch_examples
        tokens = int((self.data(place).batches(0, examples).segments >= 0).sum())
        model = model_config(self.model, place.tokenizer())
        context = round(tokens / examples)
        return tokens * train_flops_per_token(model, context, bool(self.config.mtp_weight))

    def data(self, place: RunPlace) -> Data:
        """Demonstrations that fine-tuning has not seen."""
        environment = self.environment.make()
        return demonstrations(environment, place.tokenizer(), self.config, self.first)

    def step(self, place: RunPlace) -> Step:
        """The step of fine-tuning, for as many steps as were decided."""
        config = self.config.model_copy(update={"steps": self.steps(place)})
        return LanguageModelStep(config, self.data(place))

    def batch(self, place: RunPlace, record: BatchRecord) -> Batch:
        """The packed demonstrations of a step."""
        return self.data(place).batches(record.cursor, record.items)

    def results(self, place: RunPlace) -> ControlResults:
        """The steps."""
        return ControlResults(control=ControlFigures(steps=self.steps_trained(place)))

    def spans(self, place: RunPlace, record: BatchRecord) -> list[dict[str, Any]]:
        """The demonstrations as text."""
        environment = self.environment.make()
        return demonstration_spans(environment, place.tokenizer(), self.config, record, self.first)
