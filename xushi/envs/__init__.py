"""Tasks whose answers can be verified, told and answered as text."""

from xushi.envs.digit_sum import DigitSum, DigitSumConfig
from xushi.envs.environment import SPLITS, Card, Environment, Score, Task
from xushi.envs.registry import ENVIRONMENTS, environment_class

__all__ = [
    "ENVIRONMENTS",
    "SPLITS",
    "Card",
    "DigitSum",
    "DigitSumConfig",
    "Environment",
    "Score",
    "Task",
    "environment_class",
]
