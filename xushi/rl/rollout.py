"""A rollout: the episodes that one step learns from, and their rewards.

Axes: P tasks, S samples of each.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from xushi.base.seeds import derive
from xushi.engine import SamplingParams
from xushi.envs import Environment
from xushi.evaluate import Branch, Episode, play
from xushi.model import Deepseek
from xushi.rl.config import RLConfig
from xushi.tokenizer import Tokenizer


@dataclass(frozen=True)
class Rollout:
    """Episodes of P tasks, S each, in that order.

    `rewards_PS` are 1 or 0; `counted_PS` is False where the verifier failed.
    """

    episodes: list[Episode]
    rewards_PS: Tensor
    counted_PS: Tensor

    @property
    def branches(self) -> list[Branch]:
        """The token sequences of all episodes, in order."""
        return [branch for episode in self.episodes for branch in episode.branches]


@dataclass(frozen=True)
class Sampler:
    """What a rollout is a function of, beside the weights and the cursor."""

    tokenizer: Tokenizer
    environment: Environment
    config: RLConfig
    seed: int

    def rollout(self, model: Deepseek, cursor: int, share: range) -> Rollout:
        """Play the tasks cursor + p for p in `share`, a part of the step's `prompts`.

        `cursor` is the number of the step's first task. Which tasks are played together changes
        nothing but rounding.
        """
        config = self.config
        tasks = [self.environment.task("train", cursor + p) for p in share]
        params = [
            SamplingParams(
                max_tokens=config.max_tokens,
                temperature=config.temperature,
                seed=derive(self.seed, "rollout", cursor // config.prompts, p, s),
            )
            for p in share
            for s in range(config.samples)
        ]
        each = [task for task in tasks for _ in range(config.samples)]
        episodes = play(model, self.tokenizer, self.environment, each, params, routing=True)
        verdicts = [episode.score.verdict for episode in episodes]
        shape = (len(share), config.samples)
        rewards = torch.tensor([float(verdict == "right") for verdict in verdicts]).view(shape)
        counted = torch.tensor([verdict != "error" for verdict in verdicts]).view(shape)
        return Rollout(episodes, rewards, counted)


def share_of(prompts: int, rank: int, of: int) -> range:
    """The tasks of a step that rank `rank` of `of` plays: consecutive, nearly equally many."""
    return range(prompts * rank // of, prompts * (rank + 1) // of)
