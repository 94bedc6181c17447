"""Learning from rewards that can be checked."""

from xushi.rl.config import RLConfig
from xushi.rl.grpo import Objective, group_advantages, grpo_loss
from xushi.rl.step import ReinforcementStep, check_layout

__all__ = [
    "Objective",
    "RLConfig",
    "ReinforcementStep",
    "check_layout",
    "group_advantages",
    "grpo_loss",
]
