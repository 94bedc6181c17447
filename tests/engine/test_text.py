import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xushi.base.messages import ToolCall
from xushi.engine import TextStream
from xushi.engine.text import StopFinder
from xushi.tokenizer import Tokenizer, parse_assistant


@pytest.fixture(scope="module")
def with_tools():
    return Tokenizer.train([], 270, tools=True)


def split(stream, ids):
    parts = {"reasoning": "", "content": ""}
    deltas = [delta for token in ids for delta in stream.push(token)] + stream.flush()
    for delta in deltas:
        assert delta.text
        parts[delta.channel] += delta.text
    return parts


@given(
    st.lists(st.text("ab<", min_size=1, max_size=3), max_size=12),
    st.lists(st.text("ab<", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_across_any_borders(pieces, stop):
    finder = StopFinder(stop)
    out = []
    for piece in pieces:
        out.append(finder.push(piece))
        if finder.found:
            break
    text = "".join(out) + finder.flush()
    whole = "".join(pieces)
    # The first stop string to be complete in the text as it arrives, character by character, ends
    # it.
    assert not any(s in text for s in stop)
    assert whole.startswith(text)
    assert finder.found == any(s in whole for s in stop)
    if not finder.found:
        assert text == whole
    else:
        assert any(whole[len(text) :].startswith(s) for s in stop)


def test_only_a_possible_beginning_is_held_back():
    finder = StopFinder(["\n\n", "END"])
    assert [finder.push(piece) for piece in ("a\n", "b E", "N", "x", "\n", "\nc")] == [
        "a",
        "\nb ",
        "",
        "ENx",
        "",
        "",
    ]
    assert finder.found
    assert finder.flush() == ""


@given(
    st.lists(st.one_of(st.integers(0, 271), st.sampled_from([1, 5, 6, 228, 237, 258])), max_size=30)
)
def test_chat_agrees_with_parse_assistant(tokenizer, ids):
    agrees(tokenizer, [token for token in ids if token != tokenizer.eos_id])


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(["f", "{}", "9", "天", 0, 3, 5, 6, 7, 8, 9, 10, 13]), max_size=12).map(
        lambda parts: [6, *parts]
    ),
    st.booleans(),
)
def test_tool_calls_agree_with_parse_assistant(with_tools, parts, ends):
    ids = []
    for part in parts:
        ids += [part] if isinstance(part, int) else with_tools.encode(part)
    agrees(with_tools, [*ids, with_tools.eos_id] if ends else ids)


def agrees(tokenizer, ids):
    stream = TextStream(tokenizer, chat=True, calls=True)
    parts = split(stream, ids)
    message, _ = parse_assistant(tokenizer, ids)
    assert parts == {"reasoning": message.reasoning or "", "content": message.content}
    assert stream.thought == (message.reasoning is not None)
    assert stream.tool_calls == message.tool_calls


def test_tool_calls_and_text_around_them(with_tools):
    marks = with_tools.tool_ids
    f, arguments = with_tools.encode("f"), with_tools.encode("{}")
    call = [marks.call_begin, *f, marks.separator, *arguments, marks.call_end]
    block = [marks.calls_begin, *call, marks.calls_end]
    stream = TextStream(with_tools, chat=True, calls=True)
    ids = [with_tools.end_think_id, *with_tools.encode("a"), *block, with_tools.eos_id]
    assert split(stream, ids) == {"reasoning": "", "content": "a"}
    assert stream.tool_calls == (ToolCall("f", "{}"),)
    # A malformed block is content, in which stop strings count.
    stream = TextStream(with_tools, stop=["{}"], chat=True, calls=True)
    assert split(stream, ids[:-2]) == {
        "reasoning": "",
        "content": "a<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>",
    }
    assert stream.stopped
    assert stream.tool_calls == ()
    # For a caller that has no place for calls they are content.
    stream = TextStream(with_tools, chat=True)
    content = with_tools.decode([*with_tools.encode("a"), *block])
    assert split(stream, ids) == {"reasoning": "", "content": content}
    assert "<｜tool▁sep｜>{}" in content and stream.tool_calls == ()
    # Without the chat form there are no calls.
    assert "<｜tool▁sep｜>f" not in split(TextStream(with_tools), ids)["content"]
    assert "<｜tool▁sep｜>{}" in split(TextStream(with_tools), ids)["content"]


def test_the_first_stop_string_in_the_text_ends_it():
    for stops in (["b", "a"], ["a", "b"]):
        finder = StopFinder(stops)
        assert finder.push("xaxb") == "x"
        assert finder.found


@given(st.text(max_size=20))
def test_completion_gives_all_text_and_no_special_tokens(tokenizer, text):
    ids = [
        tokenizer.bos_id,
        tokenizer.think_id,
        *tokenizer.encode(text),
        tokenizer.end_think_id,
        tokenizer.eos_id,
    ]
    assert split(TextStream(tokenizer), ids) == {"reasoning": "", "content": text}


def test_stop_is_sought_in_the_answer_only(tokenizer):
    stream = TextStream(tokenizer, stop=["9"], chat=True)
    ids = [
        tokenizer.think_id,
        *tokenizer.encode("7 9"),
        tokenizer.end_think_id,
        *tokenizer.encode("8 9 1"),
    ]
    assert split(stream, ids) == {"reasoning": "7 9", "content": "8 "}
    assert stream.stopped
    assert stream.reasoning_tokens == 5
