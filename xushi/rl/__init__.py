"""Learning from rewards that can be checked."""

from xushi.rl.config import RLConfig
from xushi.rl.grpo import Objective, group_advantages, grpo_loss
from xushi.rl.step import ReinforcementStep

__all__ = ["Objective", "RLConfig", "ReinforcementStep", "group_advantages", "grpo_loss"]
