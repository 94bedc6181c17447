"""What a user's own text asks of the program: lines of any length, near-copies, many files."""

import random
from collections.abc import Iterable
from typing import Any

import pytest
import tokenizers

from xushi.tokenizer import Tokenizer
from xushi.tokenizer import tokenizer as tokenizer_module

UNBROKEN = {
    "han": "".join(map(chr, range(0x4E00, 0x4E00 + 400))),
    "dna": "ACGT",
    "cyrillic": "абвгдежзиклмн",
    "rulers": "=-#*",
    "minified": "abcdefg.(){};=,",
    "digits": "0123456789",
    "nothing": "\0\x01",
    "spaces": " ",
}


def unbroken(kind: str, length: int) -> str:
    return "".join(random.Random(3).choices(UNBROKEN[kind], k=length))


@pytest.mark.parametrize("kind", UNBROKEN)
def test_the_trainer_sees_short_pre_tokens_of_short_texts(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its time grows with the square of a pre-token, and its memory with the longest text."""
    texts: list[str] = []
    pre_tokens: list[int] = []
    train = tokenizers.Tokenizer.train_from_iterator

    def watched(self: tokenizers.Tokenizer, given: Iterable[str], trainer: Any) -> None:
        texts.extend(given)
        for text in texts:
            found = self.pre_tokenizer.pre_tokenize_str(text)
            pre_tokens.extend(end - start for _, (start, end) in found)
        train(self, texts, trainer=trainer)

    monkeypatch.setattr(tokenizers.Tokenizer, "train_from_iterator", watched)
    monkeypatch.setattr(tokenizer_module, "_CHUNK_CHARACTERS", 3000)
    text = unbroken(kind, 20_000)
    tokenizer = Tokenizer.train([text], 263)
    assert "".join(texts) == text
    assert max(map(len, texts)) <= 6000
    assert max(pre_tokens) <= 256
    # What is saved has no such blocks, since other programs know the pre-tokenizer by its name.
    assert "256" not in tokenizer._backend.to_str().split('"model"')[0]


@pytest.mark.parametrize("kind", UNBROKEN)
def test_the_library_is_never_given_a_long_text(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of twenty chunks, which is one pre-token for all kinds but digits and minified code."""
    tokenizer = Tokenizer.train([unbroken(each, 2000) for each in UNBROKEN], 400)
    text = unbroken(kind, 60_000) + "\nand on"
    whole = tokenizer._backend.encode(text, add_special_tokens=False).ids
    given = _Watched(tokenizer._backend)
    monkeypatch.setattr(tokenizer_module, "_CHUNK_CHARACTERS", 3000)
    monkeypatch.setattr(tokenizer, "_backend", given)
    assert tokenizer.encode(text) == whole
    if kind != "spaces":  # a run of white space is read whole: its end decides where it is cut
        assert max(given.lengths) <= 6000
    assert sum(given.lengths) <= 3 * len(text)


class _Watched:
    """A backend that notes the length of each text that it encodes."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self.lengths: list[int] = []

    def encode(self, text: str, add_special_tokens: bool) -> tokenizers.Encoding:
        self.lengths.append(len(text))
        return self._backend.encode(text, add_special_tokens=add_special_tokens)

    def encode_batch_fast(
        self, texts: list[str], add_special_tokens: bool
    ) -> list[tokenizers.Encoding]:
        self.lengths.extend(map(len, texts))
        return self._backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
