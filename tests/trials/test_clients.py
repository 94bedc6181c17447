"""What clients of the OpenAI API send, read out of their sources, and what they do with the answers.

The clients themselves run in tests/serve/test_clients.py.
"""

import json
from operator import itemgetter

import numpy as np
import pytest
import torch
from openai import AuthenticationError, OpenAI

from xushi.engine import LLM, SamplingParams
from xushi.model import load_pretrained
from xushi.serve import create_app, find_models
from xushi.serve.access import Access

from ..serve.conftest import address, app, client, http, run_directory, running  # noqa: F401

QUESTION = [{"role": "user", "content": "数字之和是多少？"}]


@pytest.fixture(scope="module")
def base(run_directory):  # noqa: F811
    return LLM(run_directory / "export" / "base")


@pytest.fixture(scope="module")
def reasoning(run_directory):  # noqa: F811
    return LLM(run_directory / "export" / "reasoning")


def post(http, path, body, **headers):  # noqa: F811
    answer = http.post(f"/v1/{path}", content=json.dumps(body), headers=headers)
    assert answer.status_code == 200, answer.text
    return answer


def events(answer):
    """The objects of a stream as clients read them: lines that begin with "data:"."""
    lines = [line for line in answer.text.split("\n") if line.startswith("data:")]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data:")) for line in lines]


# NextChat sends its settings with every question, and the whole talk.
NEXTCHAT = {
    "messages": [
        {"role": "system", "content": "\nYou are ChatGPT.\n"},
        {"role": "user", "content": "九"},
        {"role": "assistant", "content": "9"},
        *QUESTION,
    ],
    "stream": True,
    "model": "reasoning",
    "temperature": 0.5,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "top_p": 1,
    "max_tokens": 30,
}


def test_nextchat(http):  # noqa: F811
    assert events(post(http, "chat/completions", NEXTCHAT))
    chunks = events(post(http, "chat/completions", {**NEXTCHAT, "seed": 3}))  # else it may be empty
    texts = [
        choice["delta"].get("reasoning_content") or choice["delta"].get("content")
        for chunk in chunks
        for choice in chunk["choices"]
    ]
    assert any(texts)
    formatted = [{"role": "developer", "content": "Formatting re-enabled"}, *QUESTION]
    later = {**NEXTCHAT, "messages": formatted, "max_completion_tokens": 9, "temperature": 1}
    del later["max_tokens"]
    assert events(post(http, "chat/completions", later))


# Open WebUI sends what its user or the model's settings name, numbers as whatever was typed; titles
# and tags are asked for in the same way and not streamed.
OPENWEBUI = {
    "stream": True,
    "model": "reasoning",
    "messages": QUESTION,
    "temperature": 0.8,
    "top_p": 0.9,
    "max_tokens": 16.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "seed": 3,
    "stop": [],
    "logit_bias": {},
    "response_format": None,
    "reasoning_effort": None,
    "stream_options": {"include_usage": True},
}


def test_open_webui(http):  # noqa: F811
    *_, last = events(post(http, "chat/completions", OPENWEBUI))
    assert last["usage"]["completion_tokens"] <= 16
    title = {**OPENWEBUI, "stream": False, "max_completion_tokens": 16}
    del title["stream_options"]
    answer = post(http, "chat/completions", title).json()
    assert isinstance(answer["choices"][0]["message"]["content"], str)
    entries = http.get("/v1/models").json()["data"]
    assert all(entry["id"] and entry["object"] == "model" for entry in entries)


@pytest.mark.parametrize("chat", [True, False])
def test_guidellm(http, chat):  # noqa: F811
    """A benchmark that must get as many tokens as it asks for, and counts in each chunk."""
    body = {
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "stop": None,
        "ignore_eos": True,
    }
    if chat:
        parts = [{"type": "text", "text": "数字之和"}]
        body |= {
            "model": "reasoning",
            "max_completion_tokens": 25,
            "messages": [
                {"role": "system", "content": "数"},
                {"role": "user", "content": parts},
            ],
        }
    else:
        body |= {"model": "base", "max_tokens": 25, "prompt": "数字之和"}
    chunks = events(post(http, "chat/completions" if chat else "completions", body))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == 25
    assert len(set(counts)) > 5


