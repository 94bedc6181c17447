"""Learning from episodes of several turns: the packed loss is that of their sequences one by one,
whether tools or users ask again.
"""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from xushi.base.messages import Message
from xushi.envs import Task
from xushi.rl.policy import policy_loss
from xushi.rl.rollout import Sampler

from ..evaluate.talking import Tools, talkative_model, tokenizer_with_tools
from .conftest import CONFIG
from .test_policy import gradients, one_by_one


class Mixed(Tools):
    """A tool asks first, and then a user: two sequences."""

    def reply(self, task: Task, transcript: Sequence[Message]) -> Message | None:
        given = super().reply(task, transcript)
        return given if given is None or len(transcript) != 4 else replace(given, role="user")


@pytest.mark.parametrize("environment", [Tools(), Mixed()])
def test_the_loss_of_several_turns(environment: Tools) -> None:
    tokenizer = tokenizer_with_tools()
    model = talkative_model(tokenizer)
    config = CONFIG.model_copy(update={"samples": 4, "max_tokens": 30, "sequence_length": 1024})
    rollout = Sampler(tokenizer, environment, config, 7).rollout(model, 0, range(3))
    turns = [len(episode.transcript) // 2 for episode in rollout.episodes]
    assert len(set(turns)) > 1 and max(turns) == 3
    assert (len(rollout.branches) > len(rollout.episodes)) == isinstance(environment, Mixed)
    stream = torch.Generator().manual_seed(5)
    rewards = torch.randint(0, 2, rollout.rewards_PS.shape, generator=stream).float()
    rollout = replace(rollout, rewards_PS=rewards)
    policy = policy_loss(model, config, tokenizer.pad_id, rollout)
    assert policy.figures["logprob_difference"] < 1e-4
    assert policy.figures["length"] == sum(e.tokens for e in rollout.episodes) / 12
    wanted = one_by_one(model, rollout)
    assert policy.figures["loss"] == pytest.approx(float(wanted.detach()), abs=1e-5)
    got, expected = gradients(model, policy.total), gradients(model, wanted)
    assert expected.norm() > 1e-3 and (got - expected).norm() <= 1e-4 * expected.norm()
