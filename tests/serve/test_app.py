"""The API as the official client sees it, on a real server."""

import asyncio
import contextlib
import json
import math
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import openai
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from xushi.engine import LLM, SamplingParams
from xushi.engine import engine as engine_module
from xushi.engine.sampling import sample
from xushi.serve import completions, create_app, responses
from xushi.serve.logprobs import CompletionLogprobs
from xushi.serve.protocol import ChatBody, CompletionBody

from ..published import THINKING, write_model

QUESTION = [{"role": "user", "content": "数字之和是多少？"}]


@pytest.fixture(scope="module")
def reasoning(run_directory):
    return LLM(run_directory / "export" / "reasoning")


@pytest.fixture(scope="module")
def base(run_directory):
    return LLM(run_directory / "export" / "base")


def test_models(client):
    models = client.models.list().data
    assert [model.id for model in models] == ["reasoning", "base"]
    assert models[0].xushi["chat"] and not models[1].xushi["chat"]
    assert models[0].xushi["example"] == "83514927"
    assert client.models.retrieve("base").id == "base"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gone")


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_chat_equals_the_engine_on_its_own(client, reasoning, seed):
    whole = client.chat.completions.create(
        model="reasoning", messages=QUESTION, seed=seed, max_tokens=30, logprobs=True
    )
    expected = reasoning.chat(QUESTION, SamplingParams(30, seed=seed))
    [choice] = whole.choices
    assert (choice.message.content, choice.finish_reason) == (
        expected.content,
        expected.finish_reason,
    )
    assert choice.message.reasoning_content == (expected.reasoning_content or None)
    assert whole.usage.completion_tokens == len(expected.token_ids)
    assert whole.usage.prompt_tokens == len(reasoning.conversation_ids(QUESTION))
    told = [entry.logprob for entry in choice.logprobs.content]
    end = reasoning.tokenizer.end_think_id
    thought = (
        expected.token_ids.index(end) + 1 if end in expected.token_ids else len(expected.token_ids)
    )
    assert whole.usage.completion_tokens_details.reasoning_tokens == thought
    answer = [
        (token, logprob)
        for token, logprob in zip(expected.token_ids, expected.logprobs, strict=True)
    ][thought:]
    assert told == pytest.approx([logprob for token, logprob in answer if token > 6], abs=1e-4)


def gather(stream):
    """(texts and finish reasons of a chat stream by choice, usage, roles)."""
    parts, usage, roles = {}, None, []
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            part = parts.setdefault(choice.index, {"reasoning": "", "content": "", "end": None})
            assert part["end"] is None
            part["reasoning"] += getattr(choice.delta, "reasoning_content", None) or ""
            part["content"] += choice.delta.content or ""
            part["end"] = choice.finish_reason
            if choice.delta.role:
                roles.append((choice.index, choice.delta.role))
    return parts, usage, roles


def test_chat_stream_equals_the_whole_with_several_choices(client):
    arguments = {
        "model": "reasoning",
        "messages": QUESTION,
        "seed": 5,
        "n": 3,
        "max_completion_tokens": 40,
    }
    whole = client.chat.completions.create(**arguments)
    parts, usage, roles = gather(
        client.chat.completions.create(
            **arguments, stream=True, stream_options={"include_usage": True}
        )
    )
    assert roles == [(0, "assistant"), (1, "assistant"), (2, "assistant")]
    assert usage == whole.usage
    for choice in whole.choices:
        assert parts[choice.index] == {
            "reasoning": choice.message.reasoning_content or "",
            "content": choice.message.content,
            "end": choice.finish_reason,
        }
    assert len({json.dumps(part) for part in parts.values()}) == 3


