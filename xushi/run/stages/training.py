"""What the stages that train a model share: where they start, how they train, what they return."""

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from xushi.base.errors import Failed
from xushi.base.tracking import BatchRecord, Tracking
from xushi.model import Batch, Deepseek, ModelConfig, allocate, model_without_memory
from xushi.run.place import RunPlace
from xushi.run.stages.base import Results, Stage
from xushi.tokenizer import Tokenizer
from xushi.train import Evaluation, Layout, Step, Training, latest_checkpoint
from xushi.train.boxes import Box
from xushi.train.checkpoint import SavedCheckpoint

if TYPE_CHECKING:
    from xushi.run.recipe import Recipe


def model_config(model: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """A recipe's model with the tokenizer's vocabulary and special tokens."""
    return model.model_copy(
        update={
            "vocab_size": tokenizer.vocab_size,
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
            "pad_token_id": tokenizer.pad_id,
        }
    )


class ModelStage(Stage):
    """A stage that uses the model."""

    def __init__(self, recipe: "Recipe") -> None:
        self.seed = recipe.seed
        self.model = recipe.model

    def trained_model(self, place: RunPlace, stage: str | None) -> Deepseek:
        """The model at the end of a training stage; with None freshly initialised."""
        config = model_config(self.model, place.tokenizer())
        model = model_without_memory(config)
        allocate(model, place.layout.device)
        if stage is None:
            return model.initialise(self.seed)
        checkpoint = latest_checkpoint(place.checkpoints(stage))
        if checkpoint is None:
            raise Failed(
                f"{place.checkpoints(stage)} holds no checkpoint",
                f"remove {place.path('stages', stage + '.json')} and run the same command again",
            )
        fill(model, checkpoint)
        return model


def fill(model: Deepseek, checkpoint: SavedCheckpoint) -> None:
    """Fill the model from a checkpoint, one tensor at a time."""
    state = model.state_dict()
    if other := set(state).symmetric_difference(checkpoint.names("model")):
        raise Failed(
            f"checkpoint {checkpoint.path} is another model's: {min(other)} is only in one of them",
            "use the run directory with the recipe that it was made with",
        )
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(checkpoint.read("model", name, Box.whole(tuple(tensor.shape))))


class TrainingStage(ModelStage):
    """A stage that trains the model of the stage before it and ends in a checkpoint.

    main: whether later stages, evaluation and export go on from its model; a control's they do not.
    start: the training stage whose model this one starts from; None for random weights.
    """

    main: ClassVar[bool] = True

    def __init__(self, recipe: "Recipe") -> None:
        super().__init__(recipe)
        self.start = last_main_stage(recipe, before=type(self))

    def together(self, layout: Layout) -> bool:
        """All processes train."""
        return True

    def run(self, place: RunPlace) -> Results:
        """Train to the end, from the last checkpoint if there is one; then say what came of it.

        Only the first process has a tracking store to read the results from.
        """
        self.training(place).run()
        return self.results(place) if place.layout.is_first else Results()

    def training(self, place: RunPlace) -> Training:
        """The stage's training, before its first step or after its last checkpoint."""
        model = self.trained_model(place, self.start)
        return Training(
            self.name,
            model,
            self.step(place),
            place.checkpoints(self.name),
            place.tracking,
            self.layout(place),
            self.evaluation(place, model),
        )

    def layout(self, place: RunPlace) -> Layout:
        """The processes that train: those of the run, or this one alone."""
        return place.layout if self.together(place.layout) else Layout(device=place.layout.device)

    @abstractmethod
    def step(self, place: RunPlace) -> Step:
        """What is computed at each step."""

    def evaluation(self, place: RunPlace, model: Deepseek) -> Evaluation | None:
        """What is measured on the model while it is trained."""
        return None

    @abstractmethod
    def results(self, place: RunPlace) -> Results:
        """What the tracking store holds of the training that has just ended."""

    def batch(self, place: RunPlace, record: BatchRecord) -> Batch | None:
        """The batch of a step, for `xushi replay`; None if it depends on the weights."""
        return None

    def spans(self, place: RunPlace, record: BatchRecord) -> list[dict[str, Any]]:
        """What a step was trained on, item by item, JSON-able, for `xushi replay`."""
        return []


def last_main_stage(recipe: "Recipe", before: type[Stage] | None = None) -> str | None:
    """The last stage of this run that trains the main model; only those before `before`, if
    given.
    """
    found = None
    for stage in recipe.stage_classes:
        if stage is before:
            break
        if issubclass(stage, TrainingStage) and stage.main and stage.wanted(recipe):
            found = stage.name
    return found


def end_mean(tracking: Tracking, stage: str, name: str) -> float | None:
    """The mean of a metric over the last tenth of the steps: one step's value is mostly noise.

    None if the tracking store holds no finite value, as after it was moved away.
    """
    values = [value for _, value in tracking.series(stage, name) if math.isfinite(value)]
    tail = values[-max(1, len(values) // 10) :]
    return sum(tail) / len(tail) if tail else None


def training_seconds(tracking: Tracking, stage: str) -> float:
    """Seconds of all steps of a training stage together; 0 if the store holds none."""
    return sum(value for _, value in tracking.series(stage, "seconds"))
