"""Lossless, safe against special tokens spelled in text, deterministic, and equal to what
transformers makes of it.
"""

import json
import string
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xushi.base.errors import XushiError
from xushi.base.files import sha256_file
from xushi.base.messages import Message
from xushi.tokenizer import Tokenizer, encode_chat
from xushi.tokenizer import tokenizer as module
from xushi.tokenizer.config import SPECIAL_TOKENS, TOOL_TOKENS

LOOK_ALIKES = [*SPECIAL_TOKENS, *TOOL_TOKENS, "<think", "</think>\n", "<｜", "｜>", "▁"]
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
MIXED = st.lists(
    st.one_of(
        UNICODE,
        st.sampled_from(LOOK_ALIKES),
        st.text(string.printable, max_size=30),
        st.text("天地玄黄，。あア가é\u0301", max_size=20),
        st.sampled_from(
            [
                "\0",
                "\r\n",
                "👨‍👩‍👧‍👦",
                "  \n\t\n    ",
                "１２３",
                "1234567890",
                "\ufeff",
                "\u2028",
                "\x1c\x85\xa0",
            ]
        ),
    ),
    max_size=8,
).map("".join)


@settings(max_examples=150, deadline=None)
@given(text=MIXED)
def test_lossless_and_never_special(
    tokenizer: Tokenizer, bare: Tokenizer, with_tools: Tokenizer, text: str
) -> None:
    for one in (tokenizer, bare, with_tools):
        ids = one.encode(text)
        assert one.decode(ids) == text
        assert not any(one.is_special(token) for token in ids)
        assert b"".join(one.token_bytes(token) for token in ids) == text.encode()
        assert int(one.byte_lengths[ids].sum()) == len(text.encode())


@settings(max_examples=150, deadline=None)
@given(text=MIXED, limit=st.integers(1, 20))
def test_long_texts_encode_the_same_in_chunks(tokenizer: Tokenizer, text: str, limit: int) -> None:
    chunks = list(module._chunks(text, limit))
    assert "".join(chunks) == text
    assert [token for chunk in chunks for token in tokenizer.encode(chunk)] == tokenizer.encode(
        text
    )


def test_long_texts_are_cut_into_chunks() -> None:
    assert list(module._chunks("ab\n  cd\nef\n\ngh", 1)) == ["ab\n  cd\n", "ef\n\n", "gh"]
    assert list(module._chunks("", 1)) == [""]
    assert list(module._chunks("abc  de\tf!\n x", 2)) == ["abc", "  de", "\tf!\n x"]
    assert list(module._chunks("a12b12", 1)) == ["a1", "2", "b1", "2"]


@given(texts=st.lists(MIXED, max_size=5))
@settings(max_examples=30, deadline=None)
def test_batch_is_each_alone(tokenizer: Tokenizer, texts: list[str]) -> None:
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_digits_stand_alone() -> None:
    tokenizer = Tokenizer.train(["x = 1111 + 1111\n1111 11\n" * 50], 265)
    assert [tokenizer.token_bytes(t) for t in tokenizer.encode("12 345")] == [
        b"1",
        b"2",
        b" ",
        b"3",
        b"4",
        b"5",
    ]
    digits = {ord(d) for d in string.digits}
    assert not any(
        len(tokenizer.token_bytes(t)) > 1 and digits & set(tokenizer.token_bytes(t))
        for t in range(265)
    )


def test_no_token_joins_chinese_to_latin() -> None:
    tokenizer = Tokenizer.train(["模型model模型model模型 model\n" * 50], 273)
    for token in range(7, 273):
        text = tokenizer.token_bytes(token)
        assert text.isascii() or not any(byte < 128 for byte in text), text