@pytest.mark.parametrize("chat", [True, False])
def test_vllm_bench(http, chat):  # noqa: F811
    """`vllm bench serve` with its default neutral value, and with others of vLLM's written out. It
    counts a request as failed if no chunk has a choice.
    """
    body = {
        "repetition_penalty": 1.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "length_penalty": 1.0,
        "min_tokens": 0,
    }
    if chat:
        parts = [{"type": "text", "text": "数字"}]
        body |= {"model": "reasoning", "messages": [{"role": "user", "content": parts}]}
        body["max_completion_tokens"] = 8
    else:
        body |= {"model": "base", "prompt": "数字", "max_tokens": 8, "logprobs": None}
    chunks = events(post(http, "chat/completions" if chat else "completions", body))
    assert any(chunk["choices"] for chunk in chunks)
    [usage] = [chunk["usage"] for chunk in chunks if not chunk["choices"]]
    assert usage["completion_tokens"] == 8
    path = f"/v1/{'chat/' if chat else ''}completions"
    for name, value in {"repetition_penalty": 1.1, "top_k": 5, "min_p": 0.1}.items():
        refused = http.post(path, content=json.dumps({**body, name: value}))
        assert refused.status_code == 400 and refused.json()["error"]["param"] == name


def lm_eval_scores(answer, context_lengths):
    """How lm-evaluation-harness reads what it asked for: sums over the continuation, without the
    one token that was generated, and whether each token was the likeliest.
    """
    results = []
    choices = sorted(answer["choices"], key=itemgetter("index"))
    for choice, begin in zip(choices, context_lengths, strict=True):
        logprobs = choice["logprobs"]
        own = logprobs["token_logprobs"][begin:-1]
        top = logprobs["top_logprobs"][begin:-1]
        greedy = all(one == max(best.values()) for one, best in zip(own, top, strict=True))
        results.append((sum(own), greedy))
    return results


