"""Rollouts: scored episodes, the same for the same weights, seed and cursor, however the tasks are
shared out.
"""

from hypothesis import given
from hypothesis import strategies as st

from xushi.base.messages import Message
from xushi.rl.rollout import Rollout, Sampler, share_of
from xushi.tokenizer import encode_chat, parse_assistant

from .conftest import CONFIG


def test_a_rollout_is_scored_answers(rollout, tokenizer, environment) -> None:
    assert (
        rollout.rewards_PS.shape == rollout.counted_PS.shape == (6, 8)
        and len(rollout.episodes) == 48
    )
    for index, episode in enumerate(rollout.episodes):
        p, s = divmod(index, 8)
        task = environment.task("train", p)
        (branch,) = episode.branches
        prompt = encode_chat(tokenizer, [Message("user", task.prompt)])
        answer = branch.ids[len(prompt) :]
        assert branch.ids[: len(prompt)] == prompt and episode.task == task
        assert branch.sampled == [False] * len(prompt) + [True] * len(answer)
        assert episode.tokens == len(answer) == len(branch.logprobs)
        assert branch.experts is not None and len(branch.experts) == len(branch.ids) - 1
        message, finished = parse_assistant(tokenizer, answer)
        content = message.content
        assert rollout.rewards_PS[p, s] == (finished and content in ("2", "4", "6", "8"))
        assert rollout.counted_PS[p, s] == (not finished or content != "0")
    assert 0.1 < rollout.rewards_PS.mean() < 0.9 and not rollout.counted_PS.all()


def tokens(rollout: Rollout) -> list[list[int]]:
    return [branch.ids for branch in rollout.branches]


def test_a_rollout_is_a_function_of_weights_seed_and_cursor(
    fine_tuned, tokenizer, environment, rollout
) -> None:
    def sampled(seed: int, cursor: int) -> list[list[int]]:
        sampler = Sampler(tokenizer, environment, CONFIG, seed)
        return tokens(sampler.rollout(fine_tuned(), cursor, range(6)))

    same = tokens(rollout)
    assert sampled(7, 0) == same and sampled(8, 0) != same and sampled(7, 6) != same
    later = Sampler(tokenizer, environment, CONFIG, 7).rollout(fine_tuned(), 18, range(6))
    assert [episode.task.index for episode in later.episodes[::8]] == [*range(18, 24)]
    assert len({tuple(ids) for ids in same[:8]}) > 1, "samples of one task must differ"


def test_shares_played_apart_are_the_rollout(fine_tuned, tokenizer, environment, rollout) -> None:
    sampler = Sampler(tokenizer, environment, CONFIG, 7)
    shares = [share_of(6, rank, 4) for rank in range(4)]
    parts = [sampler.rollout(fine_tuned(), 0, share) for share in shares]
    assert [ids for part in parts for ids in tokens(part)] == tokens(rollout)
    assert [len(part.rewards_PS) for part in parts] == [1, 2, 1, 2]


@given(st.integers(1, 50), st.integers(1, 9))
def test_every_task_has_one_rank(prompts: int, of: int) -> None:
    shares = [share_of(prompts, rank, of) for rank in range(of)]
    assert [p for share in shares for p in share] == [*range(prompts)]
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
