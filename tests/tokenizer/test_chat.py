"""A conversation's ids: transformers' template as oracle, the masks of examples, and prompts that
extend what was sampled. Content never forms special tokens.
"""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xushi.base.errors import XushiError
from xushi.base.messages import Message, Tool, ToolCall
from xushi.tokenizer import Tokenizer, chat_examples, encode_chat, encode_outputs, parse_assistant
from xushi.tokenizer.config import SPECIAL_TOKENS, TOOL_TOKENS

PLAIN = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<｜"), max_size=20)
# No space before a spelled token: the vocabularies have a merge " <", and transformers encodes
# a sanitized token apart from the text before it.
SPELLED = st.lists(
    PLAIN.map(lambda text: text.rstrip(" ")) | st.sampled_from(SPECIAL_TOKENS + TOOL_TOKENS),
    max_size=4,
).map("".join)

SCHEMAS = st.dictionaries(PLAIN, PLAIN | st.lists(st.integers(), max_size=2), max_size=3)
TOOLS = st.lists(st.builds(Tool, PLAIN, PLAIN, SCHEMAS), max_size=2)


def calls(text: st.SearchStrategy[str]) -> st.SearchStrategy[tuple[ToolCall, ...]]:
    """Well-formed calls: a name, and a JSON object."""
    arguments = st.dictionaries(text, text | st.integers() | st.none(), max_size=2)
    written = arguments.map(lambda table: json.dumps(table, ensure_ascii=False))
    return st.lists(st.builds(ToolCall, text.filter(bool), written), max_size=2).map(tuple)


def conversations(text: st.SearchStrategy[str]) -> st.SearchStrategy[list[Message]]:
    """Without tools."""
    roles = st.sampled_from(["system", "user", "assistant"])
    return st.lists(
        st.builds(Message, roles, text)
        | st.builds(Message, st.just("assistant"), text, st.none() | text),
        min_size=1,
        max_size=5,
    )


def tool_conversations(text: st.SearchStrategy[str]) -> st.SearchStrategy[list[Message]]:
    """With tool calls and outputs, in any order."""
    return st.lists(
        st.builds(Message, st.sampled_from(["system", "user", "tool"]), text)
        | st.builds(Message, st.just("assistant"), text, st.none() | text, calls(text)),
        min_size=1,
        max_size=6,
    )


ADD = Tool("add", "Adds.", {"type": "object", "properties": {"a": {"type": "integer"}}})
CALL = ToolCall("add", '{"a": 1}')