def test_chinese_compresses() -> None:
    words = [
        "天地玄黄",
        "宇宙洪荒",
        "模型",
        "数据",
        "训练",
        "虚实",
        "的",
        "了",
        "在",
        "学习",
        "语言",
        "深度",
    ]
    generator = np.random.Generator(np.random.Philox(key=7))
    text = "".join(generator.choice([*words, "，", "。\n"]) for _ in range(4000))
    tokenizer = Tokenizer.train([text], 340)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text.encode()) / 4


def test_training_is_deterministic_over_processes() -> None:
    # Many pairs of equal count, whose order must not hang on a hash map's.
    program = (
        "from xushi.tokenizer import Tokenizer; from itertools import product;"
        "words = [''.join(w) for w in product('abcdef', repeat=4)];"
        "print(Tokenizer.train([' '.join(words)] * 3, 330).hash)"
    )
    hashes = {
        subprocess.run(
            [sys.executable, "-c", program], check=True, capture_output=True, text=True
        ).stdout
        for _ in range(2)
    }
    assert len(hashes) == 1


def test_bytes_only_vocabulary_has_no_merges(bare: Tokenizer) -> None:
    assert bare.vocab_size == 263
    assert len(bare.encode("虚实 ab")) == len("虚实 ab".encode())


def test_vocabulary_that_text_does_not_allow_names_the_size_reached() -> None:
    with pytest.raises(
        XushiError, match=r"vocab_size=5000 is larger than the text allows: it gives 26\d"
    ) as caught:
        Tokenizer.train(["abab abab"], 5000)
    reached = int(caught.value.problem.rsplit(" ", 1)[1])
    assert Tokenizer.train(["abab abab"], reached).vocab_size == reached


def test_a_merge_occurs_at_least_twice() -> None:
    with pytest.raises(XushiError, match="it gives 263"):
        Tokenizer.train(["abcdefg"], 264)
    tokenizer = Tokenizer.train(["xyxy abc"], 264)
    assert tokenizer.token_bytes(263) == b"xy"


def test_vocabulary_smaller_than_the_bytes() -> None:
    with pytest.raises(XushiError, match="vocab_size=262 is less than 263"):
        Tokenizer.train(["a"], 262)
    with pytest.raises(XushiError, match="vocab_size=269 is less than 270"):
        Tokenizer.train(["a"], 269, tools=True)


def test_vocabularies_without_tools_stay_what_they_were(
    tokenizer: Tokenizer, bare: Tokenizer
) -> None:
    """Hashes from before there were tool tokens: the ids of existing models must not move."""
    assert tokenizer.hash == "72ffdb9d839656be8cf5f7ffaef9c9106313ab1308b0cc8ef2adeebe391dae2b"
    assert bare.hash == "ad26dc86e2f9b173e21e5fadc98b15d48eb56b60a6de04dfc0a1b0a4bf5b3c75"
    assert tokenizer.tool_ids is None


def test_tool_tokens_follow_the_first_seven(tokenizer: Tokenizer, with_tools: Tokenizer) -> None:
    assert with_tools.tool_ids == tuple(range(7, 14))
    names = [with_tools.decode([token]) for token in range(14)]
    assert tuple(names) == SPECIAL_TOKENS + TOOL_TOKENS
    assert with_tools.byte_lengths[:14].tolist() == [0] * 14
    assert [token for token in range(427) if with_tools.is_special(token)] == list(range(14))
    # Merges are the same, seven ids later.
    text = "def area(width): 天地玄黄 <think>"
    assert with_tools.encode(text) == [token + 7 for token in tokenizer.encode(text)]


def test_both_kinds_of_vocabulary_load(
    tokenizer: Tokenizer, with_tools: Tokenizer, tmp_path: Path
) -> None:
    for one in (tokenizer, with_tools):
        one.save(tmp_path)
        loaded = Tokenizer.load(tmp_path)
        assert (loaded.hash, loaded.tool_ids) == (one.hash, one.tool_ids)
    foreign = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    del foreign["added_tokens"][-1]
    (tmp_path / "tokenizer.json").write_text(json.dumps(foreign), encoding="utf-8")
    with pytest.raises(XushiError, match="special tokens are not xushi's"):
        Tokenizer.load(tmp_path)