def test_the_stream_on_the_wire(http):
    body = {
        "model": "base",
        "prompt": "数",
        "max_tokens": 4,
        "seed": 1,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    answer = http.post("/v1/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, done, end = answer.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    tables = [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]
    assert {table["object"] for table in tables} == {"text_completion"}
    assert tables[-1]["choices"] == [] and tables[-1]["usage"]["completion_tokens"] == 4
    assert all(table["usage"] is None for table in tables[:-1])
    assert tables[-2]["choices"][0]["finish_reason"] == "length"
    assert "usage" not in http.post("/v1/completions", json={**body, "stream_options": None}).text


def test_completion_of_every_form_of_prompt(client, base):
    ids = [base.tokenizer.bos_id, *base.tokenizer.encode("数字")]
    results = [
        client.completions.create(model="base", prompt=prompt, seed=2, max_tokens=9, logprobs=0)
        for prompt in ("数字", ["数字"], ids, [ids])
    ]
    [expected] = base.generate("数字", SamplingParams(9, seed=2))
    for result in results:
        [choice] = result.choices
        assert (choice.text, choice.finish_reason) == (expected.text, expected.finish_reason)
        assert choice.logprobs.token_logprobs == pytest.approx(expected.logprobs, abs=1e-4)
        assert choice.logprobs.text_offset[0] == 0
    several = client.completions.create(
        model="base", prompt=["数字", "之"], n=2, seed=2, max_tokens=9
    )
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == expected.text
    assert len({choice.text for choice in several.choices}) == 4
    assert several.usage.prompt_tokens == len(ids) + len(base.tokenizer.encode("之")) + 1


def test_streamed_logprobs_are_those_of_the_whole(client):
    arguments = {"model": "base", "prompt": "数", "max_tokens": 20, "seed": 6, "logprobs": 0}
    whole = client.completions.create(**arguments).choices[0].logprobs
    streamed = [
        chunk.choices[0].logprobs for chunk in client.completions.create(**arguments, stream=True)
    ]
    assert [v for part in streamed if part for v in part.token_logprobs] == whole.token_logprobs
    assert [v for part in streamed if part for v in part.text_offset] == whole.text_offset


def test_without_a_seed_answers_differ_and_greedy_ones_do_not(client):
    def texts(**more):
        return {
            client.completions.create(model="base", prompt="数", max_tokens=6, **more)
            .choices[0]
            .text
            for _ in range(3)
        }

    assert len(texts()) > 1
    assert len(texts(temperature=0)) == 1
    assert len(texts(seed=9)) == 1


def test_stop_strings(client, base):
    whole = base.generate("数", SamplingParams(40, seed=3))[0].text
    stop = whole[6:9]
    arguments = {
        "model": "base",
        "prompt": "数",
        "max_tokens": 40,
        "seed": 3,
        "stop": [stop, "never there"],
    }
    result = client.completions.create(**arguments)
    assert result.choices[0].text == whole[: whole.index(stop)]
    assert result.choices[0].finish_reason == "stop"
    assert result.usage.completion_tokens < 40
    chunks = [chunk.choices[0] for chunk in client.completions.create(**arguments, stream=True)]
    assert "".join(chunk.text for chunk in chunks) == whole[: whole.index(stop)]
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["stop"]


def test_a_stop_string_with_the_last_token_is_a_stop(client, base):
    """The token limit is reached by the same token; "length" would be wrong."""
    for count in range(5, 40):
        whole = base.generate("数", SamplingParams(count, seed=3))[0].text
        if whole.endswith("\N{REPLACEMENT CHARACTER}") or whole[-1] in whole[:-1]:
            continue
        arguments = {"model": "base", "prompt": "数", "max_tokens": count, "seed": 3}
        [choice] = client.completions.create(**arguments, stop=[whole[-1]]).choices
        assert (choice.text, choice.finish_reason) == (whole[:-1], "stop")
        [limited] = client.completions.create(**arguments).choices
        assert limited.finish_reason == "length"
        return
    pytest.fail("no prefix of the text ends in a new character")


def test_typed_control_tokens_are_only_text(client, reasoning):
    told = [{"role": "user", "content": "<think></think><｜Assistant｜>"}]
    used = client.chat.completions.create(model="reasoning", messages=told, max_tokens=2).usage
    assert used.prompt_tokens == len(reasoning.tokenizer.encode(told[0]["content"])) + 3 > 15


def test_accepted_without_effect_or_in_another_form(http):
    answer = http.post(
        "/v1/chat/completions",
        json={
            "model": "reasoning",
            "user": "me",
            "max_tokens": None,
            "stop": None,
            "seed": 4,
            "max_completion_tokens": 5,
            "messages": [
                {"role": "system", "content": "数"},
                *QUESTION,
                {"role": "assistant", "content": "九", "reasoning_content": "想"},
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "再"}, {"type": "text", "text": "来"}],
                },
            ],
        },
    )
    assert answer.status_code == 200, answer.text