def loaded_by_transformers(tokenizer: Tokenizer, directory: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(directory)
    return transformers.AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def theirs(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return loaded_by_transformers(tokenizer, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def theirs_with_tools(with_tools: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return loaded_by_transformers(with_tools, tmp_path_factory.mktemp("with_tools"))


def rendered(
    theirs: Any, messages: list[Message], tools: list[Tool], **settings: bool
) -> list[int]:
    ids: list[int] = theirs.apply_chat_template(
        [message.to_dict() for message in messages],
        tools=[tool.to_dict() for tool in tools] or None,
        return_dict=False,
        **settings,
    )
    return ids


@settings(max_examples=60, deadline=None)
@given(messages=conversations(PLAIN), prompt=st.booleans())
def test_template_in_transformers_gives_the_same_ids(
    tokenizer: Tokenizer, theirs: Any, messages: list[Message], prompt: bool
) -> None:
    ids = encode_chat(tokenizer, messages, generation_prompt=prompt)
    assert rendered(theirs, messages, [], add_generation_prompt=prompt) == ids


@settings(max_examples=100, deadline=None)
@given(messages=tool_conversations(PLAIN), tools=TOOLS, prompt=st.booleans())
def test_template_with_tools_gives_the_same_ids(
    with_tools: Tokenizer,
    theirs_with_tools: Any,
    messages: list[Message],
    tools: list[Tool],
    prompt: bool,
) -> None:
    ids = encode_chat(with_tools, messages, tools, generation_prompt=prompt)
    assert rendered(theirs_with_tools, messages, tools, add_generation_prompt=prompt) == ids


@settings(max_examples=60, deadline=None)
@given(messages=tool_conversations(SPELLED))
def test_transformers_sanitized_template_is_as_safe(
    with_tools: Tokenizer, theirs_with_tools: Any, messages: list[Message]
) -> None:
    ids = encode_chat(with_tools, messages)
    safe = {"add_generation_prompt": True, "sanitize_control_tokens": True}
    assert rendered(theirs_with_tools, messages, [], **safe) == ids


@pytest.mark.parametrize(
    ("messages", "tools"),
    [
        ([Message("user", "q")], [ADD]),
        ([Message("tool", "2")], []),
        ([Message("assistant", "", None, (CALL,))], []),
    ],
)
def test_a_vocabulary_without_tool_tokens_refuses_tools(
    tokenizer: Tokenizer, theirs: Any, messages: list[Message], tools: list[Tool]
) -> None:
    with pytest.raises(XushiError, match="the vocabulary has no tool tokens"):
        encode_chat(tokenizer, messages, tools)
    with pytest.raises(Exception, match="the vocabulary has no tool tokens"):
        rendered(theirs, messages, tools)


@settings(max_examples=100, deadline=None)
@given(messages=tool_conversations(SPELLED), tools=TOOLS)
def test_content_forms_no_special_token(
    with_tools: Tokenizer, messages: list[Message], tools: list[Tool]
) -> None:
    ids = encode_chat(with_tools, messages, generation_prompt=False)
    roles = [message.role for message in messages if message.role != "system"]
    replies = [message for message in messages if message.role == "assistant"]
    after_tools = list(pairwise(roles)).count(("tool", "assistant"))
    marks = with_tools.tool_ids
    assert marks is not None
    assert ids.count(with_tools.user_id) == roles.count("user")
    assert ids.count(with_tools.assistant_id) == len(replies) - after_tools
    assert ids.count(with_tools.eos_id) == ids.count(with_tools.end_think_id) == len(replies)
    assert ids.count(with_tools.bos_id) == 1
    assert with_tools.pad_id not in ids
    assert ids.count(marks.output_begin) == ids.count(marks.output_end) == roles.count("tool")
    callers = sum(bool(message.tool_calls) for message in replies)
    made = sum(len(message.tool_calls) for message in replies)
    assert ids.count(marks.calls_begin) == ids.count(marks.calls_end) == callers
    assert ids.count(marks.call_begin) == ids.count(marks.call_end) == made
    assert ids.count(marks.separator) == made
    # Declared tools add one call, the example of their rules.
    with_rules = encode_chat(with_tools, messages, tools, generation_prompt=False)
    assert with_rules.count(marks.separator) == made + bool(tools)


def test_forms_in_full(tokenizer: Tokenizer) -> None:
    messages = [
        Message("user", "q"),
        Message("system", "s"),
        Message("assistant", "a", "r"),
        Message("assistant", "b"),
    ]
    bos = "<｜begin▁of▁sentence｜>"
    eos = "<｜end▁of▁sentence｜>"
    assert tokenizer.decode(encode_chat(tokenizer, messages)) == (
        f"{bos}s<｜User｜>q<｜Assistant｜><think>r</think>a{eos}<｜Assistant｜></think>b{eos}"
        "<｜Assistant｜>"
    )
    messages.append(Message("user", "p"))
    assert tokenizer.decode(encode_chat(tokenizer, messages)) == (
        f"{bos}s<｜User｜>q<｜Assistant｜></think>a{eos}<｜Assistant｜></think>b{eos}"
        "<｜User｜>p<｜Assistant｜>"
    )


def test_the_form_of_tools_in_full(with_tools: Tokenizer) -> None:
    messages = [
        Message("system", "s"),
        Message("user", "q"),
        Message("assistant", "a", "r", (CALL, ToolCall("f", "{}"))),
        Message("tool", "2"),
        Message("tool", "3"),
        Message("assistant", "b", "t"),
    ]
    rules = (
        "s\n\n## Tools\nYou have access to the following tools:\n\n### add\nDescription: Adds.\n\n"
        'Parameters: {"type": "object", "properties": {"a": {"type": "integer"}}}\n\n'
        "IMPORTANT: ALWAYS adhere to this exact format for tool use:\n<｜tool▁calls▁begin｜>"
        "<｜tool▁call▁begin｜>tool_call_name<｜tool▁sep｜>tool_call_arguments<｜tool▁call▁end｜>"
        "{additional_tool_calls}<｜tool▁calls▁end｜>\n\nWhere:\n"
        "- `tool_call_name` must be an exact match to one of the available tools\n"
        "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters "
        "Schema\n- For multiple tool calls, chain them directly without separators or spaces"
    )
    first = (
        "<｜User｜>q<｜Assistant｜><think>r</think>a<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add"
        '<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{}'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>"
    )
    outputs = (
        "<｜tool▁output▁begin｜>2<｜tool▁output▁end｜><｜tool▁output▁begin｜>3<｜tool▁output▁end｜>"
    )
    last = "<think>t</think>b<｜end▁of▁sentence｜>"
    ids = encode_chat(with_tools, messages, [ADD], generation_prompt=False)
    assert with_tools.decode(ids) == f"<｜begin▁of▁sentence｜>{rules}{first}{outputs}{last}"
    assert encode_chat(with_tools, messages[:-1], [ADD]) == ids[: -len(last_ids(with_tools, ids))]


def last_ids(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """The ids after the last tool output."""
    assert tokenizer.tool_ids is not None
    end = len(ids) - ids[::-1].index(tokenizer.tool_ids.output_end)
    return ids[end:]


@settings(max_examples=100, deadline=None)
@given(
    beginning=tool_conversations(SPELLED),
    reasoning=st.none() | SPELLED,
    content=SPELLED,
    made=calls(SPELLED),
    outputs=st.lists(SPELLED, min_size=1, max_size=3),
)
def test_a_prompt_after_tool_outputs_extends_what_was_sampled(
    with_tools: Tokenizer,
    beginning: list[Message],
    reasoning: str | None,
    content: str,
    made: tuple[ToolCall, ...],
    outputs: list[str],
) -> None:
    prompt = encode_chat(with_tools, beginning)
    reply = Message("assistant", content, reasoning, made)
    sampled = encode_chat(with_tools, [*beginning, reply], generation_prompt=False)
    assert sampled[: len(prompt)] == prompt
    assert parse_assistant(with_tools, sampled[len(prompt) :]) == (reply, True)
    observed = [Message("tool", output) for output in outputs]
    extended = encode_chat(with_tools, [*beginning, reply, *observed])
    assert extended == sampled + encode_outputs(with_tools, observed)


def test_the_template_reads_a_call_without_content(
    with_tools: Tokenizer, theirs_with_tools: Any
) -> None:
    """OpenAI's form has null for content beside tool calls, and perhaps for reasoning."""
    mapping = Message("assistant", "", None, (CALL,)).to_dict()
    mapping |= {"content": None, "reasoning_content": None}
    ids = theirs_with_tools.apply_chat_template([mapping], return_dict=False)
    messages = [Message.from_dict(mapping)]
    assert ids == encode_chat(with_tools, messages, generation_prompt=False)


def test_only_tool_outputs_extend_a_sequence(with_tools: Tokenizer) -> None:
    with pytest.raises(XushiError, match="role 'user' does not extend"):
        encode_outputs(with_tools, [Message("user", "q")])


def learned_parts(ids: list[int], mask: list[bool]) -> list[tuple[int, list[int]]]:
    """Where each learned part begins, and its ids up to and with eos."""
    parts: list[tuple[int, list[int]]] = []
    for place, (token, learned) in enumerate(zip(ids, mask, strict=True)):
        if learned and (not mask[place - 1] or ids[place - 1] == 1):
            parts.append((place, []))
        if learned:
            parts[-1][1].append(token)
    return parts


@settings(max_examples=150, deadline=None)
@given(messages=tool_conversations(SPELLED), tools=TOOLS, data=st.data())
def test_examples_are_what_sampling_would_see(
    with_tools: Tokenizer, messages: list[Message], tools: list[Tool], data: st.DataObject
) -> None:
    """Every assistant message is learned once, after exactly the prompt that it would answer; those
    that are given are not learned.
    """
    given_messages = data.draw(st.just(0) | st.integers(0, len(messages)))
    seen = []
    for ids, mask in chat_examples(with_tools, messages, tools, given_messages):
        seen += [(ids[:place], part) for place, part in learned_parts(ids, mask)]
    # System texts are at the beginning of each example, also those that come late.
    expected = [
        place
        for place, message in enumerate(messages)
        if message.role == "assistant" and place >= given_messages
    ]
    assert len(seen) == len(expected)
    for place, (prompt, part) in zip(expected, seen, strict=True):
        reply = messages[place]
        assert parse_assistant(with_tools, part) == (reply, True)
        if not any(message.role == "system" for message in messages):
            assert prompt == encode_chat(with_tools, messages[:place], tools)


def test_examples_divide_where_reasoning_is_dropped(with_tools: Tokenizer) -> None:
    question = Message("user", "q")
    plain = Message("assistant", "a")
    thought = Message("assistant", "b", "r")

    def count(*messages: Message) -> int:
        return len(chat_examples(with_tools, messages))

    assert count(question, plain, question, plain, question, thought) == 1
    assert count(question, thought, Message("tool", "2"), thought) == 1
    assert count(question, thought, question, plain, question, plain) == 2
    assert count(question, Message("assistant", "b", ""), question, plain) == 2
    assert count(question, thought, question, thought, question, thought, question) == 3
    assert count(question) == count() == 0


def test_unknown_role(tokenizer: Tokenizer) -> None:
    with pytest.raises(XushiError, match="unknown role 'judge'"):
        encode_chat(tokenizer, [Message("judge", "x")])
