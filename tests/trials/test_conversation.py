"""A conversation with a model that xushi made: the second question is answered like the first, in
Python, through the API and in the terminal.
"""

import io

import pytest
from starlette.testclient import TestClient

from xushi.base.messages import Message
from xushi.engine import LLM, SamplingParams
from xushi.envs import DigitSum
from xushi.serve import create_app, find_models
from xushi.tokenizer import parse_assistant

from ..miniature import Chain, xushi_here

ENVIRONMENT = DigitSum(DigitSum.Config(min_digits=3, max_digits=3))
CONVERSATIONS = 20
QUESTIONS = 3

# Numbers that the model was not trained on.
TASKS = [
    [ENVIRONMENT.task("test", 1000 + QUESTIONS * number + turn) for turn in range(QUESTIONS)]
    for number in range(CONVERSATIONS)
]


def test_every_question_of_a_conversation_is_answered(chain: Chain) -> None:
    llm = LLM(chain.directory / "export" / "reasoning")
    conversations: list[list[Message]] = [[] for _ in TASKS]
    for turn in range(QUESTIONS):
        tasks = [each[turn] for each in TASKS]
        for messages, task in zip(conversations, tasks, strict=True):
            messages.append(Message("user", task.prompt))
        prompts = [llm.conversation_ids(messages) for messages in conversations]
        answers = llm.generate(prompts, SamplingParams(20, temperature=0.0))
        right = 0
        for messages, task, answer in zip(conversations, tasks, answers, strict=True):
            message, _ = parse_assistant(llm.tokenizer, answer.token_ids)
            right += message.content == task.answer and message.reasoning is not None
            messages.append(message)
        assert right >= 0.9 * CONVERSATIONS, f"{right} right of question {turn + 1}"


def test_the_second_question_in_the_api(chain: Chain) -> None:
    right = 0
    with TestClient(create_app(find_models(chain.directory)), base_url="http://localhost") as api:
        for first, second, _ in TASKS[:5]:
            history = [("user", first.prompt), ("assistant", first.answer), ("user", second.prompt)]
            body = {
                "model": "reasoning",
                "temperature": 0,
                "messages": [{"role": role, "content": content} for role, content in history],
            }
            answer = api.post("/v1/chat/completions", json=body).json()
            right += answer["choices"][0]["message"]["content"] == second.answer
    assert right >= 4


def test_the_second_question_in_the_terminal(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = TASKS[0]
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{task.prompt}\n" for task in tasks)))
    done = xushi_here("chat", chain.directory, "--temperature", "0")
    assert done.stdout == "".join(f"{task.answer}\n" for task in tasks)
    assert done.returncode == 0 and len(done.stderr.splitlines()) == QUESTIONS  # the thinking
    done = xushi_here("chat", chain.directory, tasks[1].prompt, "--temperature", "0")
    assert done.stdout == f"{tasks[1].answer}\n" and done.returncode == 0
