"""Floor 6: learning from rewards that can be checked."""

from xushi.rl.config import RLConfig
from xushi.rl.grpo import group_advantages, grpo_loss
from xushi.rl.loop import reinforce

__all__ = ["RLConfig", "group_advantages", "grpo_loss", "reinforce"]
