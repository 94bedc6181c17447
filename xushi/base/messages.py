"""Messages, tool calls and tools: the one form of a conversation that all packages share.

Not here: how a conversation is written in tokens (tokenizer.chat), and which messages an API
accepts (serve).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from xushi.base.config import shorten
from xushi.base.errors import BadInput

MOST_LEVELS = 100  # of a tool's parameters; templates write them by recursion


@dataclass(frozen=True)
class ToolCall:
    """An assistant's request to run a tool. `arguments` is the text of a JSON object."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Tool:
    """A tool that an assistant may call. `parameters` is the JSON schema of its arguments.

    Parameters that JSON cannot express, or of more than `MOST_LEVELS` levels, are a `XushiError`.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]

    def __post_init__(self) -> None:
        where = f"the parameters of tool {shorten(self.name)}"
        try:
            table = json.loads(json.dumps(dict(self.parameters), allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise BadInput(
                f"{where} are not JSON: {shorten(str(error))}", "give a JSON schema"
            ) from None
        if _levels(table) > MOST_LEVELS:
            raise BadInput(
                f"{where} have more than {MOST_LEVELS} levels", "give a schema with fewer"
            )

    def to_dict(self) -> dict[str, Any]:
        """The tool in the OpenAI form."""
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": dict(self.parameters),
        }
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    `role` is "system", "user", "assistant" or "tool". A message of role "tool" is the output of a
    tool call. `reasoning` is what an assistant thought before `content`; None means that it did not
    think.
    """

    role: str
    content: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The message in the OpenAI form, with `reasoning_content` as in DeepSeek's API.

        `reasoning_content` and `tool_calls` are left out where the message has none.
        """
        table: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning is not None:
            table["reasoning_content"] = self.reasoning
        if self.tool_calls:
            table["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.tool_calls
            ]
        return table

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> "Message":
        """Read the OpenAI form; `content` may be None beside tool calls.

        Keys that do not enter a prompt, such as `tool_call_id`, are ignored. A missing or wrong
        value of one that does is a `XushiError` that names the key.
        """
        if not isinstance(mapping, Mapping):
            raise _wrong("a message", mapping, 'give a mapping with "role" and "content"')
        calls = mapping.get("tool_calls") or []
        if not isinstance(calls, list | tuple):
            raise _wrong("a message's tool_calls", calls, "give a list")
        content = mapping.get("content")
        return cls(
            role=_text("role", mapping.get("role")),
            content="" if content is None and calls else _text("content", content),
            reasoning=_optional("reasoning_content", mapping.get("reasoning_content")),
            tool_calls=tuple(_call(call) for call in calls),
        )


def is_json_object(text: str) -> bool:
    """Whether `text` is a JSON object, as a tool call's arguments must be. NaN and Infinity are not
    JSON.
    """
    try:
        return isinstance(json.loads(text, parse_constant=_no_constant), dict)
    except (ValueError, RecursionError):
        return False


def _levels(value: Any) -> int:
    """How deep lists and tables of a JSON value are nested."""
    levels, inner = 0, [value]
    while inner := [each for each in inner if isinstance(each, dict | list)]:
        levels += 1
        inner = [
            part for each in inner for part in (each.values() if isinstance(each, dict) else each)
        ]
    return levels


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _call(call: Any) -> ToolCall:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise _wrong(
            "a message's tool call", call, 'give {"function": {"name": ..., "arguments": ...}}'
        )
    return ToolCall(
        _text("tool_calls.function.name", function.get("name")),
        _text("tool_calls.function.arguments", function.get("arguments")),
    )


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong(f"a message's {key}", value, "give a string")
    return value


def _optional(key: str, value: Any) -> str | None:
    return None if value is None else _text(key, value)


def _wrong(what: str, value: Any, remedy: str) -> BadInput:
    return BadInput(f"{what} is {shorten(value)}", remedy)
