"""The evaluation part of a recipe."""

from typing import Any

from pydantic import Field

from xushi.base.config import StrictConfig


class EvaluateConfig(StrictConfig):
    """What is measured at the end.

    `environment` and `longer` change keys of the recipe's environment: the first for the tasks
    that are scored, the second for tasks beyond those of training, which are scored apart (left
    out, there are none).
    """

    tasks: int = Field(200, ge=1, le=10_000_000)  # per measurement, all of the test split
    samples: int = Field(8, ge=1, le=100_000)  # answers to each task for avg@k and pass@k
    max_tokens: int = Field(32, ge=1, le=10_000_000)  # that a model may write in one episode
    xz_primed: bool = True  # also xz after the training text: about a second per MB of it
    # Also fine-tune for as many FLOPs as RL took instead of RL, and score that model.
    control: bool = False
    environment: dict[str, Any] = Field(default_factory=dict)
    longer: dict[str, Any] | None = None