def test_lm_eval_scores_a_model(http, run_directory, base):  # noqa: F811
    """Prompts as token ids, several at a time, against the model's own forward pass."""
    tokenizer = base.tokenizer
    contexts = [tokenizer.encode(text) for text in ("数字之和", "是多少", "a")]
    contexts = [[tokenizer.bos_id, *context] for context in contexts]
    greedy = base.generate(contexts, SamplingParams(5, temperature=0, ignore_eos=True))
    rest = [tokenizer.encode("九。数"), greedy[1].token_ids, tokenizer.encode("\n字")]
    asked = {
        "model": "base",
        "prompt": [context + more for context, more in zip(contexts, rest, strict=True)],
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    answer = post(http, "completions", asked).json()
    found = lm_eval_scores(answer, [len(context) for context in contexts])
    model = load_pretrained(run_directory / "export" / "base")
    for (score, is_greedy), ids, more in zip(found, asked["prompt"], rest, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double()
        expected = torch.log_softmax(logits, -1)
        own = expected[len(ids) - len(more) - 1 : -1].gather(1, torch.tensor(more)[:, None])
        # Two ways of computing a log-probability differ by 2e-5 of the largest at most.
        assert score == pytest.approx(
            float(own.sum()), abs=len(more) * 2e-5 * float(expected.abs().max())
        )
        assert is_greedy == (more == greedy[1].token_ids)
    assert answer["usage"]["prompt_tokens"] == sum(map(len, asked["prompt"]))
    generated = {
        "prompt": [contexts[0]],
        "model": "base",
        "max_tokens": 7,
        "temperature": 0,
        "stop": ["</s>"],
        "seed": 1234,
    }
    [choice] = post(http, "completions", generated).json()["choices"]
    [expected] = base.generate([contexts[0]], SamplingParams(7, temperature=0))
    assert choice["text"] == expected.text


def test_lm_eval_asks_a_chat(http):  # noqa: F811
    body = {
        "messages": [{"role": "user", "content": "数", "type": "text"}],
        "model": "reasoning",
        "max_tokens": 8,
        "temperature": 0,
        "stop": [],
        "seed": 1234,
    }
    assert post(http, "chat/completions", body).json()["choices"]


def test_echo_scores_without_generating(client, http, base):  # noqa: F811
    """Text, tokens, places and log-probabilities agree with one another, whole and streamed."""
    text = "数字之和a"
    asked = {"model": "base", "prompt": text, "echo": True, "logprobs": 2, "max_tokens": 0}
    answer = client.completions.create(**asked)
    [choice] = answer.choices
    assert (choice.text, choice.finish_reason) == (text, "length")
    assert answer.usage.completion_tokens == 0
    ids = [base.tokenizer.bos_id, *base.tokenizer.encode(text)]
    logprobs = choice.logprobs
    assert len(logprobs.tokens) == answer.usage.prompt_tokens == len(ids)
    assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
    spelled = b"".join(base.tokenizer.token_bytes(token) for token in ids)
    assert spelled.decode() == text
    before = [b"".join(map(base.tokenizer.token_bytes, ids[:i])) for i in range(len(ids))]
    assert logprobs.text_offset == [len(part.decode(errors="ignore")) for part in before]
    for name, own, top in zip(
        logprobs.tokens[1:], logprobs.token_logprobs[1:], logprobs.top_logprobs[1:], strict=True
    ):
        assert top[name] == own and len(top) in (2, 3)
        assert own <= max(top.values()) <= 0
    streamed = list(client.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed) == text
    parts = [chunk.choices[0].logprobs for chunk in streamed]
    assert [one for part in parts if part for one in part.tokens] == logprobs.tokens
    longer = {**asked, "max_tokens": 9, "seed": 1, "n": 2}
    plain = client.completions.create(**{**longer, "echo": False}).choices
    echoed = client.completions.create(**longer).choices
    assert [each.text for each in echoed] == [text + each.text for each in plain]
    texts = ["", ""]
    for chunk in client.completions.create(**{**longer, "logprobs": None}, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
        assert chunk.choices[0].logprobs is None
    assert texts == [each.text for each in echoed]


def test_every_prompt_of_a_request_is_echoed_with_its_own_scores(http, base):  # noqa: F811
    prompts = ["数", "字之和是", "a"]
    asked = {"model": "base", "echo": True, "logprobs": 0, "max_tokens": 2, "seed": 1, "n": 2}
    together = post(http, "completions", {**asked, "prompt": prompts}).json()["choices"]
    assert [choice["index"] for choice in together] == list(range(6))
    for number, choice in enumerate(together):
        prompt = prompts[number // 2]
        alone = {**asked, "prompt": prompt, "n": 1, "max_tokens": 0}
        [expected] = post(http, "completions", alone).json()["choices"]
        count = len(expected["logprobs"]["tokens"])
        assert choice["text"].startswith(prompt)
        assert choice["logprobs"]["top_logprobs"] is None
        assert choice["logprobs"]["tokens"][:count] == expected["logprobs"]["tokens"]
        assert len(choice["logprobs"]["tokens"]) > count
        np.testing.assert_allclose(
            choice["logprobs"]["token_logprobs"][1:count],
            expected["logprobs"]["token_logprobs"][1:],
            rtol=0,
            atol=1e-4,
        )


def test_alternatives_in_a_chat(client, reasoning):  # noqa: F811
    arguments = {"model": "reasoning", "messages": QUESTION, "max_tokens": 30, "seed": 2}
    asked = {**arguments, "logprobs": True, "top_logprobs": 4}
    [choice] = client.chat.completions.create(**asked).choices
    assert choice.logprobs.content
    for place in choice.logprobs.content:
        assert len(place.top_logprobs) == 4
        values = [each.logprob for each in place.top_logprobs]
        assert values == sorted(values, reverse=True) and place.logprob <= values[0]
        own = [each for each in place.top_logprobs if each.bytes == place.bytes]
        assert all(each.logprob == place.logprob for each in own)
    streamed = [
        place
        for chunk in client.chat.completions.create(**asked, stream=True)
        for part in chunk.choices
        if part.logprobs
        for place in part.logprobs.content
    ]
    assert streamed == choice.logprobs.content


def test_history_as_the_official_client_keeps_it(client):  # noqa: F811
    first = client.chat.completions.create(
        model="reasoning", messages=QUESTION, max_tokens=20, seed=1
    )
    kept = first.choices[0].message.model_dump()
    assert {"refusal", "tool_calls", "function_call", "audio", "annotations"} <= kept.keys()
    for lists in (None, []):
        turn = {**kept, "annotations": lists, "tool_calls": lists}
        again = client.chat.completions.create(
            model="reasoning", messages=[*QUESTION, turn, *QUESTION], max_tokens=9, seed=2
        )
        assert again.usage.completion_tokens


def test_a_developer_is_the_system(client):  # noqa: F811
    answers = [
        client.chat.completions.create(
            model="reasoning",
            messages=[{"role": role, "content": "数"}, *QUESTION],
            max_tokens=20,
            seed=4,
        )
        for role in ("developer", "system")
    ]
    assert answers[0].choices == answers[1].choices and answers[0].usage == answers[1].usage


def test_a_last_message_of_the_assistant_is_continued(client, reasoning):  # noqa: F811
    """In its text, or in its reasoning if it has no text yet, exactly after what it says."""
    tokenizer = reasoning.tokenizer
    asked = reasoning.conversation_ids(QUESTION)
    think, end = tokenizer.think_id, tokenizer.end_think_id
    cases = [
        ({"content": "九。"}, [end, *tokenizer.encode("九。")], False),
        ({"content": ""}, [end], False),
        ({"reasoning_content": "数字"}, [think, *tokenizer.encode("数字")], True),
        (
            {"content": "九", "reasoning_content": "数"},
            [think, *tokenizer.encode("数"), end, *tokenizer.encode("九")],
            False,
        ),
    ]
    for message, ids, thinks in cases:
        arguments = {"max_tokens": 12, "seed": 7}
        answer = client.chat.completions.create(
            model="reasoning",
            messages=[*QUESTION, {"role": "assistant", **message}],
            **arguments,
        )
        assert answer.usage.prompt_tokens == len(asked) + len(ids)
        [expected] = reasoning.generate([[*asked, *ids]], SamplingParams(12, seed=7))
        told = answer.choices[0].message
        assert answer.usage.completion_tokens == len(expected.token_ids)
        if thinks and end in expected.token_ids:
            cut = expected.token_ids.index(end)
            assert told.reasoning_content == (tokenizer.decode(expected.token_ids[:cut]) or None)
        elif thinks:
            assert told.reasoning_content == expected.text and told.content == ""
        else:
            assert told.content == expected.text and told.reasoning_content is None
            assert answer.usage.completion_tokens_details.reasoning_tokens == 0


def test_what_only_a_tool_would_need_is_refused_by_name(http):  # noqa: F811
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [*QUESTION, {"role": "assistant", "content": None, "tool_calls": [call]}]
    body = {"model": "reasoning", "messages": messages}
    answer = http.post("/v1/chat/completions", content=json.dumps(body))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages.1.tool_calls"


def test_a_page_of_the_web_reads_and_computes_nothing(http):  # noqa: F811
    """A name that is made to lead to this machine, and a form or script of another page."""
    asked = {"model": "base", "prompt": "数", "max_tokens": 1}
    assert http.get("/v1/models", headers={"Host": "evil.example"}).status_code == 403
    assert http.get("/", headers={"Host": "evil.example:8000"}).status_code == 403
    plain = http.post("/v1/completions", json=asked, headers={"Content-Type": "text/plain"})
    assert plain.status_code == 415
    origin = {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}
    assert http.post("/v1/completions", json=asked, headers=origin).status_code == 403
    assert http.post("/v1/completions", json=asked).status_code == 200


def test_keys_as_clients_send_them(run_directory):  # noqa: F811
    served = create_app(find_models(run_directory), access=Access(keys=("sk-one", "sk-two")))
    with running(served) as (address, _):  # noqa: F811
        for key in ("sk-one", "sk-two"):
            with OpenAI(base_url=address + "/v1", api_key=key, max_retries=0) as client:
                assert len(client.models.list().data) == 2
        with OpenAI(base_url=address + "/v1", api_key="sk-three", max_retries=0) as client:
            with pytest.raises(AuthenticationError) as caught:
                client.completions.create(model="base", prompt="数")
            assert caught.value.code == "invalid_api_key"
