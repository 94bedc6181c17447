"""Episodes: one turn gives exactly what generate_ids gives; several turns are held against whole
forward passes over their own token sequences.

The model is random: it answers nonsense, but the same nonsense.
"""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from xushi.base.errors import Failed
from xushi.base.messages import Message
from xushi.base.seeds import derive
from xushi.engine import Engine, SamplingParams, generate_ids
from xushi.envs import DigitSum, DigitSumConfig, Environment, Score, Task
from xushi.evaluate import Branch, Episode, examples_of, play
from xushi.evaluate import episodes as module
from xushi.model import Deepseek
from xushi.tokenizer import Tokenizer, encode_chat, encode_outputs, parse_assistant

from .talking import Talk, Tools, talkative_model, tokenizer_with_tools

DIGITS = DigitSum(DigitSumConfig(min_digits=2, max_digits=4))


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
    tasks, params = tasks_of(DIGITS, 5, 4), params_of(20, 12, 0.7)
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

    def watched(model_, prompts, params, finished, **keywords):
        calls.append((len(prompts), [p.seed for p in params], keywords))
        return generate_ids(model_, prompts, params, finished=finished, **keywords)

    monkeypatch.setattr(module, "generate_ids", watched)
    params = params_of(6, 4)
    play(model, tokenizer, DIGITS, tasks_of(DIGITS, 2, 3), params)
    assert calls == [(6, [p.seed for p in params], {"eos_id": tokenizer.eos_id, "routing": False})]


@pytest.mark.parametrize("tools", [False, True])
def test_the_end_of_each_episode_is_told(
    tools, model, tokenizer, talkative, with_tools, monkeypatch
) -> None:
    """Where a sequence is all of an episode, as soon as it has ended and not when all have."""
    steps = 0
    step = Engine.step

    def counted(engine: Engine) -> object:
        nonlocal steps
        steps += 1
        return step(engine)

    monkeypatch.setattr(Engine, "step", counted)
    ended: list[int] = []
    tasks, limits = tasks_of(DIGITS, 8, 1), range(2, 10)
    params = [SamplingParams(max_tokens=limit, seed=limit) for limit in limits]
    if tools:
        environment = Tools()
        tasks = tasks_of(environment, 3, 2)
        params = params_of(6, 24)
        play(talkative, with_tools, environment, tasks, params, ended=lambda: ended.append(steps))
        assert len(ended) == 6
        return
    episodes = play(model, tokenizer, DIGITS, tasks, params, ended=lambda: ended.append(steps))
    assert len(ended) == 8 and ended == sorted(ended)
    # The first step reads the question and samples the first token of all of them.
    assert ended == sorted(episode.tokens for episode in episodes)


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

    def fake(model, prompts, params, finished, **keywords):
        requests = generate_ids(model, prompts, params, **keywords)
        for prompt, each, request in zip(prompts, params, requests, strict=True):
            asked.append((list(prompt), each.seed, each.max_tokens))
            ids = answers[len(asked) - 1][: each.max_tokens]
            request.token_ids[:] = ids
            request.logprobs[:] = request.sampling_logprobs[:] = [-1.0] * len(ids)
            request.finish_reason = "stop" if ids[-1] == tokenizer.eos_id else "length"
        for number, request in enumerate(requests):
            finished(number, request)
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
    environment = Talk()
    task = environment.task("test", 4)
    for limit, turns in ((3, 1), (5, 2), (6, 2)):
        scripted(monkeypatch, tokenizer, [spelled(tokenizer, end, "a", eos)] * 2)
        (episode,) = play(model, tokenizer, environment, [task], [SamplingParams(max_tokens=limit)])
        roles = [message.role for message in episode.transcript]
        assert roles == ["user", "assistant"] * turns and episode.finish_reason == "length"
        assert episode.tokens == limit and episode.score == Score("wrong", f"{turns} answers")
        assert episode.answer.content == ("a" if limit in (3, 6) else "")


@pytest.mark.parametrize(("letters", "turns"), [(53, 2), (54, 1), (56, 1)])
def test_an_episode_ends_where_the_context_does(
    letters, turns, model, tokenizer, monkeypatch
) -> None:
    """The context of 64 must hold the next prompt and one token of an answer. Prompts have 5 tokens
    and, after an answer, 3 more.
    """
    end, eos = tokenizer.end_think_id, tokenizer.eos_id
    long = spelled(tokenizer, end, "a" * letters, eos)
    scripted(monkeypatch, tokenizer, [long, [end]])
    environment = Talk()
    (episode,) = play(
        model, tokenizer, environment, [environment.task("test", 4)], params_of(1, 200)
    )
    assert [message.role for message in episode.transcript] == ["user", "assistant"] * turns
    assert episode.finish_reason == "length" and episode.transcript[1].content == "a" * letters