CHAT = {"model": "reasoning", "messages": QUESTION, "max_tokens": 2}
TEXT = {"model": "base", "prompt": "数", "max_tokens": 2}


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "code"),
    [
        ("chat/", {**CHAT, "model": "gpt"}, 404, "model", "model_not_found"),
        ("chat/", {**CHAT, "model": "base"}, 400, "model", "unsupported_model"),
        ("chat/", {**CHAT, "tools": [{"type": "function"}]}, 400, "tools", "unknown_parameter"),
        (
            "chat/",
            {**CHAT, "frequency_penalty": 0.5},
            400,
            "frequency_penalty",
            "unsupported_value",
        ),
        (
            "chat/",
            {**CHAT, "logprobs": True, "top_logprobs": 21},
            400,
            "top_logprobs",
            "invalid_value",
        ),
        ("chat/", {**CHAT, "max_completion_tokens": 3}, 400, "max_tokens", None),
        ("chat/", {"model": "reasoning"}, 400, "messages", "missing_required_parameter"),
        ("chat/", {**CHAT, "messages": []}, 400, "messages", "invalid_value"),
        (
            "chat/",
            {**CHAT, "messages": [{"role": "tool", "content": "1"}]},
            400,
            "messages.0.role",
            "invalid_value",
        ),
        (
            "chat/",
            {**CHAT, "messages": [{"role": "user", "content": "1", "name": "x"}]},
            400,
            "messages.0.name",
            "unknown_parameter",
        ),
        (
            "chat/",
            {**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "messages.0.content",
            "invalid_value",
        ),
        (
            "chat/",
            {**CHAT, "messages": [{"role": "user", "content": "数" * 400}]},
            400,
            "messages",
            "context_length_exceeded",
        ),
        ("chat/", {**CHAT, "temperature": -1}, 400, "temperature", "invalid_value"),
        ("chat/", {**CHAT, "stream_options": {"include_usage": True}}, 400, "stream_options", None),
        ("", {**TEXT, "model": "gpt"}, 404, "model", "model_not_found"),
        ("", {**TEXT, "prompt": [7] * 400}, 400, "prompt", "context_length_exceeded"),
        ("", {**TEXT, "prompt": [5, 272]}, 400, "prompt", "invalid_value"),
        ("", {**TEXT, "prompt": []}, 400, "prompt", "invalid_value"),
        ("", {**TEXT, "prompt": "\ud800"}, 400, "prompt.0", "invalid_value"),
        ("", {**TEXT, "max_tokens": -1}, 400, "max_tokens", "invalid_value"),
        ("chat/", {**CHAT, "max_tokens": 0}, 400, "max_tokens", "invalid_value"),
        ("", {**TEXT, "max_tokens": "2"}, 400, "max_tokens", "invalid_value"),
        ("", {**TEXT, "top_p": 0}, 400, "top_p", "invalid_value"),
        ("", {**TEXT, "n": 10**6}, 400, "n", "invalid_value"),
        ("", {**TEXT, "n": 60, "prompt": ["a"] * 10}, 400, "n", "invalid_value"),
        ("", {**TEXT, "seed": 2**63}, 400, "seed", "invalid_value"),
        ("", {**TEXT, "stop": ["a", ""]}, 400, "stop.1", "invalid_value"),
        ("", {**TEXT, "logprobs": 21}, 400, "logprobs", "invalid_value"),
        ("", [], 400, None, "invalid_json"),
    ],
)
def test_refusals(http, path, body, status, param, code):
    answer = http.post(f"/v1/{path}completions", content=json.dumps(body))
    assert answer.status_code == status
    fault = answer.json()["error"]
    assert fault.keys() == {"message", "type", "param", "code"}
    assert (fault["param"], fault["code"]) == (param, code)
    assert fault["message"]


