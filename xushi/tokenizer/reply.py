"""From the ids that an assistant sampled to a message.

Whatever was sampled is a message, never an error: a tool call that is malformed is content. Not
here: the other direction (chat), and text as it arrives (engine.text).
"""

from collections.abc import Sequence

from xushi.base.messages import Message, ToolCall, is_json_object
from xushi.tokenizer.tokenizer import Tokenizer
from xushi.tokenizer.vocabulary import ToolIds, Vocabulary


def parse_assistant(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[Message, bool]:
    """The message in an assistant's ids, and whether eos was reached.

    `ids` are what follows the generation prompt. Only what comes after the first `</think>` is
    content and tool calls. Everything before it is reasoning, with or without a `<think>` in front,
    and without a `</think>` the content is "". Ids after the first eos do not count.
    """
    ids = list(ids)
    finished = tokenizer.eos_id in ids
    if finished:
        ids = ids[: ids.index(tokenizer.eos_id)]
    closed = tokenizer.end_think_id in ids
    border = ids.index(tokenizer.end_think_id) if closed else len(ids)
    reasoning = tokenizer.decode(ids[:border], skip_special=True)
    thought = bool(reasoning) or tokenizer.think_id in ids[:border]
    content, calls = _split_calls(tokenizer, ids[border + 1 :])
    message = Message(
        "assistant",
        tokenizer.decode(content, skip_special=True),
        reasoning if thought else None,
        calls,
    )
    return message, finished


def parse_tool_calls(tokenizer: Vocabulary, ids: Sequence[int]) -> tuple[ToolCall, ...] | None:
    """The calls of a whole block, from `<｜tool▁calls▁begin｜>` to the end of the message.

    None if it is malformed: a mark is missing or misplaced, a name is empty, arguments are not a
    JSON object, there is no call, or something follows the block.
    """
    marks = tokenizer.tool_ids
    if marks is None or len(ids) < 2 or ids[0] != marks.calls_begin or ids[-1] != marks.calls_end:
        return None
    calls = []
    rest = list(ids[1:-1])
    while rest:
        if marks.call_end not in rest:
            return None
        end = rest.index(marks.call_end)
        call = _parse_call(tokenizer, marks, rest[:end])
        if call is None:
            return None
        calls.append(call)
        rest = rest[end + 1 :]
    return tuple(calls) or None


def _split_calls(tokenizer: Tokenizer, ids: list[int]) -> tuple[list[int], tuple[ToolCall, ...]]:
    marks = tokenizer.tool_ids
    if marks is None or marks.calls_begin not in ids:
        return ids, ()
    begin = ids.index(marks.calls_begin)
    calls = parse_tool_calls(tokenizer, ids[begin:])
    return (ids, ()) if calls is None else (ids[:begin], calls)


def _parse_call(tokenizer: Vocabulary, marks: ToolIds, ids: list[int]) -> ToolCall | None:
    if ids[:1] != [marks.call_begin] or marks.separator not in ids:
        return None
    border = ids.index(marks.separator)
    name = ids[1:border]
    arguments = ids[border + 1 :]
    if not name or any(tokenizer.is_special(token) for token in name + arguments):
        return None
    call = ToolCall(tokenizer.decode(name), tokenizer.decode(arguments))
    return call if is_json_object(call.arguments) else None