def test_an_environment_that_asks_nothing_is_named(model, tokenizer) -> None:
    class Silent(Talk):
        def reply(self, task: Task, transcript: Sequence[Message]) -> Message | None:
            return None

    with pytest.raises(Failed, match="talk asks nothing"):
        play(model, tokenizer, Silent(), [Silent().task("test", 0)], params_of(1, 4))


# Episodes with tools: the real engine, which keeps sequences between turns.


@pytest.fixture(scope="module")
def with_tools() -> Tokenizer:
    return tokenizer_with_tools()


@pytest.fixture(scope="module")
def talkative(with_tools) -> Deepseek:
    return talkative_model(with_tools)


def log_probabilities(model: Deepseek, branch: Branch) -> torch.Tensor:
    """Of the sampled tokens, by one forward pass over the whole branch."""
    ids = torch.tensor(branch.ids)
    with torch.no_grad():
        log_p = model(ids[None, :-1]).logits[0].log_softmax(-1)
    chosen = log_p.gather(1, ids[1:, None])[:, 0]
    return chosen[torch.tensor(branch.sampled[1:])]


def test_an_episode_of_tools_is_one_growing_sequence(talkative, with_tools) -> None:
    """Each prompt extends what was sampled; the log-probabilities and the experts of all turns are
    those of the whole sequence, whichever way they were computed.
    """
    environment = Tools()
    tasks, params = tasks_of(environment, 6, 4), params_of(24, 36)
    episodes = play(talkative, with_tools, environment, tasks, params, routing=True)
    turns = [sum(m.role == "assistant" for m in episode.transcript) for episode in episodes]
    assert set(turns) == {1, 2, 3}, "the test sees episodes of every length"
    for episode, length in zip(episodes, turns, strict=True):
        (branch,) = episode.branches
        assert len(branch.ids) == len(branch.sampled) == len(branch.experts) + 1
        assert sum(branch.sampled) == len(branch.logprobs) == episode.tokens <= 36
        expected = log_probabilities(talkative, branch)
        assert torch.allclose(expected, torch.tensor(branch.logprobs), atol=1e-4)
        assert branch.sampling_logprobs == pytest.approx(branch.logprobs, abs=1e-5)
        assert (episode.finish_reason == "length") == (length < 3 or not ended(episode, with_tools))
        roles = ["user", "assistant", "tool", "assistant", "tool", "assistant"]
        assert [message.role for message in episode.transcript] == roles[: 2 * length]
    for length in (1, 2, 3):
        place = turns.index(length)
        turns_again(talkative, with_tools, environment, episodes[place], params[place])


def test_with_tools_too_every_turn_is_made_to_think(talkative, with_tools) -> None:
    environment = Tools()
    tasks, params = tasks_of(environment, 4, 4), params_of(16, 36)
    episodes = play(talkative, with_tools, environment, tasks, params, think=True)
    assert any(len(episode.transcript) > 2 for episode in episodes)
    for episode in episodes:
        (branch,) = episode.branches
        places = [i for i in range(1, len(branch.ids)) if branch.sampled[i] > branch.sampled[i - 1]]
        assert len(places) == len(episode.transcript) // 2
        assert [branch.ids[i - 1] for i in places] == [with_tools.think_id] * len(places)
        answers = [message for message in episode.transcript if message.role == "assistant"]
        assert all(answer.reasoning is not None for answer in answers)


def ended(episode: Episode, tokenizer: Tokenizer) -> bool:
    return episode.branches[-1].ids[-1] == tokenizer.eos_id


