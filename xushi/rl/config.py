"""The reinforcement-learning part of a recipe."""

from typing import Literal

from pydantic import model_validator

from xushi.train.config import OptimizationConfig


class RLConfig(OptimizationConfig):
    """GRPO on the environment: `prompts` tasks per step, `samples` answers to each, one update per
    rollout.
    """

    prompts: int = 32
    samples: int = 8
    max_tokens: int = 32
    temperature: float = 1.0
    clip_low: float = 0.2
    clip_high: float = 0.28
    bias_speed: float = (
        0.0  # moved biases change the policy without a gradient, and wear off what was learnt
    )
    loss_mean: Literal["answers", "tokens"] = (
        "answers"  # of V3.2: over each answer's tokens, then over answers
    )
    sequence_length: int = 128  # answers are packed into sequences of this many tokens

    @model_validator(mode="after")
    def _sampling(self) -> "RLConfig":
        if self.samples < 2:
            raise ValueError(
                "samples must be at least 2: an advantage is a difference within a group"
            )
        if min(self.prompts, self.max_tokens, self.sequence_length) < 1:
            raise ValueError("prompts, max_tokens and sequence_length must be at least 1")
        if not self.temperature > 0:
            raise ValueError("temperature must be above 0")
        return self
