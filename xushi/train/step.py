"""One step of training: the contract that each kind of training fulfils, and the update that all
share.

Not here: the loop around it (training); what pretraining computes (language).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from xushi.model import Batch
from xushi.train.balance import router_health, update_router_biases
from xushi.train.config import OptimizationConfig
from xushi.train.gradients import Norms, clip_gradients
from xushi.train.guards import Problem
from xushi.train.state import TrainingState


@dataclass(frozen=True)
class StepResult:
    """What a step gives to the loop. All but `batch` must be equal in all processes.

    `figures` are tracked; with "target_tokens" among them the loop adds tokens per second. `hash`
    is that of the whole batch, `batch` are this process's rows. `items` is by how much the cursor
    moves. `note` is for the progress line. `stop` says why training ends here, "" if it goes on.
    `flops` is the arithmetic of the whole batch, 0 where it is not counted.
    """

    figures: dict[str, float]
    problem: Problem | None
    batch: Batch
    hash: str
    items: int
    note: str
    stop: str = ""
    flops: float = 0.0


class Step(ABC):
    """One kind of training. All processes of a layout call the same methods in the same order.

    A step may read nothing that a checkpoint does not hold, except its own fixed arguments: then a
    run that was killed ends with the same bits.
    """

    config: OptimizationConfig

    @abstractmethod
    def take(self, state: TrainingState, number: int, phase: Callable[[str], None]) -> StepResult:
        """Do step `number` (from 0) on the data from `state.cursor` on, and update the model.

        The step begins in phase "batch". Call `phase("step")` before waiting for other processes,
        and `phase("batch")` before a long piece of work of this process alone, so that a process
        that hangs can be told from those that wait for it.
        """

    def saved(self) -> dict[str, Any]:
        """What else decides later steps, JSON-able; it goes into the checkpoint."""
        return {}

    def load(self, saved: dict[str, Any]) -> None:  # noqa: B027 (most steps have nothing to load)
        """Go on from what `saved` returned; {} before the first step."""


@dataclass(frozen=True)
class StepLoss:
    """A step's loss, as the guard judges it and as it is differentiated.

    `total` is this process's part, a scalar; None if the gradients have been computed already.
    `value` is the sum of `total` over all processes. `judged` is what the guard compares with
    earlier steps, None where this step has nothing to compare; the guard never takes less than
    `smallest_deviation` for this figure's deviation.
    `loads` are the experts' loads over all processes, by router. They move the router biases unless
    `move_biases` is False.
    """

    total: Tensor | None
    value: float
    judged: float | None
    loads: dict[str, Tensor] = field(default_factory=dict)
    smallest_deviation: float = 0.0
    move_biases: bool = True


def optimizer_step(
    state: TrainingState, config: OptimizationConfig, number: int, loss: StepLoss, norms: Norms
) -> dict[str, float]:
    """Update the weights with the clipped gradients, then the router biases; returns figures."""
    factor = config.rate_at(number)
    rate = config.learning_rate * factor
    state.optimizer.step(rate, (config.adamw_learning_rate or config.learning_rate) * factor)
    if (speed := config.bias_speed_at(number)) and loss.move_biases:
        update_router_biases(state.model, loss.loads, speed)
    return {
        "gradient_norm": norms.whole,
        **{f"gradient_norm.{part}": norm for part, norm in norms.parts.items()},
        "learning_rate": rate,
        **router_health(state.model, loss.loads),
    }


def guarded_update(
    state: TrainingState, config: OptimizationConfig, number: int, loss: StepLoss
) -> tuple[dict[str, float], Problem | None]:
    """Backpropagate and update, unless the guard withholds the update; returns figures and
    problem.
    """
    guard = state.guard
    figures: dict[str, float] = {}
    problem = guard.judge(loss.judged, loss.value, loss.smallest_deviation)
    if not guard.withholds(problem):
        if loss.total is not None:
            loss.total.backward()  # type: ignore[no-untyped-call]
        norms = clip_gradients(state.model.named_parameters(), config.gradient_clip, state.layout)
        problem = guard.judge_gradient(norms.whole) or problem
        if not guard.withholds(problem):
            figures = optimizer_step(state, config, number, loss, norms)
    state.optimizer.zero_grad()
    guard.count(loss.judged, problem)
    return figures | {"withheld_steps": float(guard.withheld)}, problem
