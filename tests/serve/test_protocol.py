"""Requests: what asks for nothing, what is refused, and what numbers are."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import completion_create_params as text_params
from openai.types.chat import completion_create_params as chat_params

from xushi.serve import fields
from xushi.serve.protocol import ApiError, ChatBody, CompletionBody, parse_body

CHAT = {"model": "m", "messages": [{"role": "user", "content": "1"}]}
TEXT = {"model": "m", "prompt": "1"}
KINDS = [(ChatBody, CHAT), (CompletionBody, TEXT)]
EMPTY = [None, "", [], {}, {"a": None, "b": [[], ""]}]


def parsed(kind, body):
    return parse_body(kind, json.dumps(body).encode())


def refused(kind, body):
    with pytest.raises(ApiError) as caught:
        parsed(kind, body)
    assert caught.value.status == 400
    return caught.value.body["error"]


def own_fields(kind):
    """The fields of OpenAI's client for a request, less those that every request needs."""
    params = chat_params if kind is ChatBody else text_params
    names = set(params.CompletionCreateParamsBase.__annotations__) | {"stream"}
    return sorted(names - {"model", "messages", "prompt"})


@pytest.mark.parametrize(("kind", "body"), KINDS)
@pytest.mark.parametrize("empty", EMPTY, ids=str)
def test_an_empty_value_of_any_optional_field_is_as_if_it_were_missing(kind, body, empty):
    every = dict.fromkeys([*own_fields(kind), *kind.model_fields, "unknown"], empty)
    assert parsed(kind, {**every, **body}) == parsed(kind, body)


@pytest.mark.parametrize(("kind", "body"), KINDS)
def test_neutral_values_are_as_if_they_were_missing(kind, body):
    assert len(kind.neutral) > 1
    for name, values in kind.neutral.items():
        for value in values:
            assert parsed(kind, {**body, name: value}) == parsed(kind, body)
    likewise = {"n": 1, "temperature": 1, "top_p": 1.0, "stream": False, "logit_bias": {"5": 0}}
    assert parsed(kind, {**body, **likewise}).model_dump() == parsed(kind, body).model_dump() | {
        "logit_bias": {"5": 0}
    }


CHANGING = {
    "audio": {"voice": "alloy", "format": "mp3"},
    "best_of": 3,
    "frequency_penalty": -0.5,
    "function_call": {"name": "f"},
    "functions": [{"name": "f"}],
    "logit_bias": {"5": 100},
    "modalities": ["text", "audio"],
    "moderation": {"model": "m"},
    "prediction": {"type": "content", "content": "1"},
    "presence_penalty": 2,
    "prompt_cache_options": {"mode": "explicit"},
    "prompt_cache_retention": "for ever",
    "reasoning_effort": "high",
    "response_format": {"type": "json_object"},
    "service_tier": "priority",
    "store": True,
    "suffix": "end",
    "tool_choice": "required",
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "parallel_tool_calls": 1,
    "verbosity": "low",
    "web_search_options": {"search_context_size": "low"},
}


@pytest.mark.parametrize(("kind", "body"), KINDS)
def test_every_field_of_the_api_is_acted_on_or_refused_by_name(kind, body):
    """A field that OpenAI's client gains later fails here until it is declared."""
    for name in own_fields(kind):
        if name in CHANGING:
            fault = refused(kind, {**body, name: CHANGING[name]})
            assert name in (fault["param"], fault["message"].split(":")[0]), name
            assert fault["code"] in ("unsupported_value", "unknown_parameter")
        else:
            assert name in kind.model_fields, name
    fault = refused(kind, {**body, "unknown": False})
    assert (fault["param"], fault["code"]) == ("unknown", "unknown_parameter")


@pytest.mark.parametrize(("kind", "body"), KINDS)
def test_a_whole_number_may_have_a_fraction_of_zero(kind, body):
    names = ["max_tokens", "n", "seed", "logprobs" if kind is CompletionBody else "top_logprobs"]
    told = {name: 16.0 for name in names}
    more = {"logprobs": True} if kind is ChatBody else {}
    read = parsed(kind, {**body, **more, **told})
    for name in names:
        assert getattr(read, name) == 16 and isinstance(getattr(read, name), int)
        assert refused(kind, {**body, **more, name: 16.5})["param"] == name
        assert refused(kind, {**body, **more, name: True})["param"] == name
        assert refused(kind, {**body, **more, name: "16"})["param"] == name


