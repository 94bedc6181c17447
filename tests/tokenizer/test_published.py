"""Tokenizers of others: transformers' AutoTokenizer is the oracle."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xushi.base.errors import BadInput
from xushi.base.messages import Message
from xushi.tokenizer import Conversations, StreamDecoder
from xushi.tokenizer.published import PublishedTokenizer, read_tokenizer_file

from ..published import (
    BOS,
    EOS,
    PAD,
    PLAIN_ADDED,
    TOOLS,
    edit,
    their_tokenizer,
    token_id,
    write_tokenizer,
)

ADDED = (BOS, EOS, PAD, *PLAIN_ADDED, *TOOLS)
TEXTS = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    | st.sampled_from([*ADDED, "\n\n", "  ", " hello", "12345", "世界", "é", "\r\n"]),
    max_size=6,
).map("".join)


def opened(directory: Path) -> PublishedTokenizer:
    return PublishedTokenizer(directory, read_tokenizer_file(directory))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def ours(directory: Path) -> PublishedTokenizer:
    return opened(directory)


@pytest.fixture(scope="module")
def oracle(directory: Path) -> Any:
    return their_tokenizer(directory)


@settings(max_examples=100)
@given(text=TEXTS)
def test_encodes_as_transformers(ours: PublishedTokenizer, oracle: Any, text: str) -> None:
    ids = ours.encode(text)
    assert ids == oracle.encode(text, add_special_tokens=False)
    assert ours.prompt_ids(text) == oracle(text)["input_ids"]
    assert ours.decode(ids) == oracle.decode(ids)


@settings(max_examples=100)
@given(data=st.data())
def test_any_ids_decode_as_in_transformers(
    ours: PublishedTokenizer, oracle: Any, data: st.DataObject
) -> None:
    """Whole lists and one by one; ids that have no token are among them."""
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size + 20), max_size=12))
    shown = [token for token in ids if token not in ours.eos_ids]
    assert ours.decode(ids, skip_special=True) == oracle.decode(shown, skip_special_tokens=True)
    stream = StreamDecoder(ours, skip_special=True)
    text = "".join(stream.push(token) for token in ids) + stream.flush()
    assert text == oracle.decode(shown, skip_special_tokens=True)


def test_roles(ours: PublishedTokenizer) -> None:
    assert ours.bos_id == token_id(BOS) and ours.eos_ids == {token_id(EOS)}
    assert ours.think_id == token_id("<think>") and ours.end_think_id == token_id("</think>")
    assert ours.tool_ids is not None and list(ours.tool_ids) == [token_id(name) for name in TOOLS]
    assert ours.named == {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS}
    assert ours.is_special(token_id("<think>")) and not ours.is_special(ours.encode("a")[0])
    assert ours.token_bytes(token_id(EOS)) == b"" == ours.token_bytes(10**6)
    assert ours.token_bytes(token_id("<think>")) == b"<think>"
    assert ours.longest_token == max(len(name.encode()) for name in ADDED)


def test_several_end_tokens_of_the_files(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    edit(tmp_path / "config.json", eos_token_id=5)
    assert opened(tmp_path).eos_ids == {token_id(EOS), 5}
    edit(tmp_path / "generation_config.json", eos_token_id=[token_id(EOS), token_id("<|EOT|>")])
    assert opened(tmp_path).eos_ids == {token_id(EOS), token_id("<|EOT|>")}
    found = opened(tmp_path)
    assert found.decode([*found.encode("a"), token_id("<|EOT|>")], skip_special=True) == "a"
    edit(tmp_path / "tokenizer_config.json", eos_token=PAD)
    assert token_id(PAD) in opened(tmp_path).eos_ids


def test_a_vocabulary_without_marks_and_ends(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, bos_token=None, eos_token=None, pad_token=None)
    table = json.loads((tmp_path / "tokenizer.json").read_text())
    edit(tmp_path / "tokenizer.json", added_tokens=table["added_tokens"][:3])
    found = opened(tmp_path)
    assert (found.bos_id, found.think_id, found.end_think_id, found.tool_ids) == (None,) * 4
    assert found.eos_ids == frozenset() and found.prompt_ids("a") == found.encode("a")
    assert found.reply_begins([1, 2, 3]) == "either"


@pytest.mark.parametrize("wanted", [True, False, None])
def test_bos_before_a_text_if_the_directory_asks_for_it(
    wanted: bool | None, tmp_path: Path
) -> None:
    write_tokenizer(tmp_path, add_bos_token=wanted)
    found = opened(tmp_path)
    assert found.prompt_ids("a") == [found.bos_id] * (wanted is True) + found.encode("a")


def test_a_post_processor_puts_bos_as_in_transformers(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, processors

    write_tokenizer(tmp_path)
    backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, token_id(BOS))]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    found = opened(tmp_path)
    assert found.prompt_ids("a") == their_tokenizer(tmp_path)("a")["input_ids"]
    assert found.prompt_ids("a")[0] == found.bos_id
    assert found.encode("a") == their_tokenizer(tmp_path).encode("a", add_special_tokens=False)


def test_lengths_in_the_file_cut_nothing(tmp_path: Path) -> None:
    """tokenizer.json may say to truncate and to pad; nobody asks for that here."""
    write_tokenizer(tmp_path)
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": PAD,
    }
    plain = opened(tmp_path)
    edit(tmp_path / "tokenizer.json", truncation=truncation, padding=padding)
    found = opened(tmp_path)
    text = "a long text of many tokens"
    assert found.encode(text) == plain.encode(text) == found.encode_text(text)
    assert found.decode(found.encode(text)) == text


def test_tokens_that_only_the_config_has_are_added(tmp_path: Path) -> None:
    table = {"content": "<think>", "special": True, "normalized": False}
    table |= {"lstrip": False, "rstrip": False, "single_word": False}
    write_tokenizer(
        tmp_path,
        unk_token="<unk>",
        additional_special_tokens=["<more>", "<think>"],
        # By their ids, which are not their order as texts.
        added_tokens_decoder={
            "1000": table | {"content": "<second>"},
            "999": table | {"content": "<first>"},
            str(token_id("<think>")): table,
        },
    )
    found, oracle = opened(tmp_path), their_tokenizer(tmp_path)
    for text in ("a<unk>b<more>c", "<think>x</think>", "<first><second>"):
        ids = found.encode(text)
        assert ids == oracle.encode(text, add_special_tokens=False)
        assert found.decode(ids, skip_special=True) == oracle.decode(ids, skip_special_tokens=True)
    assert found.decode(found.encode("<think>x<more>"), skip_special=True) == "x"


def test_extra_special_tokens_by_their_names(tmp_path: Path) -> None:
    template = "{{ image_token }}{{ messages[0].content }}"
    extra = {"image_token": "<image>", "first": "<think>"}
    write_tokenizer(tmp_path, extra_special_tokens=extra, chat_template=template)
    found, oracle = Conversations(tmp_path), their_tokenizer(tmp_path)
    messages = [Message("user", "a<image>")]
    ids = found.ids(messages)
    assert ids[0] == oracle.convert_tokens_to_ids("<image>") and ids.count(ids[0]) == 1
    assert isinstance(found.tokenizer, PublishedTokenizer)
    assert found.tokenizer.named == oracle.special_tokens_map
    text = "<image>image_token<think>"
    assert found.tokenizer.encode(text) == oracle.encode(text, add_special_tokens=False)
    assert found.tokenizer.vocab_size == len(oracle)


def test_ids_of_added_tokens_follow_the_order_of_their_numbers(tmp_path: Path) -> None:
    write_tokenizer(
        tmp_path, added_tokens_decoder={"1000": {"content": "<b>"}, "999": {"content": "<a>"}}
    )
    found, oracle = opened(tmp_path), their_tokenizer(tmp_path)
    assert found.encode("<a><b>") == oracle.encode("<a><b>", add_special_tokens=False)
    assert found.encode("<a>") == [found.vocab_size - 2]


def test_what_a_message_must_not_form(tmp_path: Path) -> None:
    """Special tokens, named ones, and those that the template writes, but for white space."""
    blank = {"content": "\n\n", "special": False}
    write_tokenizer(
        tmp_path,
        unk_token="<unk>",
        added_tokens_decoder={"1000": {"content": "<unk>", "special": False}, "1001": blank},
    )
    found = opened(tmp_path)
    assert found.control_tokens("") == [BOS, EOS, PAD, "<unk>"]
    assert found.control_tokens("a\n\n<think>\n\n") == [BOS, EOS, PAD, "<think>", "<unk>"]


def test_marks_of_tools_are_shown_where_they_are_special_too(tmp_path: Path) -> None:
    """A reply's text has them; calls are read from their ids."""
    write_tokenizer(tmp_path)
    added = json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]
    special = [each | {"special": each["special"] or each["content"] in TOOLS} for each in added]
    edit(tmp_path / "tokenizer.json", added_tokens=special)
    found = opened(tmp_path)
    assert found.tool_ids is not None
    ids = [token_id(BOS), *found.tool_ids]
    assert found.decode(ids, skip_special=True) == "".join(TOOLS)