def turns_again(model, tokenizer, environment, episode: Episode, params: SamplingParams) -> None:
    """Each turn alone through generate_ids, its prompt computed from the beginning: the same."""
    (branch,) = episode.branches
    start = branch.sampled.index(True)
    assert branch.ids[:start] == encode_chat(tokenizer, episode.transcript[:1], environment.tools)
    used, experts = 0, None
    for turn in range(len(episode.transcript) // 2):
        seed = derive(params.seed, "turn", turn) if turn else params.seed
        each = replace(params, seed=seed, max_tokens=params.max_tokens - used)
        (request,) = generate_ids(
            model, [branch.ids[:start]], each, eos_id=tokenizer.eos_id, routing=True
        )
        end = start + len(request.token_ids)
        assert branch.ids[start:end] == request.token_ids
        assert all(branch.sampled[start:end])
        used, experts = used + len(request.token_ids), request.routed_experts
        if end < len(branch.ids):
            observation = encode_outputs(tokenizer, [episode.transcript[2 * turn + 2]])
            start = end + len(observation)
            assert branch.ids[end:start] == observation
            assert not any(branch.sampled[end:start])
    assert end == len(branch.ids)
    agreed = torch.stack(branch.experts) == torch.stack(experts)
    assert agreed.float().mean() > 0.99  # but for near ties that rounding decides


def watched(monkeypatch: pytest.MonkeyPatch) -> list[Engine]:
    """The engines that `play` makes from now on."""
    engines = []

    class Watched(Engine):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            engines.append(self)

    monkeypatch.setattr(module, "Engine", Watched)
    return engines


def test_a_cache_for_one_context_is_enough(talkative, with_tools, monkeypatch) -> None:
    """Kept sequences that do not fit wait outside of it."""
    environment = Tools()
    tasks, params = tasks_of(environment, 2, 4), params_of(8, 30)
    wanted = play(talkative, with_tools, environment, tasks, params)
    engines = watched(monkeypatch)
    monkeypatch.setattr(module, "MOST_SLOTS", 1)
    episodes = play(talkative, with_tools, environment, tasks, params)
    (engine,) = engines
    assert engine.slots == 1024
    assert [episode.branches[0].ids for episode in episodes] == [
        episode.branches[0].ids for episode in wanted
    ]


def test_a_user_turn_after_tools_begins_a_branch(talkative, with_tools, monkeypatch) -> None:
    """What the branch before it held is given back."""

    class Mixed(Tools):
        def reply(self, task: Task, transcript: Sequence[Message]) -> Message | None:
            given = super().reply(task, transcript)
            return given if given is None or len(transcript) != 4 else replace(given, role="user")

    environment = Mixed()
    tasks, params = tasks_of(environment, 6, 4), params_of(24, 40)
    episodes = play(talkative, with_tools, environment, tasks, params)
    several = [episode for episode in episodes if len(episode.branches) == 2]
    assert several
    for episode in several:
        second = episode.branches[1]
        prompt = encode_chat(with_tools, episode.transcript[:5], environment.tools)
        assert second.ids[: len(prompt)] == prompt
        for branch in episode.branches:
            expected = log_probabilities(talkative, branch)
            assert torch.allclose(expected, torch.tensor(branch.logprobs), atol=1e-4)
    engines, place = watched(monkeypatch), episodes.index(several[0])
    (again,) = play(talkative, with_tools, environment, [tasks[place]], [params[place]])
    (engine,) = engines
    assert len(again.branches) == 2
    assert engine.slots - engine.idle_slots == len(again.branches[1].ids) - 1


def test_a_call_that_was_cut_off_after_its_end_is_not_taken(model, with_tools, monkeypatch) -> None:
    """The block of calls is whole, and the end of the message is missing."""
    marks = with_tools.tool_ids
    call = [marks.call_begin, "f", marks.separator, "{}", marks.call_end]
    ids = spelled(
        with_tools, with_tools.end_think_id, "a", marks.calls_begin, *call, marks.calls_end
    )
    assert parse_assistant(with_tools, ids)[0].tool_calls
    scripted(monkeypatch, with_tools, [ids])
    wide = Deepseek(model.config.model_copy(update={"vocab_size": with_tools.vocab_size}))
    environment = Talk()
    (episode,) = play(
        wide.initialise(3), with_tools, environment, [environment.task("test", 4)], params_of(1, 20)
    )
    assert episode.finish_reason == "length"
    assert (episode.answer.content, episode.answer.tool_calls) == ("", ())


@pytest.mark.parametrize("limit", [5, 12])
def test_max_tokens_limits_the_turns_with_tools_too(limit, talkative, with_tools) -> None:
    environment = Tools()
    tasks, params = tasks_of(environment, 4, 4), params_of(16, limit)
    episodes = play(talkative, with_tools, environment, tasks, params)
    assert all(episode.tokens <= limit for episode in episodes)
    assert all(episode.transcript[-1].role == "assistant" for episode in episodes)
