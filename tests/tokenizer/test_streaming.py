"""The streaming decoder gives the whole decoding, and never a half character."""

from hypothesis import given, settings
from hypothesis import strategies as st

from xushi.tokenizer import StreamDecoder, Tokenizer


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 262), max_size=30), skip=st.booleans())
def test_joined_pieces_are_the_decoding(bare: Tokenizer, ids: list[int], skip: bool) -> None:
    stream = StreamDecoder(bare, skip_special=skip)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.flush() == bare.decode(ids, skip_special=skip)


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="�"), max_size=30))
def test_text_comes_in_whole_characters(bare: Tokenizer, text: str) -> None:
    stream = StreamDecoder(bare)
    pieces = [stream.push(token) for token in bare.encode(text)]
    assert "�" not in "".join(pieces)
    assert "".join(pieces) == text
    assert stream.flush() == ""


def test_character_comes_with_its_last_byte(bare: Tokenizer) -> None:
    stream = StreamDecoder(bare)
    assert [stream.push(token) for token in bare.encode("虚a")] == ["", "", "虚", "a"]