def test_text_is_encoded_without_added_tokens(ours: PublishedTokenizer) -> None:
    for text in ADDED:
        ids = ours.encode_text(text)
        assert ours.decode(ids) == text and not any(ours.is_special(token) for token in ids)
        assert ours.encode(text) == [token_id(text)]


def test_where_a_reply_begins(ours: PublishedTokenizer) -> None:
    for text, wanted in {
        "<｜User｜>a<｜Assistant｜><think>\n": "reasoning",
        "<｜User｜>a<｜Assistant｜><think>so far": "reasoning",
        "<｜User｜>a<｜Assistant｜></think>": "content",
        "<｜User｜>a<｜Assistant｜><think>a</think>b": "content",
        "<｜User｜>a<｜Assistant｜>": "either",
        "<think>a</think><｜User｜>b<｜Assistant｜>": "either",
        "<think>a<｜User｜>b": "either",
        f"<think>a{EOS}": "either",
        "": "either",
    }.items():
        assert ours.reply_begins(ours.encode(text)) == wanted, text


@pytest.mark.parametrize("name", ["tokenizer.model", "tiktoken.model"])
def test_a_tokenizer_that_only_other_code_reads_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(BadInput, match=rf"no tokenizer\.json, only {name}"):
        Conversations(tmp_path)


