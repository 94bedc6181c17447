"""The reinforcement-learning part of a recipe."""

from typing import Literal

from pydantic import Field

from xushi.train.config import OptimizationConfig


class RLConfig(OptimizationConfig):
    """GRPO on the environment: `prompts` tasks per step, `samples` answers to each, one update per
    rollout.
    """

    prompts: int = Field(32, ge=1, le=1_000_000)
    # At least 2: an advantage is a difference within a group.
    samples: int = Field(8, ge=2, le=100_000)
    max_tokens: int = Field(32, ge=1, le=10_000_000)
    temperature: float = Field(1.0, ge=0.01, le=100)
    clip_low: float = Field(0.2, ge=0, le=1)
    clip_high: float = Field(0.28, ge=0, le=100)
    # Changing biases changes the policy without a gradient and undoes some of what was learnt.
    bias_speed: float = Field(0.0, ge=0, le=100)
    # "answers", as in V3.2: the mean over each answer's tokens, then over answers.
    loss_mean: Literal["answers", "tokens"] = "answers"
    # Answers are packed into sequences of this many tokens.
    sequence_length: int = Field(128, ge=1, le=10_000_000)
