"""Clients of the OpenAI API in processes of their own, each from a folder with what only it needs.

`make test-slow` installs them by the lists in tests/serve/clients. A cell of the matrix in
docs/serve.md is a test here.
"""

import functools
import json
import os
import re
import subprocess
import sys

import pytest

from ..miniature import ROOT

CLIENTS = ROOT / "tests" / "serve" / "clients"
INSTALLED = ROOT / ".venv" / "clients"
pytestmark = pytest.mark.slow

CHAT = ["chat_whole", "chat_stream", "chat_second"]
TEXT = ["completion_whole", "completion_stream"]
OPENAI = ["version", "models", *CHAT, "chat_async", *TEXT, "scores", "refusal"]
MATRIX = {
    "openai1": OPENAI,
    "openai2": OPENAI,
    "openai": OPENAI,
    "langchain": [*CHAT, *TEXT, "completion_default"],
    "litellm": [*CHAT, *TEXT],
    "llm": [*CHAT, *TEXT],
}


def installed(name):
    """The folder of a client. A client that is not there is skipped, but not in CI."""
    folder = INSTALLED / name
    if not folder.is_dir():
        assert not os.environ.get("CI"), f"{folder} is missing: make test-slow installs it"
        pytest.skip(f"the client {name} is not installed; make test-slow installs it")
    return folder


@pytest.fixture(scope="module")
def told(address):
    """A function that gives what a client was told, by call; it asks once."""

    @functools.cache
    def ask(name):
        # The client that the tests themselves use needs no folder.
        folders = [] if name == "openai" else [str(installed(name))]
        script = CLIENTS / f"ask_{name.rstrip('12')}.py"
        done = subprocess.run(
            [sys.executable, script, f"{address}/v1"],
            capture_output=True,
            text=True,
            timeout=240,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(folders),
                "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            },
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return ask


@pytest.fixture(scope="module")
def expected(http):
    """What every client must be told, from requests without any client."""

    def ask(path, body):
        answer = http.post(f"/v1/{path}", content=json.dumps({"seed": 7, "max_tokens": 24, **body}))
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]

    question = {"role": "user", "content": "数字之和是多少？"}
    first = ask("chat/completions", {"model": "reasoning", "messages": [question]})["message"]
    turns = [question, {"role": "assistant", "content": first["content"]}, question]
    second = ask("chat/completions", {"model": "reasoning", "messages": turns})["message"]
    text = ask("completions", {"model": "base", "prompt": "数字之和"})["text"]
    scored = {"model": "base", "prompt": "数字之和", "echo": True, "logprobs": 0, "max_tokens": 0}
    scores = ask("completions", scored)["logprobs"]["token_logprobs"]
    return {
        "models": ["reasoning", "base"],
        "chat_whole": first["content"],
        "chat_stream": first["content"],
        "chat_async": first["content"],
        "chat_second": second["content"],
        "completion_whole": text,
        "completion_stream": text,
        "completion_default": True,
        "scores": pytest.approx(sum(scores[1:]), abs=1e-4),
        "refusal": ["suffix", "unknown_parameter"],
    }


@pytest.mark.parametrize(
    ("name", "call"), [(name, call) for name, calls in MATRIX.items() for call in calls]
)
def test_a_client_is_answered(told, expected, name, call):
    found = told(name)[call]
    if call == "version":
        assert found.startswith({"openai1": "1.", "openai2": "2.", "openai": "3."}[name])
    elif isinstance(found, str) and call != "refusal":
        assert found.strip() == expected[call].strip()  # some clients trim
    else:
        assert found == expected[call]


def test_every_list_is_pinned_and_asked():
    lists = {path.stem for path in CLIENTS.glob("*.txt")}
    assert lists - {"schemathesis"} == set(MATRIX) - {"openai"}
    for name in lists:
        lines = (CLIENTS / f"{name}.txt").read_text().splitlines()
        assert lines and all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
