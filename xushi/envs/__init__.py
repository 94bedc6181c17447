"""Floor 3: tasks whose answers can be verified, told and answered as text."""

from xushi.envs.digit_sum import DigitSum, DigitSumConfig, transcript_text
from xushi.envs.environment import SPLITS, Environment, Score, Step, Task

__all__ = [
    "SPLITS",
    "DigitSum",
    "DigitSumConfig",
    "Environment",
    "Score",
    "Step",
    "Task",
    "transcript_text",
]
