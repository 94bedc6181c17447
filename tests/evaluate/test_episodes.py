"""Episodes: one turn gives exactly what generate_ids gives; several turns are held against whole
forward passes over their own token sequences.

The model is random: it answers nonsense, but the same nonsense.
"""

from collections.abc import Sequence

import pytest
import torch

from xushi.base.config import StrictConfig
from xushi.base.errors import Failed
from xushi.base.messages import Message, Tool
from xushi.base.seeds import derive
from xushi.engine import SamplingParams, generate_ids
from xushi.envs import Card, DigitSum, DigitSumConfig, Environment, Score, Task
from xushi.evaluate import Episode, examples_of, play
from xushi.evaluate import episodes as module
from xushi.tokenizer import encode_chat, parse_assistant

DIGITS = DigitSum(DigitSumConfig(min_digits=2, max_digits=4))


class Talk(Environment):
    """Asks again, whatever is said, until `turns` answers are given; right if all have content."""

    name = "talk"
    version = 1
    Config = StrictConfig
    role = "user"
    turns = 3

    def task(self, split: str, index: int) -> Task:
        return Task(self.name, self.version, split, index, f"{index}?", "", {})

    def reply(self, task: Task, transcript: Sequence[Message]) -> Message | None:
        turn = len(transcript) // 2
        if turn == 0:
            return Message("user", task.prompt)
        return Message(self.role, f"{turn}") if turn < self.turns else None

    def score(self, task: Task, transcript: Sequence[Message]) -> Score:
        answers = [message for message in transcript if message.role == "assistant"]
        whole = len(answers) == self.turns and all(answer.content for answer in answers)
        return Score("right" if whole else "wrong", f"{len(answers)} answers")

    def solve(self, task: Task) -> Sequence[Message]:
        return []

    def exploits(self, task: Task) -> list[Sequence[Message]]:
        return []

    def demonstration(self, split: str, index: int, thinking_share: float) -> Sequence[Message]:
        return []

    def text(self, transcript: Sequence[Message]) -> str:
        return ""

    def longest_transcript(self) -> Sequence[Message]:
        return []

    def card(self) -> Card:
        return Card("", "", "", "", "")


class Tools(Talk):
    """The same, asked by a tool."""

    role = "tool"
    tools = (Tool("next", "asks again", {"type": "object", "properties": {}}),)


def tasks_of(environment: Environment, count: int, samples: int) -> list[Task]:
    return [environment.task("test", index) for index in range(count) for _ in range(samples)]


def params_of(count: int, max_tokens: int, temperature: float = 1.0) -> list[SamplingParams]:
    return [
        SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=derive(7, number))
        for number in range(count)
    ]


@pytest.mark.parametrize("think", [False, True])
@pytest.mark.parametrize("routing", [False, True])
def test_one_turn_is_generate_ids_to_the_bit(think, routing, model, tokenizer) -> None:
    """Tokens, both log-probabilities, experts; the same calls with the same groups and slots."""
    tasks, params = tasks_of(DIGITS, 5, 4), params_of(20, 12)
    forced = [tokenizer.think_id] if think else []
    prompts = [[*encode_chat(tokenizer, [Message("user", task.prompt)]), *forced] for task in tasks]
    wanted = generate_ids(model, prompts, params, eos_id=tokenizer.eos_id, routing=routing)
    episodes = play(model, tokenizer, DIGITS, tasks, params, routing=routing, think=think)
    assert len(episodes) == 20
    for task, prompt, request, episode in zip(tasks, prompts, wanted, episodes, strict=True):
        assert episode.task is task and episode.finish_reason == request.finish_reason
        (branch,) = episode.branches
        assert branch.ids == [*prompt, *request.token_ids]
        assert branch.sampled == [False] * len(prompt) + [True] * len(request.token_ids)
        assert branch.logprobs == request.logprobs
        assert branch.sampling_logprobs == request.sampling_logprobs
        assert episode.tokens == len(request.token_ids)
        assert examples_of(episode) == [(branch.ids, branch.sampled)]
        if routing:
            assert torch.equal(torch.stack(branch.experts), torch.stack(request.routed_experts))
            assert len(branch.experts) == len(branch.ids) - 1
        else:
            assert branch.experts is None


