"""A conversation's ids: transformers' template as oracle, the mask, and no way for content to form
special tokens.
"""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xushi.base.errors import XushiError
from xushi.base.messages import Message
from xushi.tokenizer import Tokenizer, chat_examples, encode_chat, parse_assistant
from xushi.tokenizer.config import SPECIAL_TOKENS

PLAIN = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<｜"), max_size=20)
SPELLED = st.lists(st.one_of(PLAIN, st.sampled_from(SPECIAL_TOKENS)), max_size=4).map("".join)


def conversations(content: st.SearchStrategy[str]) -> st.SearchStrategy[list[Message]]:
    roles = st.sampled_from(["system", "user", "assistant"])
    bare = st.builds(Message, roles, content)
    thought = st.builds(Message, st.just("assistant"), content, content)
    return st.lists(st.one_of(bare, thought), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def theirs(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    transformers = pytest.importorskip("transformers")
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(directory)
    return transformers.AutoTokenizer.from_pretrained(directory)


@settings(max_examples=80, deadline=None)
@given(messages=conversations(PLAIN), prompt=st.booleans())
def test_template_in_transformers_gives_the_same_ids(
    tokenizer: Tokenizer, theirs: Any, messages: list[Message], prompt: bool
) -> None:
    rendered = theirs.apply_chat_template(
        [m.to_dict() for m in messages], add_generation_prompt=prompt, return_dict=False
    )
    assert rendered == encode_chat(tokenizer, messages, prompt)


@settings(max_examples=80, deadline=None)
@given(messages=conversations(SPELLED))
def test_transformers_sanitized_template_is_as_safe(
    tokenizer: Tokenizer, theirs: Any, messages: list[Message]
) -> None:
    rendered = theirs.apply_chat_template(
        [m.to_dict() for m in messages],
        add_generation_prompt=True,
        return_dict=False,
        sanitize_control_tokens=True,
    )
    assert rendered == encode_chat(tokenizer, messages)


@settings(max_examples=100, deadline=None)
@given(messages=conversations(SPELLED))
def test_content_forms_no_special_token(tokenizer: Tokenizer, messages: list[Message]) -> None:
    ids = encode_chat(tokenizer, messages, generation_prompt=False)
    roles = [message.role for message in messages]
    assert ids.count(tokenizer.user_id) == roles.count("user")
    assert (
        ids.count(tokenizer.assistant_id) == ids.count(tokenizer.eos_id) == roles.count("assistant")
    )
    assert ids.count(tokenizer.end_think_id) == roles.count("assistant")
    assert ids.count(tokenizer.think_id) == sum(bool(message.reasoning) for message in messages)
    assert ids.count(tokenizer.bos_id) == 1 and tokenizer.pad_id not in ids


@settings(max_examples=100, deadline=None)
@given(messages=conversations(SPELLED))
def test_mask_is_what_the_assistant_produces(tokenizer: Tokenizer, messages: list[Message]) -> None:
    [(ids, mask)] = chat_examples(tokenizer, messages)
    assert len(ids) == len(mask)
    learned: list[list[int]] = []
    for i, wanted in enumerate(mask):
        if wanted and not mask[i - 1]:
            assert ids[i - 1] == tokenizer.assistant_id
            learned.append([])
        if wanted:
            learned[-1].append(ids[i])
    replies = [message for message in messages if message.role == "assistant"]
    expected = [
        (Message("assistant", message.content, message.reasoning or None), True)
        for message in replies
    ]
    assert [parse_assistant(tokenizer, reply) for reply in learned] == expected


def test_forms_in_full(tokenizer: Tokenizer) -> None:
    messages: list[Message] = [
        Message("user", "q"),
        Message("system", "s"),
        Message("assistant", "a", "r"),
        Message("assistant", "b"),
    ]
    assert tokenizer.decode(encode_chat(tokenizer, messages)) == (
        "<｜begin▁of▁sentence｜>s<｜User｜>q<｜Assistant｜><think>r</think>a<｜end▁of▁sentence｜>"
        "<｜Assistant｜></think>b<｜end▁of▁sentence｜><｜Assistant｜>"
    )


def test_unfinished_replies(tokenizer: Tokenizer) -> None:
    think, end, eos = tokenizer.think_id, tokenizer.end_think_id, tokenizer.eos_id
    r, a = tokenizer.encode("r"), tokenizer.encode("a")

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


def test_unknown_role(tokenizer: Tokenizer) -> None:
    with pytest.raises(XushiError, match="unknown role 'tool'"):
        encode_chat(tokenizer, [Message("tool", "x")])
