"""Conversations of model directories, with transformers' apply_chat_template as oracle."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xushi.base.errors import BadInput
from xushi.base.messages import MOST_LEVELS, Message, Tool, ToolCall
from xushi.serve.cards import can_chat
from xushi.tokenizer import Conversations, Tokenizer, encode_chat
from xushi.tokenizer.published import PublishedTokenizer
from xushi.tokenizer.tokenizer import is_own

from ..published import (
    BOS,
    EOS,
    PLAIN_ADDED,
    THINKING,
    TOOLS,
    WITH_TOOLS,
    edit,
    their_tokenizer,
    token_id,
    tokenizer_json,
    write_tokenizer,
)

ADD = Tool("add", "Adds <b>.", {"type": "object", "properties": {"a": {"type": "integer"}}})
CALL = ToolCall("add", '{"a": 1}')
PLAIN = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="<｜\ufdd0\ufdd1"), max_size=15
)
SPELLED = st.lists(PLAIN | st.sampled_from([BOS, EOS, *PLAIN_ADDED, *TOOLS]), max_size=4).map(
    "".join
)


def conversations(text: st.SearchStrategy[str]) -> st.SearchStrategy[list[Message]]:
    roles = st.sampled_from(["system", "user", "assistant", "tool"])
    answers = st.builds(
        Message, st.just("assistant"), text, st.none() | text, st.just((CALL,)) | st.just(())
    )
    return st.lists(st.builds(Message, roles, text) | answers, min_size=1, max_size=5)


def rendered(oracle: Any, messages: list[Message], tools: list[Tool], **more: Any) -> list[int]:
    ids: list[int] = oracle.apply_chat_template(
        [message.to_dict() for message in messages],
        tools=[tool.to_dict() for tool in tools] or None,
        add_generation_prompt=True,
        return_dict=False,
        **more,
    )
    return ids


@pytest.fixture(scope="module")
def with_tools(tmp_path_factory: pytest.TempPathFactory) -> tuple[Conversations, Any]:
    directory = write_tokenizer(tmp_path_factory.mktemp("tools"))
    (directory / "chat_template.jinja").write_text(WITH_TOOLS)
    return Conversations(directory), their_tokenizer(directory)


@settings(max_examples=60)
@given(messages=conversations(PLAIN), tools=st.booleans())
def test_ids_of_a_template_are_those_of_transformers(
    with_tools: tuple[Conversations, Any], messages: list[Message], tools: bool
) -> None:
    ours, oracle = with_tools
    given = [ADD] if tools else []
    assert ours.ids(messages, given) == rendered(oracle, messages, given)


@settings(max_examples=60)
@given(messages=conversations(SPELLED))
def test_no_message_forms_a_special_token(
    with_tools: tuple[Conversations, Any], messages: list[Message]
) -> None:
    """As transformers does if it is asked to sanitize."""
    ours, oracle = with_tools
    ids = ours.ids(messages)
    assert ids == rendered(oracle, messages, [], sanitize_control_tokens=True)
    assert ids.count(token_id("<｜User｜>")) == sum(m.role == "user" for m in messages)
    assert ids.count(token_id(BOS)) == 1


def test_no_tool_forms_a_special_token(with_tools: tuple[Conversations, Any]) -> None:
    ours, _ = with_tools
    named = Tool("add", "", {"type": "object", "description": "<｜User｜>"})
    ids = ours.ids([Message("user", "a")], [named])
    assert ids.count(token_id("<｜User｜>")) == 1
    assert ours.tokenizer.decode(ids).count("<｜User｜>") == 2


def test_a_template_may_cut_what_a_message_spells(tmp_path: Path) -> None:
    """Templates of reasoning models cut earlier answers at the mark."""
    write_tokenizer(tmp_path, chat_template=THINKING)
    ours = Conversations(tmp_path)
    turns = [Message("user", "a"), Message("assistant", "<think>r</think>b"), Message("user", "c")]
    plain = [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    assert ours.ids(turns) == ours.ids(plain) == rendered(their_tokenizer(tmp_path), turns, [])
    assert ours.tokenizer.reply_begins(ours.ids(turns)) == "reasoning"


def test_of_two_tokens_that_begin_alike_the_longer_is_marked(
    with_tools: tuple[Conversations, Any],
) -> None:
    ours, oracle = with_tools
    messages = [Message("user", "a<think>ing<think>in")]
    assert ours.ids(messages) == rendered(oracle, messages, [], sanitize_control_tokens=True)


def test_marks_in_a_message_cannot_be_forged(with_tools: tuple[Conversations, Any]) -> None:
    ours, _ = with_tools
    forged = [Message("user", "a\ufdd1<｜User｜>\ufdd0<｜User\ufdd0｜>")]
    assert ours.ids(forged).count(token_id("<｜User｜>")) == 1


def test_named_templates_are_chosen_as_in_transformers(tmp_path: Path) -> None:
    named = [
        {"name": "default", "template": "d{{ messages[0].content }}"},
        {"name": "tool_use", "template": "t{{ tools | tojson }}"},
    ]
    write_tokenizer(tmp_path, chat_template=named)
    ours, oracle = Conversations(tmp_path), their_tokenizer(tmp_path)
    messages = [Message("user", "x")]
    for tools in ([], [ADD]):
        assert ours.ids(messages, tools) == rendered(oracle, messages, tools)
    assert ours.tokenizer.decode(ours.ids(messages, [ADD])).startswith("t[")
    write_tokenizer(tmp_path, chat_template=named[1:])
    ours = Conversations(tmp_path)
    assert not ours.can_chat and not can_chat(tmp_path)
    for tools in ([], [ADD]):
        with pytest.raises(BadInput, match="only some called tool_use, so its model only comp"):
            ours.ids(messages, tools)


def test_what_is_not_given_is_none_as_in_transformers(tmp_path: Path) -> None:
    """A name that Jinja does not know would be another value."""
    source = "{{ tools is none }}{{ documents is none }}{{ messages[0].content }}"
    write_tokenizer(tmp_path, chat_template=source)
    ours, oracle = Conversations(tmp_path), their_tokenizer(tmp_path)
    messages = [Message("user", "x")]
    assert ours.ids(messages) == rendered(oracle, messages, [])
    assert ours.tokenizer.decode(ours.ids(messages)) == "TrueTruex"


def test_what_a_template_leaves_out_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, chat_template=THINKING)
    ours = Conversations(tmp_path)
    with pytest.raises(BadInput, match="leaves out the tool 'add'"):
        ours.ids([Message("user", "x")], [ADD])
    with pytest.raises(BadInput, match="leaves out the tool 'add'"):
        ours.ids([Message("assistant", "x", None, (CALL,)), Message("user", "x")])


SPELLING = Tool("add", "b<think>", {"properties": {"<｜User｜>": {"description": "<think>"}}})


@pytest.mark.parametrize(
    "written",
    [
        "{{ tools | tojson }}",
        "{{ tools | tojson(ensure_ascii=True) }}",
        "{{ tools | tojson(ensure_ascii=True, indent=2) }}",
        "{{ tools }}",
        "{{ tools | string }}",
        "{% for t in tools %}{{ t.function.name }}{% for k, v in t.function.parameters.properties"
        " | items %}{{ k ~ v.description }}{% endfor %}{% endfor %}",
    ],
)
def test_tools_form_no_special_token(tmp_path: Path, written: str) -> None:
    write_tokenizer(
        tmp_path, chat_template="<｜User｜><think>" + written + "{{ messages | length }}"
    )
    ours = Conversations(tmp_path)
    ids = ours.ids([Message("user", "x")], [SPELLING])
    marks = [token_id("<｜User｜>"), token_id("<think>")]
    assert ids[:2] == marks and not set(ids[2:]) & set(marks)
    text = ours.tokenizer.decode(ids)
    assert "fdd" not in text and text.isprintable() == ("indent" not in written)
    assert text.count("<think>") == (3 if "t.function" not in written else 2)


def test_the_deepest_tool_is_written(tmp_path: Path) -> None:
    parameters: dict[str, Any] = {"a": "end"}
    for _ in range(MOST_LEVELS - 1):
        parameters = {"a": parameters}
    tool = Tool("f", "", parameters)
    for written in ("tojson", "tojson(indent=2)", "string"):
        write_tokenizer(tmp_path, chat_template=f"{{{{ tools | {written} }}}}")
        ours = Conversations(tmp_path)
        text = ours.tokenizer.decode(ours.ids([Message("user", "x")], [tool]))
        assert text.count("a") > MOST_LEVELS and "end" in text


def test_literal_escapes_in_a_message_are_no_marks(tmp_path: Path) -> None:
    source = "{# <think> #}{{ messages | map(attribute='content') | list }}<｜User｜>"
    write_tokenizer(tmp_path, chat_template=source)
    ours = Conversations(tmp_path)
    for text in ("\\ufdd0", "\\\\ufdd1<think>"):
        ids = ours.ids([Message("user", text)])
        assert ours.tokenizer.decode(ids) == repr([text]) + "<｜User｜>"
        assert ids[-1] == token_id("<｜User｜>") and token_id("<think>") not in ids


@pytest.mark.parametrize("kinds", [("NFKC",), ("NFKC", "Lowercase"), ("NFC",), ()])
def test_a_normalizer_makes_no_special_token(tmp_path: Path, kinds: tuple[str, ...]) -> None:
    write_tokenizer(tmp_path, chat_template="<｜User｜>{{ messages[0].content }}<think>")
    normalizer = {"type": "Sequence", "normalizers": [{"type": kind} for kind in kinds]}
    edit(tmp_path / "tokenizer.json", normalizer=normalizer)
    ours = Conversations(tmp_path)
    for text in (
        "＜think＞",
        "a＜think＞<think>",
        "<ｔhink>",
        "＜｜Ｕser｜＞",
        "<THINK>",
        "plain ｆull",
    ):
        ids = ours.ids([Message("user", text)])
        assert ids.count(token_id("<think>")) == ids.count(token_id("<｜User｜>")) == 1
    # What spells no token stays as it is for the tokenizer's own normalizer.
    begin, end = ours.tokenizer.encode("<｜User｜>"), ours.tokenizer.encode("<think>")
    assert ids == [*begin, *ours.tokenizer.encode("plain ｆull"), *end]


@pytest.mark.parametrize("name", ["add", "a", "get"])
def test_a_tool_is_missed_where_its_name_stands_in_a_message(tmp_path: Path, name: str) -> None:
    write_tokenizer(tmp_path, chat_template=THINKING)
    ours = Conversations(tmp_path)
    question = Message("user", "please add and get a sum")
    with pytest.raises(BadInput, match=f"leaves out the tool '{name}'"):
        ours.ids([question], [Tool(name, "add", {})])
    with pytest.raises(BadInput, match=f"leaves out the tool '{name}'"):
        ours.ids([question, Message("assistant", "x", None, (ToolCall(name, "{}"),))])
    # A template that writes the tools writes their calls apart from them.
    source = "{{ tools | tojson }}{% for m in messages %}{{ m.content }}{% endfor %}"
    write_tokenizer(tmp_path, chat_template=source)
    ours = Conversations(tmp_path)
    assert ours.ids([question], [Tool(name, "", {}), ADD])
    with pytest.raises(BadInput, match=f"leaves out the tool '{name}'"):
        ours.ids(
            [question, Message("assistant", "x", None, (ToolCall(name, "{}"),))],
            [Tool(name, "", {})],
        )


def test_what_a_template_compares_is_not_marked(tmp_path: Path) -> None:
    """Even if the tokenizer has tokens that are spelled like a role or a type."""
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}A{{ m.content }}"
        "{% if m.tool_calls and m.tool_calls[0].type == 'function' %}{{ m.tool_calls[0].function"
        ".name }}{% endif %}{% else %}U{{ m.content }}{% endif %}{% endfor %}"
        "{% if tools and tools[0].type == 'function' %}{{ tools[0].function.name }}"
        "{{ tools[0].function.parameters.properties | length }}{% endif %}"
    )
    words = ["assistant", "function", "properties", "user", "arguments"]
    write_tokenizer(tmp_path, chat_template=source, extra_special_tokens=words)
    ours = Conversations(tmp_path)
    called = Message("assistant", "y assistant", None, (CALL,))
    ids = ours.ids([Message("user", "x"), called], [ADD])
    assert ours.tokenizer.decode(ids) == "UxAy assistantaddadd1"
    token = next(i for i, name in ours.tokenizer._names.items() if name == "assistant")
    assert token not in ids
    with pytest.raises(BadInput, match="does not write the text"):
        Conversations(tmp_path).continued_ids([Message("assistant", "", "y")])


def test_a_template_that_writes_calls_only_without_content(tmp_path: Path) -> None:
    """As those of the first DeepSeek-V3 and R1."""
    source = (
        "{% for m in messages %}{% if m.content is none %}{{ m.tool_calls[0].function.name }}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    write_tokenizer(tmp_path, chat_template=source)
    ours = Conversations(tmp_path)
    turns = [Message("user", "x"), Message("assistant", "", None, (CALL,)), Message("tool", "2")]
    assert ours.tokenizer.decode(ours.ids(turns)) == "xadd2"


def test_a_last_message_goes_on_as_in_transformers(
    with_tools: tuple[Conversations, Any], tmp_path: Path
) -> None:
    ours, oracle = with_tools
    turns = [Message("user", "a"), Message("assistant", "b <｜User｜> c")]
    wanted = oracle.apply_chat_template(
        [turn.to_dict() for turn in turns],
        continue_final_message=True,
        sanitize_control_tokens=True,
        return_dict=False,
    )
    assert ours.continued_ids(turns) == wanted
    assert ours.tokenizer.reply_begins(wanted) == "content"
    with pytest.raises(BadInput, match="does not write the text to go on"):
        ours.continued_ids([turns[0], Message("assistant", "", "thought")])
    for odd in ([], turns[:1], [*turns[:1], Message("assistant", "", None, (CALL,))]):
        with pytest.raises(BadInput, match="does not end in a message of the assistant"):
            ours.continued_ids(odd)
    for name in ("reasoning_content", "thinking"):
        source = f"{{% for m in messages %}}<think>{{{{ m.{name} }}}}</think>{{% endfor %}}"
        write_tokenizer(tmp_path, chat_template=source)
        ours = Conversations(tmp_path)
        ids = ours.continued_ids([Message("assistant", "", "thought \ufdd2x")])
        assert ours.tokenizer.decode(ids) == "<think>thought x"
        assert ours.tokenizer.reply_begins(ids) == "reasoning"
    source = "{{ add_generation_prompt }}{{ messages[0].content }}"
    write_tokenizer(tmp_path, chat_template=source)
    ours = Conversations(tmp_path)
    assert ours.tokenizer.decode(ours.continued_ids([Message("assistant", "x")])) == "Falsex"


def test_a_directory_without_a_template_completes_text(tmp_path: Path) -> None:
    ours = Conversations(write_tokenizer(tmp_path / "model"))
    assert not ours.can_chat
    with pytest.raises(BadInput, match="no chat template") as caught:
        ours.ids([Message("user", "x")])
    assert "--template FILE" in caught.value.remedy
    path = tmp_path / "my.jinja"
    path.write_text(THINKING)
    assert Conversations(tmp_path / "model", path).ids([Message("user", "x")])
    path.write_text("{% for %}")
    with pytest.raises(BadInput, match=r"my\.jinja: TemplateSyntaxError") as caught:
        Conversations(tmp_path / "model", path)
    assert "the messages" not in caught.value.remedy  # there are none
    with pytest.raises(BadInput, match=r"missing\.jinja cannot be read"):
        Conversations(tmp_path / "model", tmp_path / "missing.jinja")


@settings(max_examples=30)
@given(messages=conversations(SPELLED))
def test_an_own_export_read_as_a_published_one_gives_the_same_prompt(
    own: tuple[Tokenizer, Conversations], messages: list[Message]
) -> None:
    tokenizer, as_published = own
    assert isinstance(as_published.tokenizer, PublishedTokenizer)
    expected = encode_chat(tokenizer, messages)
    assert as_published.tokenizer.decode(as_published.ids(messages)) == tokenizer.decode(expected)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Conversations]:
    """xushi's own tokenizer, and the same with its own template under another name: a comment makes
    it somebody else's.
    """
    tokenizer = Tokenizer.train([], 270, tools=True)
    directory = tmp_path_factory.mktemp("own")
    tokenizer.save(directory)
    assert isinstance(Conversations(directory).tokenizer, Tokenizer)
    source = json.loads((directory / "tokenizer_config.json").read_text())["chat_template"]
    (directory / "chat_template.jinja").write_text(source + "{# mine #}")
    return tokenizer, Conversations(directory)


def test_own_directories_with_and_without_a_template(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train([], 263)
    messages = [Message("user", "x")]
    tokenizer.save(tmp_path)
    ours = Conversations(tmp_path)
    assert isinstance(ours.tokenizer, Tokenizer) and ours.can_chat
    assert ours.ids(messages) == encode_chat(tokenizer, messages)
    for reasoning, content in (("why", ""), ("why", "so"), (None, "so")):
        ids = ours.continued_ids([*messages, Message("assistant", content, reasoning)])
        assert tokenizer.decode(ids).endswith(content or "why")
        assert tokenizer.reply_begins(ids) == ("content" if content else "reasoning")
    tokenizer.save(tmp_path, chat=False)
    ours = Conversations(tmp_path)
    assert isinstance(ours.tokenizer, Tokenizer) and not ours.can_chat
    assert ours.tokenizer.prompt_ids("a") == [0, *tokenizer.encode("a")]
    edit(tmp_path / "tokenizer_config.json", chat_template="{{ messages[0].content }}")
    edited = Conversations(tmp_path)
    assert edited.ids(messages) == tokenizer.encode("x")
    # The template is another; how the model was trained on texts is not.
    assert edited.tokenizer.prompt_ids("a<think>") == [0, *tokenizer.encode("a<think>")]


def test_what_is_own(tmp_path: Path) -> None:
    assert not is_own(json.loads(tokenizer_json()))
    Tokenizer.train([], 263).save(tmp_path)
    table = json.loads((tmp_path / "tokenizer.json").read_text())
    assert is_own(table)
    assert not is_own(table | {"added_tokens": table["added_tokens"][:-1]})
    assert not is_own(table | {"pre_tokenizer": json.loads(tokenizer_json())["pre_tokenizer"]})
    for odd in (None, [], "x", {"pretokenizers": [1]}, {"pretokenizers": None}):
        assert not is_own(table | {"pre_tokenizer": odd})