def test_one_turn_calls_generate_ids_once(model, tokenizer, monkeypatch) -> None:
    """With the prompts as they come: the slots and the sharing of prompts follow from that."""
    calls = []

    def watched(model_, prompts, params, **keywords):
        calls.append((len(prompts), [p.seed for p in params], keywords))
        return generate_ids(model_, prompts, params, **keywords)

    monkeypatch.setattr(module, "generate_ids", watched)
    params = params_of(6, 4)
    play(model, tokenizer, DIGITS, tasks_of(DIGITS, 2, 3), params)
    assert calls == [(6, [p.seed for p in params], {"eos_id": tokenizer.eos_id, "routing": False})]


def test_greedy_takes_the_most_probable_token(model, tokenizer) -> None:
    """By the whole forward pass, token by token."""
    tasks = tasks_of(DIGITS, 4, 1)
    for task, episode in zip(
        tasks, play(model, tokenizer, DIGITS, tasks, params_of(4, 12, 0.0)), strict=True
    ):
        ids = encode_chat(tokenizer, [Message("user", task.prompt)])
        start = len(ids)
        with torch.no_grad():
            while len(ids) - start < 12 and ids[-1] != tokenizer.eos_id:
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert episode.branches[0].ids == ids


def test_an_episode_depends_on_its_own_task_and_seed_alone(model, tokenizer) -> None:
    """Played with others, alone or in another order: the same tokens."""
    tasks, params = tasks_of(DIGITS, 5, 2), params_of(10, 10)

    def ids(episodes: list[Episode]) -> list[list[int]]:
        return [branch.ids for episode in episodes for branch in episode.branches]

    whole = ids(play(model, tokenizer, DIGITS, tasks, params))
    turned = ids(play(model, tokenizer, DIGITS, tasks[::-1], params[::-1]))
    alone = [
        ids(play(model, tokenizer, DIGITS, [task], [each]))[0]
        for task, each in zip(tasks, params, strict=True)
    ]
    assert turned[::-1] == whole == alone
    assert len({str(each) for each in whole}) == 10, "every seed draws its own"
    assert play(model, tokenizer, DIGITS, [], []) == []


def scripted(monkeypatch, tokenizer, answers: list[list[int]]) -> list[tuple[list[int], int, int]]:
    """Let generate_ids return these tokens, call by call; what it was asked: prompt, seed, limit."""
    asked: list[tuple[list[int], int, int]] = []

    def fake(model, prompts, params, **keywords):
        requests = generate_ids(model, prompts, params, **keywords)
        for prompt, each, request in zip(prompts, params, requests, strict=True):
            asked.append((list(prompt), each.seed, each.max_tokens))
            ids = answers[len(asked) - 1][: each.max_tokens]
            request.token_ids[:] = ids
            request.logprobs[:] = request.sampling_logprobs[:] = [-1.0] * len(ids)
            request.finish_reason = "stop" if ids[-1] == tokenizer.eos_id else "length"
        return requests

    monkeypatch.setattr(module, "generate_ids", fake)
    return asked


def spelled(tokenizer, *parts: int | str) -> list[int]:
    return [
        token
        for part in parts
        for token in (tokenizer.encode(part) if isinstance(part, str) else [part])
    ]


@pytest.mark.parametrize("think", [False, True])
def test_what_is_sampled_is_read_and_scored(think, model, tokenizer, monkeypatch) -> None:
    """Forced thinking is part of the answer; what never ended has no content."""
    task = DIGITS.task("test", 0)
    wrong = str((int(task.answer) + 1) % 10)
    start, end, eos = tokenizer.think_id, tokenizer.end_think_id, tokenizer.eos_id
    cases: list[tuple[list[int | str], str]] = [
        ([end, task.answer, eos], "right"),
        (["12", end, task.answer, eos], "right"),
        ([start, "12", end, task.answer, eos], "right"),
        ([end, wrong, eos], "wrong"),
        ([end, task.answer], "wrong"),  # never ended
        ([task.answer, eos], "wrong"),  # reasoning alone
        ([eos], "wrong"),
        ([end, task.answer, eos, wrong], "right"),  # nothing counts after the end
    ]
    sampled = [spelled(tokenizer, *parts) for parts, _ in cases]
    scripted(monkeypatch, tokenizer, sampled)
    episodes = play(
        model, tokenizer, DIGITS, [task] * len(cases), params_of(len(cases), 9), think=think
    )
    assert [episode.score.verdict for episode in episodes] == [verdict for _, verdict in cases]
    for ids, episode in zip(sampled, episodes, strict=True):
        read, finished = parse_assistant(tokenizer, [start, *ids] if think else ids)
        assert episode.answer.reasoning == read.reasoning
        assert episode.answer.content == (read.content if finished else "")
        assert episode.tokens == len(ids)
        assert episode.right == (episode.score.verdict == "right")
        assert episode.transcript[0] == Message("user", task.prompt)