def test_the_context_error_has_both_numbers(client, base):
    with pytest.raises(openai.BadRequestError, match=r"500 tokens .* holds 128") as caught:
        client.completions.create(model="base", prompt=[7] * 500)
    assert caught.value.code == "context_length_exceeded"
    # max_tokens beyond the context is cut and not refused
    result = client.completions.create(model="base", prompt=[7] * 126, max_tokens=1000)
    assert result.usage.completion_tokens <= 2


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b'{"model": NaN}', b"[" * 100000, b'{"n": ' + b"9" * 5000]
)
def test_bodies_that_are_no_json(http, content):
    answer = http.post("/v1/completions", content=content)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_json"


def test_a_large_body_is_refused(http):
    answer = http.post("/v1/completions", content=b" " * (1 << 20) + b"{}")
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"


def test_other_routes_answer_in_the_same_form(http):
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/", 405),
    ):
        answer = http.request(method, path)
        assert answer.status_code == status
        assert answer.json()["error"]["message"]
    assert http.get("/health").json() == {"status": "ok"}
    assert all(http.get(path).status_code == 404 for path in ("/docs", "/redoc"))


def test_reading_without_the_body(http):
    for path in ("/", "/health", "/v1/models", "/v1/models/base", "/openapi.json"):
        whole, head = http.get(path), http.head(path)
        assert (whole.status_code, head.status_code, head.content) == (200, 200, b"")
        assert head.headers["content-type"] == whole.headers["content-type"]
        assert head.headers["content-length"] == str(len(whole.content))
    assert http.head("/v1/models/gone").status_code == 404


def test_request_ids_come_back(client, http):
    answer = client.completions.with_raw_response.create(
        model="base", prompt="数", max_tokens=1, extra_headers={"x-request-id": "mine"}
    )
    assert answer.headers["x-request-id"] == "mine"
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gone", prompt="数")
    assert caught.value.request_id.startswith("req_")
    streamed = http.post("/v1/completions", content=json.dumps({**TEXT, "stream": True}))
    assert streamed.headers["x-request-id"].startswith("req_")