def test_other_kinds_of_tokenizer_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"tokenizer\.json does not exist"):
        Conversations(tmp_path)
    write_tokenizer(tmp_path)
    edit(tmp_path / "tokenizer.json", decoder={"type": "Metaspace"})
    with pytest.raises(BadInput, match="its decoder Metaspace"):
        Conversations(tmp_path)
    edit(tmp_path / "tokenizer.json", decoder=None)
    with pytest.raises(BadInput, match="its decoder missing"):
        Conversations(tmp_path)
    write_tokenizer(tmp_path)
    edit(tmp_path / "tokenizer.json", model={"type": "Unigram", "vocab": []})
    with pytest.raises(BadInput, match=r"its model is .Unigram"):
        Conversations(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        {"added_tokens": "x"},
        {"model": None},
        {"model": {"type": "BPE"}},
        {"pre_tokenizer": {"type": "Nothing"}},
        {"pre_tokenizer": 3, "added_tokens": []},
    ],
)
def test_damaged_files_are_refused(damage: dict[str, Any], tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    edit(tmp_path / "tokenizer.json", **damage)
    with pytest.raises(BadInput, match=r"tokenizer\.json"):
        Conversations(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"added_tokens_decoder": {"x": {}}},
        {"added_tokens_decoder": [1]},
        {"added_tokens_decoder": {"1": {"odd": 2}}},
        {"added_tokens_decoder": {"1": {"content": 2}}},
        {"added_tokens_decoder": {"1": {"content": "a", "lstrip": 1}}},
        {"additional_special_tokens": [{"text": 1}]},
        {"additional_special_tokens": [1]},
        {"additional_special_tokens": "a"},
        {"extra_special_tokens": {"a": 1}},
        {"eos_token": 3},
    ],
)
def test_damaged_settings_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    write_tokenizer(tmp_path, **settings)
    with pytest.raises(BadInput, match=r"tokenizer_config\.json"):
        Conversations(tmp_path)


def test_lone_surrogates_are_refused(ours: PublishedTokenizer) -> None:
    for encode in (ours.encode, ours.encode_text, ours.prompt_ids):
        with pytest.raises(BadInput, match="lone surrogate"):
            encode("a\ud800")


def test_a_tokenizer_that_is_a_link_out_of_its_directory_is_refused(
    directory: Path, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").symlink_to(directory / "tokenizer.json")
    with pytest.raises(BadInput, match="a link that leads out of its directory"):
        read_tokenizer_file(tmp_path)


def test_what_a_damaged_tokenizer_says_cannot_steer_a_terminal(tmp_path: Path) -> None:
    table = {"model": {"type": "BPE", "vocab": {}, "merges": ["\x1b]0;pwn\x07"]}}
    put = table | {"decoder": {"type": "ByteLevel"}, "pre_tokenizer": {"type": "\x1b[31m"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(put))
    with pytest.raises(BadInput, match="is damaged") as caught:
        opened(tmp_path)
    assert caught.value.problem.isprintable()