def test_a_user_turn_begins_a_branch_without_earlier_reasoning(
    model, tokenizer, monkeypatch
) -> None:
    start, end, eos = tokenizer.think_id, tokenizer.end_think_id, tokenizer.eos_id
    answers = [
        spelled(tokenizer, start, "12", end, "a", eos),
        spelled(tokenizer, end, "b", eos),
        spelled(tokenizer, end, "c", eos),
    ]
    asked = scripted(monkeypatch, tokenizer, answers)
    environment = Talk()
    task = environment.task("test", 4)
    (episode,) = play(
        model, tokenizer, environment, [task], [SamplingParams(max_tokens=20, seed=9)]
    )
    said = [
        Message("user", "4?"), Message("assistant", "a", "12"), Message("user", "1"),
        Message("assistant", "b"), Message("user", "2"), Message("assistant", "c"),
    ]  # fmt: skip
    assert episode.transcript == said and episode.right and episode.finish_reason == "stop"
    plain = [Message(message.role, message.content) for message in said]
    prompts = [encode_chat(tokenizer, plain[:end]) for end in (1, 3, 5)]
    lengths = [len(ids) for ids in answers]
    assert asked == [
        (prompts[0], 9, 20),
        (prompts[1], derive(9, "turn", 1), 20 - lengths[0]),
        (prompts[2], derive(9, "turn", 2), 20 - lengths[0] - lengths[1]),
    ]
    assert [branch.ids for branch in episode.branches] == [
        [*prompt, *ids] for prompt, ids in zip(prompts, answers, strict=True)
    ]
    assert examples_of(episode) == [
        ([*prompt, *ids], [False] * len(prompt) + [True] * len(ids))
        for prompt, ids in zip(prompts, answers, strict=True)
    ]
    assert episode.tokens == sum(lengths)


def test_an_episode_ends_where_nothing_is_left_to_sample(model, tokenizer, monkeypatch) -> None:
    """max_tokens limits all turns together. An observation that no answer followed is left out."""
    end, eos = tokenizer.end_think_id, tokenizer.eos_id
    scripted(monkeypatch, tokenizer, [spelled(tokenizer, end, "a", eos)] * 2)
    environment = Talk()
    task = environment.task("test", 4)
    for limit, turns in ((3, 1), (5, 2), (6, 2)):
        scripted(monkeypatch, tokenizer, [spelled(tokenizer, end, "a", eos)] * 2)
        (episode,) = play(model, tokenizer, environment, [task], [SamplingParams(max_tokens=limit)])
        roles = [message.role for message in episode.transcript]
        assert roles == ["user", "assistant"] * turns and episode.finish_reason == "length"
        assert episode.tokens == limit and episode.score == Score("wrong", f"{turns} answers")
        assert episode.answer.content == ("a" if limit in (3, 6) else "")


def test_an_episode_ends_where_the_context_does(model, tokenizer, monkeypatch) -> None:
    end, eos = tokenizer.end_think_id, tokenizer.eos_id
    long = spelled(tokenizer, end, "a" * 55, eos)
    scripted(monkeypatch, tokenizer, [long, long])
    environment = Talk()
    (episode,) = play(
        model, tokenizer, environment, [environment.task("test", 4)], params_of(1, 200)
    )
    assert [message.role for message in episode.transcript] == ["user", "assistant"]
    assert episode.finish_reason == "length" and episode.answer.content == "a" * 55


def test_an_environment_that_asks_nothing_is_named(model, tokenizer) -> None:
    class Silent(Talk):
        def reply(self, task: Task, transcript: Sequence[Message]) -> Message | None:
            return None

    with pytest.raises(Failed, match="talk asks nothing"):
        play(model, tokenizer, Silent(), [Silent().task("test", 0)], params_of(1, 4))
