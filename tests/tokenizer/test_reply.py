"""What an assistant sampled, as a message: unfinished replies, and calls that are none."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xushi.base.messages import ToolCall
from xushi.tokenizer import Tokenizer, parse_assistant
from xushi.tokenizer.config import TOOL_TOKENS


def test_unfinished_replies(tokenizer: Tokenizer) -> None:
    think = tokenizer.think_id
    end = tokenizer.end_think_id
    eos = tokenizer.eos_id
    r = tokenizer.encode("r")
    a = tokenizer.encode("a")

    def parsed(*ids: int) -> tuple[str | None, str, bool]:
        message, finished = parse_assistant(tokenizer, ids)
        return message.reasoning, message.content, finished

    assert parsed() == (None, "", False)
    assert parsed(think) == ("", "", False)
    assert parsed(think, *r) == ("r", "", False)
    assert parsed(think, *r, end, *a) == ("r", "a", False)
    assert parsed(end, *a, eos, *r) == (None, "a", True)
    # Without </think> there is no answer, whatever was written.
    assert parsed(*a, eos) == ("a", "", True)
    assert parsed(think, *r, eos, end, *a) == ("r", "", True)
    # The first of each decides: what else was written before an answer is not taken back by a mark.
    assert parsed(think, *r, end, *a, end, *r) == ("r", "ar", False)
    assert parsed(end, *a, eos, *r, eos) == (None, "a", True)


def spelled_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text in which `[name]` is a tool token, and `[user]` a user's mark."""
    marks = tokenizer.tool_ids
    assert marks is not None
    special = {"user": tokenizer.user_id, **marks._asdict()}
    ids = []
    for part in text.replace("[", "|[").replace("]", "|").split("|"):
        ids += [special[part[1:]]] if part.startswith("[") else tokenizer.encode(part)
    return ids


def parsed(tokenizer: Tokenizer, text: str) -> tuple[str, tuple[ToolCall, ...]]:
    message, _ = parse_assistant(
        tokenizer, [tokenizer.end_think_id, *spelled_ids(tokenizer, text), tokenizer.eos_id]
    )
    return message.content, message.tool_calls


ONE = "[call_begin]f[separator]{}[call_end]"


def test_calls_are_parsed(with_tools: Tokenizer) -> None:
    f = ToolCall("f", "{}")
    assert parsed(with_tools, f"a[calls_begin]{ONE}[calls_end]") == ("a", (f,))
    assert parsed(with_tools, f"[calls_begin]{ONE}{ONE}[calls_end]") == ("", (f, f))


@pytest.mark.parametrize(
    "text",
    [
        "[calls_begin]",
        "[calls_begin][calls_end]",
        "[calls_end][calls_begin]",
        f"[calls_begin]{ONE}",
        f"{ONE}[calls_end]",
        f"[calls_begin]{ONE}[calls_end] ",
        f"[calls_begin]{ONE}[calls_end][calls_end]",
        f"[calls_begin]{ONE}[calls_end][calls_begin]{ONE}[calls_end]",
        f"[calls_begin] {ONE}[calls_end]",
        f"[calls_begin]{ONE} {ONE}[calls_end]",
        "[calls_begin]f[separator]{}[call_end][calls_end]",
        "[calls_begin][call_begin]f[separator]{}[calls_end]",
        "[calls_begin][call_begin]f{}[call_end][calls_end]",
        "[calls_begin][call_begin][separator]{}[call_end][calls_end]",
        "[calls_begin][call_begin]f[user][separator]{}[call_end][calls_end]",
        "[calls_begin][call_begin]f[separator]{}[user][call_end][calls_end]",
        "[calls_begin][call_begin]f[separator]{}[separator][call_end][calls_end]",
        "[calls_begin][call_begin]f[separator][call_end][calls_end]",
        "[calls_begin][call_begin]f[separator]3[call_end][calls_end]",
        "[calls_begin][call_begin]f[separator]{'a': 1}[call_end][calls_end]",
        '[calls_begin][call_begin]f[separator]{"a": NaN}[call_end][calls_end]',
        '[calls_begin][call_begin]f[separator]{"a": ' + "9" * 5000 + "}[call_end][calls_end]",
        "[calls_begin][call_begin]f[separator]" + '{"a":' * 50_000 + "[call_end][calls_end]",
        "[output_begin]2[output_end]",
    ],
)
def test_malformed_calls_are_content(with_tools: Tokenizer, text: str) -> None:
    shown = with_tools.decode(
        token for token in spelled_ids(with_tools, text) if token != with_tools.user_id
    )
    assert "<｜tool▁" in shown
    assert parsed(with_tools, text) == (shown, ())


WHOLE = f"[calls_begin]{ONE}[calls_end]"
MARKS = ["user", "calls_begin", "calls_end", "call_begin", "call_end", "separator", "output_begin"]


@settings(max_examples=300, deadline=None)
@given(
    parts=st.lists(
        st.sampled_from([f"[{mark}]" for mark in MARKS] + ["f", "{}", '{"a": 1}', "9", WHOLE]),
        max_size=12,
    )
)
def test_whatever_is_sampled_is_a_message(with_tools: Tokenizer, parts: list[str]) -> None:
    text = "".join(parts)
    content, calls = parsed(with_tools, text)
    assert all(call.name and isinstance(json.loads(call.arguments), dict) for call in calls)
    if not calls:
        assert ("<｜tool▁" in content) == any(f"[{mark}]" in text for mark in MARKS[1:])


def test_a_vocabulary_without_tool_tokens_knows_no_calls(tokenizer: Tokenizer) -> None:
    text = "".join(TOOL_TOKENS)
    message, _ = parse_assistant(tokenizer, [tokenizer.end_think_id, *tokenizer.encode(text)])
    assert (message.content, message.tool_calls) == (text, ())
