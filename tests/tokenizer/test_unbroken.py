"""Windows give the ids of the whole text, whatever the text and wherever they end."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xushi.tokenizer import Tokenizer
from xushi.tokenizer.unbroken import UnbrokenText, _Window

# Runs that one pre-token can be made of, and characters at which a pre-token ends in its own way.
KINDS = [
    "ACGT", "a", "ab", "abc", "aé.", " ", "\n", " \n", "!", "!\n", "! \n", "天地玄黄", "\0", "\0a",
    " a", "\u0301a", "!?。é", "0a", " \u2028\t\r\n", "aé。 \n1天\0", "👨\u200d👩",
]  # fmt: skip
RUNS = st.one_of(
    st.builds(lambda kind, times: kind * times, st.sampled_from(KINDS), st.integers(1, 40)),
    st.sampled_from(KINDS).flatmap(lambda kind: st.text(kind, max_size=120)),
)


@pytest.fixture(scope="module")
def wide() -> Tokenizer:
    """With long tokens of every kind of run, so that they lie across many places to cut."""
    random_runs = random.Random(5)
    text = ["".join(random_runs.choices(kind, k=160)) + kind * 9 for kind in KINDS]
    return Tokenizer.train(text + text, 900)


@settings(max_examples=250, deadline=None)
@given(
    text=st.lists(RUNS, max_size=6).map("".join),
    window=st.sampled_from([4, 10, 30, 80]),
    overlap=st.sampled_from([1, 4, 20]),
)
def test_windows_give_the_ids_of_the_whole(
    wide: Tokenizer, text: str, window: int, overlap: int
) -> None:
    whole = wide._backend.encode(text, add_special_tokens=False).ids
    assert UnbrokenText(wide._backend, wide.byte_lengths, window, overlap).encode(text) == whole


@pytest.mark.parametrize("kind", ["ACGT", "a", "abc", "天地玄黄", "!", "\0", "\u0301a", "é"])
def test_one_pre_token_is_read_in_windows_of_bounded_length(wide: Tokenizer, kind: str) -> None:
    """The longest text that the library is given does not grow with the pre-token."""
    text = "".join(random.Random(7).choices(kind, k=6000))
    given = _Counting(wide)
    ids = UnbrokenText(given, wide.byte_lengths, window=500, overlap=300).encode(text)
    assert ids == wide._backend.encode(text, add_special_tokens=False).ids
    assert max(given.lengths) <= 1100  # a window that was doubled once, and what leads into it
    assert sum(given.lengths) <= 6 * len(text)


@pytest.mark.parametrize("head", [".", "\0", " ", " !", "\t"])
def test_a_pre_token_keeps_its_kind_from_window_to_window(wide: Tokenizer, head: str) -> None:
    """`.abc` ends before é, where a word goes on; the windows in the middle begin with a letter."""
    text = head + "ab" * 200 + "é" * 200 + "!" * 200 + "\n" * 9 + "  x"
    whole = wide._backend.encode(text, add_special_tokens=False).ids
    assert UnbrokenText(wide._backend, wide.byte_lengths, 90, 40).encode(text) == whole


class _Counting:
    """A backend that notes the length of each text that it encodes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._backend = tokenizer._backend
        self.lengths: list[int] = []

    def encode(self, text: str, add_special_tokens: bool) -> object:
        self.lengths.append(len(text))
        return self._backend.encode(text, add_special_tokens=add_special_tokens)


def test_windows_are_joined_behind_the_last_token_that_both_have_of_the_text() -> None:
    window = _Window(0, "abcdefgh", [1, 2, 3, 4], [2, 4, 6, 8], False)
    # Two tokens lead into the second window, which begins at e. The latter is as long as cd is.
    same = _Window(4, "efghij", [7, 8, 3, 4, 5], [-2, 0, 2, 4, 6], False)
    assert window.shared_with(same, 0) == (4, 4)
    assert window.shared_with(same, 3) == (4, 4)
    assert window.shared_with(same, 4) is None
    other = _Window(4, "efghij", [7, 8, 9, 5], [-2, 0, 3, 6], False)
    assert window.shared_with(other, 0) is None
    bytes_count = _Window(1, "éx", [5, 6], [2, 3], False)
    assert _Window(0, "aéx", [4, 5, 6], [1, 3, 4], False).shared_with(bytes_count, 0) == (3, 2)


def test_two_characters_lead_into_a_window() -> None:
    """Line ends belong to the marks before them; after a space alone they would be white space,
    which goes on behind them.
    """
    tokenizer = Tokenizer.train(
        ["\n  \n  \n   \n" * 100], 266
    )  # no token has two line feeds in a row
    text = " " + "!" * 100 + "\n" * 100 + "  \n \n x"
    whole = tokenizer._backend.encode(text, add_special_tokens=False).ids
    for window in range(30, 90, 7):
        unbroken = UnbrokenText(tokenizer._backend, tokenizer.byte_lengths, window, 12)
        assert unbroken.encode(text) == whole


@pytest.mark.parametrize("run", [" ", "a"])
def test_a_window_that_grew_is_small_again(wide: Tokenizer, run: str) -> None:
    text = "x\n" + run * 3000 + "\n" + "word, " * 500
    given = _Counting(wide)
    ids = UnbrokenText(given, wide.byte_lengths, window=100, overlap=200).encode(text)
    assert ids == wide._backend.encode(text, add_special_tokens=False).ids
    assert max(given.lengths) > 200
    assert max(given.lengths[-10:]) == 100