def test_false_is_not_zero_nor_one_true():
    assert refused(ChatBody, {**CHAT, "frequency_penalty": False})["param"] == "frequency_penalty"
    assert refused(ChatBody, {**CHAT, "store": 0})["param"] == "store"
    assert parsed(ChatBody, {**CHAT, "frequency_penalty": 0.0})


def test_top_k_of_all_tokens_has_two_spellings():
    for everything in (-1, 0):
        assert parsed(CompletionBody, {**TEXT, "top_k": everything})
    assert refused(CompletionBody, {**TEXT, "top_k": 1})["param"] == "top_k"


def test_best_of_may_be_what_is_given_anyway():
    for best_of, n in ((1, 1), (1, 3), (3, 3)):
        assert parsed(CompletionBody, {**TEXT, "best_of": best_of, "n": n}).n == n
    assert refused(CompletionBody, {**TEXT, "best_of": 3, "n": 2})["param"] == "best_of"


def test_stream_options():
    streamed = {**TEXT, "stream": True}
    for options in (None, {}, {"include_usage": False}, {"include_obfuscation": False}):
        assert parsed(CompletionBody, {**TEXT, "stream_options": options})
        assert parsed(CompletionBody, {**streamed, "stream_options": options})
    for name in ("include_usage", "continuous_usage_stats"):
        fault = refused(CompletionBody, {**TEXT, "stream_options": {name: True}})
        assert fault["param"] == "stream_options"
        body = parsed(CompletionBody, {**streamed, "stream_options": {name: True}})
        assert getattr(body.stream_options, name)
    fault = refused(CompletionBody, {**streamed, "stream_options": {"more": 1}})
    assert fault["param"] == "stream_options.more"


def test_two_limits_may_be_given_if_they_are_the_same():
    both = {"max_tokens": 5, "max_completion_tokens": 5.0}
    assert parsed(ChatBody, {**CHAT, **both}).max_completion_tokens == 5
    assert refused(ChatBody, {**CHAT, **both, "max_tokens": 6})["param"] == "max_tokens"


def test_alternatives_need_log_probabilities():
    assert refused(ChatBody, {**CHAT, "top_logprobs": 2})["param"] == "top_logprobs"
    assert parsed(ChatBody, {**CHAT, "top_logprobs": 0})
    assert parsed(ChatBody, {**CHAT, "top_logprobs": 20, "logprobs": True}).top_logprobs == 20


def message(**more):
    return {**CHAT, "messages": [{"role": "user", "content": "1", **more}]}


def test_messages():
    plain = parsed(ChatBody, CHAT).messages
    for empty in EMPTY:
        assert parsed(ChatBody, message(name=empty, refusal=empty, x=empty)).messages == plain
    parts = [{"type": "text", "text": "1", "annotations": None}, {"type": "text", "text": ""}]
    assert parsed(ChatBody, message(content=parts)).messages == plain
    assert refused(ChatBody, message(content=[{"type": "text", "text": 1}]))["param"] == (
        "messages.0.content"
    )
    for value in (None, 1, {"type": "text", "text": "1"}, [["1"]], [{"text": "1"}]):
        assert refused(ChatBody, message(content=value))["param"] == "messages.0.content"
    assert refused(ChatBody, message(refusal="no"))["param"] == "messages.0.refusal"
    fault = refused(ChatBody, message(tool_calls=[{"id": "1"}]))
    assert fault["param"] == "messages.0.tool_calls"
    empty = {"role": "assistant", "content": None}
    [answer] = parsed(ChatBody, {**CHAT, "messages": [empty]}).messages
    assert answer.content == "" and answer.as_message().role == "assistant"
    [rules] = parsed(
        ChatBody, {**CHAT, "messages": [{"role": "developer", "content": "a"}]}
    ).messages
    assert rules.as_message().role == "system"


@settings(max_examples=30)
@given(st.recursive(st.sampled_from([None, "", 0, False, "a"]), st.lists, max_leaves=8))
def test_nothing_is_what_holds_nothing(value):
    def leaves(value):
        return (
            [leaf for item in value for leaf in leaves(item)]
            if isinstance(value, list)
            else [value]
        )

    expected = all(leaf is None or leaf == "" for leaf in leaves(value))
    assert fields.is_nothing(value) == expected
    assert fields.is_nothing({"a": value, "b": None}) == expected


def test_deep_values_are_read_without_recursion():
    value: list = []
    for _ in range(5_000):
        value = [value]
    assert fields.is_nothing(value)