def test_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(XushiError, match="lone surrogate at character 1"):
        tokenizer.encode("a\ud800")
    with pytest.raises(XushiError, match="lone surrogate"):
        Tokenizer.train(["\udfff"], 263)


def test_decode_shows_or_skips_special_tokens(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.bos_id, *tokenizer.encode("a"), tokenizer.think_id, tokenizer.eos_id]
    assert tokenizer.decode(ids) == "<｜begin▁of▁sentence｜>a<think><｜end▁of▁sentence｜>"
    assert tokenizer.decode(ids, skip_special=True) == "a"


def test_tool_tokens_are_never_hidden(with_tools: Tokenizer) -> None:
    ids = [with_tools.eos_id, with_tools.tool_ids.separator, *with_tools.encode("a")]
    assert with_tools.decode(ids, skip_special=True) == "<｜tool▁sep｜>a"


def test_special_ids(tokenizer: Tokenizer) -> None:
    assert [
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.pad_id,
        tokenizer.user_id,
        tokenizer.assistant_id,
        tokenizer.think_id,
        tokenizer.end_think_id,
    ] == list(range(7))
    assert tokenizer.byte_lengths[:7].tolist() == [0] * 7 and tokenizer.token_bytes(0) == b""


def test_saved_and_loaded_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "t")
    loaded = Tokenizer.load(tmp_path / "t")
    assert loaded.hash == tokenizer.hash == sha256_file(tmp_path / "t" / "tokenizer.json")
    assert loaded.encode("def f(): return '天地'<think>") == tokenizer.encode(
        "def f(): return '天地'<think>"
    )


def test_missing_and_damaged_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(XushiError, match=r"tokenizer\.json does not exist"):
        Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole[:-100], encoding="utf-8")
    with pytest.raises(XushiError, match=r"tokenizer\.json is damaged"):
        Tokenizer.load(tmp_path)
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(XushiError, match=r"tokenizer\.json is damaged"):
        Tokenizer.load(tmp_path)
    path.write_bytes(b"\xff")
    with pytest.raises(XushiError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.load(tmp_path)
    foreign = json.loads(whole)
    foreign["added_tokens"][5]["special"] = False
    path.write_text(json.dumps(foreign), encoding="utf-8")
    with pytest.raises(XushiError, match="special tokens are not xushi's"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("with_model", [False, True])
def test_transformers_gives_the_same_ids(
    tokenizer: Tokenizer, tmp_path: Path, with_model: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    if (
        with_model
    ):  # as in an export, where the model's type could lead transformers to another tokenizer class
        (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3", "vocab_size": 420}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
    assert len(theirs) == tokenizer.vocab_size

    @settings(max_examples=80, deadline=None)
    @given(text=MIXED)
    def same(text: str) -> None:
        ids = tokenizer.encode(text)
        assert theirs.encode(text, split_special_tokens=True) == ids
        assert theirs.decode(ids) == text
        if not any(token in text for token in SPECIAL_TOKENS):
            assert theirs.encode(text) == ids

    same()


def test_a_reply_begins_with_reasoning_unless_its_message_has_closed_it(
    with_tools: Tokenizer,
) -> None:
    messages = [Message("user", "a"), Message("assistant", "b", "r")]
    prompt = encode_chat(with_tools, messages[:1])
    answered = encode_chat(with_tools, messages, generation_prompt=False)
    after_tool = encode_chat(with_tools, [*messages, Message("tool", "2")])
    for ids, wanted in [
        ([], "reasoning"),
        (prompt, "reasoning"),
        ([*prompt, with_tools.think_id, 40], "reasoning"),
        (answered[:-1], "content"),
        (after_tool, "reasoning"),
        (encode_chat(with_tools, [*messages, *messages[:1]]), "reasoning"),
    ]:
        assert with_tools.reply_begins(ids) == wanted
