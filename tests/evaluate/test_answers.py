"""Answers to tasks: what is sampled depends on weights, task and seed alone, and forced thinking is
part of the answer.

The model is random: it answers nonsense, but the same nonsense.
"""

import pytest
import torch

from xushi.base.messages import Message
from xushi.envs import DigitSum, DigitSumConfig
from xushi.evaluate import answer_tasks, score_answer
from xushi.evaluate import answers as module
from xushi.tokenizer import encode_chat, parse_assistant

ENVIRONMENT = DigitSum(DigitSumConfig(min_digits=2, max_digits=4))
TASKS = [ENVIRONMENT.task("test", index) for index in range(6)]


def ask(model, tokenizer, tasks=TASKS, **changes):
    settings = {"samples": 3, "temperature": 1.0, "max_tokens": 12, "seed": 5} | changes
    return answer_tasks(model, tokenizer, ENVIRONMENT, tasks, **settings)


def said(answers) -> list[list[tuple]]:
    return [[(a.reasoning, a.content, a.tokens) for a in group] for group in answers]


def greedy_ids(model, tokenizer, task, forced: list[int], limit: int) -> list[int]:
    """The most probable token again and again, with the whole forward."""
    ids = [*encode_chat(tokenizer, [Message("user", task.prompt)]), *forced]
    start = len(ids)
    with torch.no_grad():
        while len(ids) - start < limit and ids[-1] != tokenizer.eos_id:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return [*forced, *ids[start:]]


@pytest.mark.parametrize("think", [False, True])
def test_greedy_takes_the_most_probable_token(think: bool, model, tokenizer) -> None:
    for task, (answer,) in zip(
        TASKS, ask(model, tokenizer, samples=1, temperature=0.0, think=think), strict=True
    ):
        ids = greedy_ids(model, tokenizer, task, [tokenizer.think_id] if think else [], 12)
        message, _ = parse_assistant(tokenizer, ids)
        assert answer.tokens == len(ids)
        assert (answer.reasoning, answer.content) == (message.reasoning, message.content)
        assert answer.task is task and answer.score == score_answer(
            ENVIRONMENT, task, tokenizer, ids
        )


def test_greedy_answers_to_one_task_are_equal_and_samples_are_not(model, tokenizer) -> None:
    for group in said(ask(model, tokenizer, temperature=0.0)):
        assert len(group) == 3 and len(set(group)) == 1
    assert all(len(set(group)) == 3 for group in said(ask(model, tokenizer)))


def test_one_seed_one_answer(model, tokenizer) -> None:
    first = said(ask(model, tokenizer))
    assert said(ask(model, tokenizer)) == first
    assert said(ask(model, tokenizer, seed=6)) != first


def test_an_answer_depends_on_its_own_task_and_sample_alone(model, tokenizer) -> None:
    """Asked with others, alone, in another order or for more samples: the same."""
    whole = said(ask(model, tokenizer))
    assert [said(ask(model, tokenizer, [task]))[0] for task in TASKS] == whole
    assert said(ask(model, tokenizer, TASKS[::-1])) == whole[::-1]
    assert [group[:3] for group in said(ask(model, tokenizer, samples=5))] == whole
    assert len({str(group) for group in whole}) == len(TASKS)


def test_forced_thinking_begins_the_answer(model, tokenizer, monkeypatch) -> None:
    """The mark stands at the end of the prompt, is no token to be sampled, and belongs to what is
    read and counted.
    """
    prompts: list[list[int]] = []
    generate = module.generate_ids

    def watched(model_, prompts_, params, eos_id):
        prompts.extend(prompts_)
        requests = generate(model_, prompts_, params, eos_id)
        for request in requests:  # a thought, its end, an answer and the end
            request.token_ids[:] = [
                *tokenizer.encode("12"),
                tokenizer.end_think_id,
                *tokenizer.encode("7"),
                tokenizer.eos_id,
            ]
        return requests

    monkeypatch.setattr(module, "generate_ids", watched)
    for think, reasoning, tokens in ((True, "12", 6), (False, "12", 5)):
        prompts.clear()
        answers = ask(model, tokenizer, think=think)
        plain = [
            encode_chat(tokenizer, [Message("user", task.prompt)])
            for task in TASKS
            for _ in range(3)
        ]
        assert prompts == [[*ids, tokenizer.think_id] if think else ids for ids in plain]
        assert all(
            (a.reasoning, a.content, a.tokens) == (reasoning, "7", tokens)
            for group in answers
            for a in group
        )


def test_scores_are_the_environments(tokenizer) -> None:
    task = TASKS[0]
    wrong = str((int(task.answer) + 1) % 10)

    def verdict(*parts: int | str) -> str:
        ids = [
            token
            for part in parts
            for token in (tokenizer.encode(part) if isinstance(part, str) else [part])
        ]
        return score_answer(ENVIRONMENT, task, tokenizer, ids).verdict

    think, end, eos = tokenizer.think_id, tokenizer.end_think_id, tokenizer.eos_id
    assert verdict(end, task.answer, eos) == "right"
    assert verdict(think, "12", end, task.answer, eos) == "right"
    assert verdict(end, wrong, eos) == "wrong"
    assert verdict(end, task.answer) == "wrong", "an answer that never ended is none"
    assert verdict(task.answer, eos) == "wrong", "what stands before </think> is no answer"
    assert (
        verdict(think, task.answer, eos) == "wrong"
        and verdict(eos) == "wrong"
        and verdict() == "wrong"
    )
    assert verdict(end, task.answer, eos, wrong) == "right", "nothing counts after the end"


def test_right_is_the_verdict_right(model, tokenizer) -> None:
    (answer,) = ask(model, tokenizer, TASKS[:1], samples=1)[0]
    assert answer.right == (answer.score.verdict == "right")
    said_right = ENVIRONMENT.score(
        TASKS[0], [Message("user", TASKS[0].prompt), Message("assistant", TASKS[0].answer)]
    )
    assert type(answer)(TASKS[0], None, TASKS[0].answer, said_right, 3).right


def test_no_tasks_no_answers(model, tokenizer) -> None:
    assert ask(model, tokenizer, []) == []


def test_length_is_limited(model, tokenizer) -> None:
    assert all(a.tokens <= 2 for group in ask(model, tokenizer, max_tokens=2) for a in group)
    assert all(
        a.tokens <= 3 for group in ask(model, tokenizer, max_tokens=2, think=True) for a in group
    )
