"""Guards against bad batches: losses and gradients that are not finite, and losses that jump.

Not here: going back to a checkpoint after a jump (training).
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

OnSpike = Literal["warn", "skip", "rollback"]

LIMIT_IN_A_ROW = 3  # steps without an update one after another: no single batch is at fault
LIMIT_OF_ROLLBACKS = 3  # to the same checkpoint

# A loss is a spike if it lies this many deviations above its running mean. A step's loss is an
# average over thousands of tokens, so six deviations come by chance less than once in a million
# steps. The smallest deviation, a part of the mean, keeps a loss that hardly varies from jumping.
DEVIATIONS = 6.0
SMALLEST_DEVIATION = 0.02
MEMORY = 0.98  # what the running mean keeps from step to step: it spans about fifty steps
STEPS_BEFORE_JUDGING = 50


@dataclass(frozen=True)
class Problem:
    """What is wrong with a step."""

    kind: Literal["not finite", "spike"]
    text: str


@dataclass
class LossScale:
    """Exponential running mean and variance of the loss."""

    seen: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def add(self, loss: float) -> None:
        """Take one more loss into account."""
        # The first fifty weigh the same.
        weight = max(1 - MEMORY, 1 / (self.seen + 1))
        difference = loss - self.mean
        self.mean += weight * difference
        self.variance = (1 - weight) * (self.variance + weight * difference * difference)
        self.seen += 1

    def deviation(self, smallest: float = 0.0) -> float:
        """The deviation that a spike is measured in, `smallest` at least."""
        return max(math.sqrt(self.variance), SMALLEST_DEVIATION * abs(self.mean), smallest)

    def is_spike(self, loss: float, smallest: float = 0.0) -> bool:
        """Whether `loss` lies far above those seen; False until enough were seen."""
        limit = self.mean + DEVIATIONS * self.deviation(smallest)
        return self.seen >= STEPS_BEFORE_JUDGING and loss > limit


class Guard:
    """Judges each step's loss and gradient; its state is saved in the checkpoint."""

    def __init__(self, on_spike: OnSpike = "warn") -> None:
        self.on_spike = on_spike
        self.scale = LossScale()
        self.withheld = 0  # steps without an update so far
        self.in_a_row = 0  # how many of the latest steps had none

    def judge(self, loss: float | None, total: float, smallest: float = 0.0) -> Problem | None:
        """What is wrong with a step's loss, if anything.

        `loss` is compared with the earlier ones, whose deviation counts as `smallest` at least;
        None is not compared. `total` is differentiated.
        """
        if not math.isfinite(total):
            return Problem("not finite", f"the loss is not finite ({total})")
        if loss is not None and self.scale.is_spike(loss, smallest):
            return Problem(
                "spike",
                f"the loss jumps to {loss:.4g} from {self.scale.mean:.4g} "
                f"(deviation {self.scale.deviation(smallest):.2g})",
            )
        return None

    def judge_gradient(self, norm: float) -> Problem | None:
        """What is wrong with a step's gradient of this norm, if anything."""
        return (
            None
            if math.isfinite(norm)
            else Problem("not finite", f"the gradient is not finite ({norm})")
        )

    def withholds(self, problem: Problem | None) -> bool:
        """Whether the update is left out: always if not finite, for a spike if the recipe says
        so.
        """
        return problem is not None and (problem.kind == "not finite" or self.on_spike != "warn")

    def count(self, loss: float | None, problem: Problem | None) -> None:
        """Take a step into account; the loss of a withheld step does not move the scale, and
        neither does None.
        """
        if self.withholds(problem):
            self.withheld += 1
            self.in_a_row += 1
        else:
            self.in_a_row = 0
            if loss is not None:
                self.scale.add(loss)

    @property
    def state(self) -> dict[str, Any]:
        """The state, JSON-able and exact: JSON reads floats back to the bit."""
        return {"scale": asdict(self.scale), "withheld": self.withheld, "in_a_row": self.in_a_row}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a `state`."""
        self.scale = LossScale(**state["scale"])
        self.withheld, self.in_a_row = state["withheld"], state["in_a_row"]
