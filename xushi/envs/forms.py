"""The form of tasks, messages and transcripts that an environment gives; what is wrong with one.

Not here: whether they are right (promises).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from xushi.base.messages import Message, Tool, ToolCall, is_json_object
from xushi.envs.environment import Task


class Broken(Exception):
    """A promise is not kept: what happened, with the task's split and index, and what to do."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.remedy = remedy


def check_task(environment: Any, task: Any, split: str, index: int) -> None:
    """`Broken` if this is no task of that place, or cannot be written as JSON."""
    where = f"{split} task {index}"
    if not isinstance(task, Task):
        raise Broken(f"{where} is {short(task)}", "return a Task")
    given = (task.environment, task.version, task.split, task.index)
    wanted = (environment.name, environment.version, split, index)
    if given != wanted:
        raise Broken(f"{where} says that it is {given}", f"give it the fields {wanted}")
    if not isinstance(task.prompt, str) or not isinstance(task.answer, str):
        raise Broken(f"prompt or answer of {where} is no text", "give both as text")
    if not isinstance(task.details, Mapping) or not all(
        isinstance(value, str | int) for value in task.details.values()
    ):
        raise Broken(
            f"details of {where} are {short(task.details)}", "make them texts and whole numbers"
        )
    check_json(asdict(task), where)


def check_message(message: Any, where: str) -> None:
    """`Broken` if this is no message whose fields are Unicode text."""
    if not isinstance(message, Message):
        raise Broken(f"{where} gave {short(message)}", "give xushi.base.messages.Message")
    texts = [message.role, message.content, message.reasoning or ""]
    calls = message.tool_calls
    if not isinstance(calls, tuple) or not all(isinstance(call, ToolCall) for call in calls):
        raise Broken(f"{where} has the tool calls {short(calls)}", "make them a tuple of ToolCall")
    texts += [text for call in calls for text in (call.name, call.arguments)]
    if not all(isinstance(text, str) for text in texts):
        raise Broken(f"{where} has a message whose fields are no texts", "give texts")
    if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
        raise Broken(f"{where} has half a surrogate pair in a text", "give Unicode text")


def check_transcript(tools: Sequence[Tool], messages: Any, where: str) -> list[Message]:
    """The messages of an episode, question first, then solver and environment in turn; `Broken`
    with what is wrong.
    """
    if not isinstance(messages, Sequence) or len(messages) < 2:
        raise Broken(
            f"{where} gave {short(messages)}", "return a list of messages: a question, an answer"
        )
    for place, message in enumerate(messages):
        check_message(message, where)
        if (message.role == "assistant") != (place % 2 == 1):
            raise Broken(
                f"message {place} of {where} has role {message.role!r}",
                "let observations and the messages of the assistant take turns",
            )
        for call in message.tool_calls:
            if call.name not in [tool.name for tool in tools] or not is_json_object(call.arguments):
                raise Broken(
                    f"message {place} of {where} calls {short(call)}",
                    "call declared tools, with a JSON object as arguments",
                )
    if messages[-1].role != "assistant":
        raise Broken(f"{where} ends with an observation", "end it with what the solver says last")
    return list(messages)


def check_json(value: Any, where: str) -> None:
    """`Broken` if JSON has no form for it."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise Broken(f"{where} cannot be written as JSON: {error}", "use JSON's types") from None


def short(value: Any, limit: int = 120) -> str:
    """A value on one line of limited length, for a message."""
    text = str(value) if isinstance(value, Exception) else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= limit else text[:limit] + "…"