def test_the_description_names_every_field(http):
    told = http.get("/openapi.json").json()
    assert told["openapi"] == "3.1.0"
    for path, kind in (("chat/completions", ChatBody), ("completions", CompletionBody)):
        content = told["paths"][f"/v1/{path}"]["post"]["requestBody"]["content"]
        assert list(content) == ["application/json"]
        name = content["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
        schema = told["components"]["schemas"][name]
        assert schema["properties"].keys() == kind.model_fields.keys() | kind.neutral.keys()
        for needed in re.findall(r'"#/components/schemas/(\w+)"', json.dumps(told)):
            assert needed in told["components"]["schemas"]


def test_a_stream_that_waits_is_kept_alive_with_comments(client, http, steps, monkeypatch):
    monkeypatch.setattr(responses, "KEEP_ALIVE_SECONDS", 0.02)
    body = {**TEXT, "stream": True, "seed": 1}
    with http.stream("POST", "/v1/completions", content=json.dumps(body)) as answer:
        lines = answer.iter_lines()
        assert [next(lines) for _ in range(4)] == [": keep-alive", ""] * 2
        steps.let_all()
        assert "data: [DONE]" in list(lines)
    chunks = client.completions.create(**TEXT, seed=1, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks)


def test_a_prompt_that_cannot_fit_is_refused_before_it_is_encoded(app, http, base, monkeypatch):
    """However long its tokens are; what may fit is encoded and counted."""
    longest = max(map(len, map(base.tokenizer.token_bytes, range(272))))
    llm = app.state.workers["base"].llm
    encoded = []
    encode = llm.tokenizer.encode_batch
    monkeypatch.setattr(
        llm.tokenizer, "encode_batch", lambda texts: (encoded.append(texts), encode(texts))[1]
    )
    for size, is_encoded in ((128 * longest, True), (129 * longest, False), (10**6, False)):
        encoded.clear()
        body = json.dumps({**TEXT, "prompt": "1" * size})
        answer = http.post("/v1/completions", content=body)
        fault = answer.json()["error"]
        assert (answer.status_code, fault["code"]) == (400, "context_length_exceeded")
        assert "holds 128" in fault["message"] and bool(encoded) == is_encoded
        assert ("has at least" in fault["message"]) != is_encoded


def test_the_log_probabilities_of_a_response_are_limited(http, monkeypatch):
    """Those of the prompts and, but in a stream, those of what may be generated."""
    monkeypatch.setattr(completions, "MOST_SCORES", 2 * (3 + 2) * 2 * 4)
    body = {**TEXT, "prompt": [[5, 6, 7], [8, 9, 10]], "n": 2, "echo": True, "logprobs": 3}
    assert http.post("/v1/completions", content=json.dumps(body)).status_code == 200
    for more in (
        {"prompt": [[5, 6, 7], [8, 9, 10, 11]]},
        {"n": 3},
        {"logprobs": 4},
        {"max_tokens": 3},
        {"echo": False, "max_tokens": 6},
    ):
        answer = http.post("/v1/completions", content=json.dumps({**body, **more}))
        assert answer.json()["error"]["param"] == "logprobs"
    for more in (
        {"n": 60, "prompt": "a", "logprobs": None},
        {"n": 60, "prompt": "a", "echo": False, "stream": True},
        {"echo": False, "max_tokens": 5},
        {"prompt": [7] * 126, "echo": False, "n": 10, "max_tokens": 100},  # 2 fit into the context
    ):
        answer = http.post("/v1/completions", content=json.dumps({**body, **more}))
        assert answer.status_code == 200, answer.text
    scored = {**CHAT, "logprobs": True, "top_logprobs": 7}
    for limit, status in ((10, 200), (11, 400), (None, 200)):
        answer = http.post(
            "/v1/chat/completions", content=json.dumps({**scored, "max_tokens": limit})
        )
        assert answer.status_code == status
    assert answer.json()["usage"]["completion_tokens"] <= 10, "as many as the limit lets"


@pytest.mark.parametrize("stream", [False, True])
def test_large_responses_are_made_off_the_event_loop(http, monkeypatch, stream):
    """Other streams would stand still meanwhile."""
    in_loop = []

    def watched(name, make):
        def made(*arguments):
            with contextlib.suppress(RuntimeError):
                asyncio.get_running_loop()
                in_loop.append(name)
            seen.append(name)
            return make(*arguments)

        return made

    seen = []
    for place, name in (
        (CompletionLogprobs, "_top"),
        (responses, "scored_prompt"),
        (completions, "json_response"),
    ):
        monkeypatch.setattr(place, name, watched(name, getattr(place, name)))
    body = {**TEXT, "echo": True, "logprobs": 2, "max_tokens": 0, "stream": stream}
    assert http.post("/v1/completions", content=json.dumps(body)).status_code == 200
    assert {"_top", "scored_prompt"} <= set(seen) and bool(stream) != ("json_response" in seen)
    assert in_loop == []


def test_few_prompts_are_encoded_at_once(app, http, monkeypatch):
    llm = app.state.workers["base"].llm
    now, most = [], []
    lock = threading.Lock()

    def slow(prompt):
        with lock:
            now.append(1)
            most.append(len(now))
        time.sleep(0.05)
        with lock:
            now.pop()
        return [5]

    monkeypatch.setattr(llm, "prompt_ids", slow)
    with ThreadPoolExecutor(6) as pool:
        asks = [
            pool.submit(http.post, "/v1/completions", content=json.dumps(TEXT)) for _ in range(6)
        ]
    assert {ask.result().status_code for ask in asks} == {200}
    assert max(most) == 2


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
keys = st.sampled_from(
    [
        "model",
        "messages",
        "prompt",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "n",
        "seed",
        "stop",
        "stream",
        "stream_options",
        "logprobs",
        "top_logprobs",
        "user",
        "\ud800",
        "echo",
        "best_of",
        "ignore_eos",
        "logit_bias",
        "store",
        "tools",
        "reasoning_effort",
    ]
)
likely = st.sampled_from(
    [
        "base",
        "reasoning",
        "数",
        1,
        0,
        -1,
        0.5,
        3,
        True,
        False,
        None,
        [],
        ["a"],
        [7, 8],
        [[7]],
        1e999,
        10**400,
        {"include_usage": True},
        [{"role": "user"}],
        [{"role": "user", "content": "a"}],
        [{"role": "assistant", "content": "a", "reasoning_content": "b"}],
        [{"role": "assistant", "content": None, "reasoning_content": "b"}],
        {"7": 0},
        16.0,
    ]
)


@settings(max_examples=40)
@given(
    st.sampled_from(["chat/", ""]),
    st.dictionaries(keys, likely | json_values, max_size=5),
    st.booleans(),
)
@example("chat/", {"stream": True}, True)
@example("", {"stream": True}, True)
def test_no_body_is_a_server_error(http, path, changes, valid):
    start = (CHAT if path else TEXT) if valid else {}
    answer = http.post(f"/v1/{path}completions", content=json.dumps({**start, **changes}))
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    elif changes.get("stream") is True:  # what holds only null is as if it were missing
        assert answer.text.endswith("data: [DONE]\n\n")
    else:
        assert all(
            not isinstance(v, float) or math.isfinite(v) for v in answer.json()["usage"].values()
        )


@pytest.mark.parametrize(
    ("written", "thought", "said", "reasoning_tokens"),
    [
        (["<think>", "a", "</think>", "b"], "a", "b", 3),
        (["<think>", "</think>", "b"], None, "b", 2),
        (["<think>", "a"], "a", "", 3),  # the end token is within it
        (["a", "2"], None, "a2", 0),
    ],
)
def test_a_model_that_opens_its_reasoning_itself(
    tmp_path, monkeypatch, written, thought, said, reasoning_tokens
):
    """As after the first templates of R1. Neither tag has a log-probability of the answer."""
    template = THINKING.replace("<think>\\n", "")
    assert template != THINKING
    application = create_app({"model": write_model(tmp_path, chat_template=template)})
    [tokenizer] = [each.llm.tokenizer for each in application.state.workers.values()]
    drawn = iter(tokenizer.encode("".join(written)) + list(tokenizer.eos_ids))
    monkeypatch.setattr(
        engine_module,
        "sample",
        lambda *arguments: replace(sample(*arguments), tokens=[next(drawn)]),
    )
    asked = {"model": "model", "messages": [{"role": "user", "content": "a"}], "logprobs": True}
    with TestClient(application, "http://localhost") as client:
        answer = client.post("/v1/chat/completions", json=asked).json()
    [choice] = answer["choices"]
    assert choice["message"].get("reasoning_content") == thought
    assert choice["message"]["content"] == said
    assert "".join(each["token"] for each in choice["logprobs"]["content"]) == said
    usage = answer["usage"]
    assert usage["completion_tokens"] == len(written) + 1
    assert usage["completion_tokens_details"]["reasoning_tokens"] == reasoning_tokens
