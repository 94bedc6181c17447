"""Messages in the OpenAI form: what is written is read back, and a wrong value is named."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xushi.base.errors import XushiError
from xushi.base.messages import MOST_LEVELS, Message, Tool, ToolCall, is_json_object

CALLS = st.lists(st.builds(ToolCall, st.text(), st.text()), max_size=2).map(tuple)
MESSAGES = st.builds(Message, st.text(), st.text(), st.none() | st.text(), CALLS)


@given(message=MESSAGES)
def test_what_is_written_is_read_back(message: Message) -> None:
    assert Message.from_dict(message.to_dict()) == message


def test_the_form_is_openai_s() -> None:
    message = Message("assistant", "", "r", (ToolCall("add", '{"a": 1}'),))
    function = {"name": "add", "arguments": '{"a": 1}'}
    assert message.to_dict() == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "r",
        "tool_calls": [{"type": "function", "function": function}],
    }
    assert Message("user", "q").to_dict() == {"role": "user", "content": "q"}
    assert Message.from_dict({**message.to_dict(), "content": None, "refusal": None}) == message
    assert Message.from_dict({"role": "tool", "content": "3", "tool_call_id": "x"}) == Message(
        "tool", "3"
    )


@pytest.mark.parametrize(
    ("mapping", "problem"),
    [
        ("hello", "a message is 'hello'"),
        ({"content": "x"}, "role is None"),
        ({"role": "user"}, "content is None"),
        ({"role": "user", "content": 3}, "content is 3"),
        ({"role": "assistant", "content": "x", "reasoning_content": 3}, "reasoning_content is 3"),
        ({"role": "assistant", "tool_calls": {"name": "f"}}, "tool_calls is"),
        ({"role": "assistant", "tool_calls": ["f"]}, "tool call is 'f'"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "name is None"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
            "arguments is {}",
        ),
    ],
)
def test_a_wrong_value_is_named(mapping: Any, problem: str) -> None:
    with pytest.raises(XushiError, match=problem):
        Message.from_dict(mapping)


@pytest.mark.parametrize(
    ("text", "is_object"),
    [
        ("{}", True),
        ('{"a": [1, null]}', True),
        (" {}\n", True),
        ("", False),
        ("[]", False),
        ("1", False),
        ("{", False),
        ("{} {}", False),
        ('{"a": NaN}', False),
        ('{"a": -Infinity}', False),
        ('{"a": ' + "[" * 100_000, False),
    ],
)
def test_what_is_a_json_object(text: str, is_object: bool) -> None:
    assert is_json_object(text) is is_object


def nested(levels: int, in_list: bool = False) -> dict[str, Any]:
    value: Any = 1
    for _ in range(levels - 1):
        value = [value] if in_list else {"b": 2, "a": value}
    return {"a": value, "c": {"d": 1}}


@pytest.mark.parametrize("in_list", [False, True])
def test_parameters_of_a_tool_are_json_of_few_levels(in_list: bool) -> None:
    Tool("f", "", {})
    Tool("f", "", nested(MOST_LEVELS, in_list))
    for levels in (MOST_LEVELS + 1, 900, 100_000):
        with pytest.raises(XushiError, match="the parameters of tool 'f'"):
            Tool("f", "", nested(levels, in_list))


@pytest.mark.parametrize("value", [{1}, float("nan"), b"x"])
def test_parameters_that_json_cannot_express_are_refused(value: Any) -> None:
    with pytest.raises(XushiError, match="tool 'f' are not JSON"):
        Tool("f", "", {"a": [value]})
