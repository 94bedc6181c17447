"""The described API: what it says of requests and responses, and the server under requests that
schemathesis makes of the description, valid ones, and ones that are wrong in a place.
"""

import json
import os
import subprocess
import sys

import jsonschema
import pytest
from fastapi import FastAPI
from pydantic import ValidationError

from xushi.serve.completions import json_response
from xushi.serve.openapi import describe_api
from xushi.serve.protocol import ChatBody, CompletionBody

from .test_clients import installed

API = describe_api()
KINDS = {"ChatBody": ChatBody, "CompletionBody": CompletionBody}
CHAT = {"model": "reasoning", "messages": [{"role": "user", "content": "a"}]}
TEXT = {"model": "base", "prompt": "a"}


def fits(name, value):
    """Whether a value is what the description says of this schema."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": API["components"]}
    return jsonschema.Draft202012Validator(schema).is_valid(value)


def is_taken(name, body):
    """Whether the server's own classes take a body."""
    try:
        KINDS[name].model_validate(body)
    except ValidationError:
        return False
    return True


MESSAGES = [
    {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": None}]},
    {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "x"}}]},
    {"role": "assistant", "content": None},
    {"role": "assistant", "type": "text", "name": ""},
    {"role": "developer", "content": ""},
    {"role": "user", "content": None},
    {"role": "user"},
    {"role": "assistant", "content": 3},
    {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]},
    {"role": "user", "content": "a", "name": "x"},
    {"role": "tool", "content": "a"},
]
PROMPTS = ["a", ["a", "b"], [7, 8], [[7], [8]], [], "", [[]], 3, [True], ["a", 7], ["a"] * 65]
VALUES = {
    "max_tokens": [16, 16.0, 0, -1, 16.5, None, "16"],
    "max_completion_tokens": [1, 0],
    "temperature": [None, 0, 0.5, -1, "", True],
    "top_p": [1, 0, 1.5, 0.01],
    "n": [1, 64, 0, 65, 1.0],
    "seed": [-1, 1 << 62, 1 << 63, 1.5],
    "stop": ["x", ["x", "y"], [], "", ["x"] * 17, 3],
    "stream": [True, None, 1],
    "stream_options": [None, {}, {"include_usage": True, "include_obfuscation": False}, {"x": 1}],
    "logit_bias": [{}, {"7": 0}, {"7": 0.0}, {"7": 1}],
    "logprobs": [None, True, False, 0, 20, 21],
    "top_logprobs": [0, 20, 21],
    "best_of": [1, 0],
    "tools": [[], [1], None],
    "top_k": [-1, 0, 5, False],
    "repetition_penalty": [1, 1.0, 1.1],
    "response_format": [{"type": "text"}, {"type": "json_object"}, {}],
    "store": [False, True, 0],
    "parallel_tool_calls": [True, False, 1],
    "user": ["me", 3],
    "metadata": [{"a": 1}, []],
    "suffix": ["", "x"],
}


@pytest.mark.parametrize("name", sorted(VALUES))
def test_exactly_what_is_described_is_taken(name):
    for kind, start in (("ChatBody", CHAT), ("CompletionBody", TEXT)):
        for value in VALUES[name]:
            body = {**start, name: value}
            assert fits(kind, body) == is_taken(kind, body), body


def test_exactly_the_described_messages_and_prompts_are_taken():
    bodies = [("ChatBody", {**CHAT, "messages": [each]}) for each in MESSAGES]
    bodies += [("CompletionBody", {**TEXT, "prompt": each}) for each in PROMPTS]
    bodies += [("ChatBody", {**CHAT, "messages": CHAT["messages"] * n}) for n in (0, 1024, 1025)]
    found = [is_taken(*body) for body in bodies]
    assert [fits(*body) for body in bodies] == found and True in found and False in found


def changed(value):
    """The same answer with one key left out, or one more: for each object in it."""
    if isinstance(value, dict):
        yield {**value, "more": 1}
        for name, inner in value.items():
            yield {key: each for key, each in value.items() if key != name}
            for other in changed(inner):
                yield {**value, name: other}
    elif isinstance(value, list) and value:
        for other in changed(value[0]):
            yield [other, *value[1:]]


@pytest.mark.parametrize(
    ("path", "body", "schema"),
    [
        ("chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2}, "ChatCompletion"),
        ("chat/completions", CHAT, "ChatCompletion"),
        ("completions", {**TEXT, "echo": True, "logprobs": 2}, "Completion"),
        ("completions", TEXT, "Completion"),
        ("completions", {**TEXT, "n": 0}, "Error"),
    ],
)
def test_responses_are_as_described(http, path, body, schema):
    """And nothing else is: an answer with a key less or more does not fit."""
    sent = {**body, "seed": 3, "max_tokens": 40}
    answer = http.post(f"/v1/{path}", content=json.dumps(sent)).json()
    assert fits(schema, answer)
    assert not any(fits(schema, each) for each in changed(answer))


def test_models_and_health_are_as_described(http):
    paths = {"v1/models": "Models", "v1/models/base": "Model", "health": "Health"}
    for path, schema in paths.items():
        answer = http.get(f"/{path}").json()
        assert fits(schema, answer)
        assert not any(fits(schema, each) for each in changed(answer))


def schemathesis(address, checks, examples, *more):
    options = (
        f"--checks {checks} --mode all --max-examples {examples} --generation-deterministic "
        "--no-color --suppress-health-check all --request-timeout 60"
    )
    run = [sys.executable, "-m", "schemathesis.cli", "run", f"{address}/openapi.json"]
    return subprocess.run(
        [*run, *options.split(), *more],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "PYTHONPATH": str(installed("schemathesis"))},
    )


@pytest.mark.slow
def test_no_described_request_is_a_server_error(address):
    checks = "not_a_server_error,content_type_conformance,response_schema_conformance"
    done = schemathesis(address, checks, 25)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Test cases:" in done.stdout


@pytest.mark.slow
def test_an_answer_that_is_not_as_described_is_told(serving):
    """The check above can fail: a server whose answers have a key less."""
    app = FastAPI(openapi_url=None)
    app.state.workers = {}

    @app.get("/openapi.json")
    async def openapi():
        return json_response(API)

    @app.get("/health")
    async def health():
        return json_response({})

    with serving(app) as (address, _):
        done = schemathesis(address, "response_schema_conformance", 1, "--include-path=/health")
    assert done.returncode == 1 and "is a required property" in done.stdout
