"""The shared part of the held-out text equals what a search for every window finds."""

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xushi.data import overlap
from xushi.data.documents import make_document, write_documents
from xushi.data.overlap import WINDOW, heldout_overlap, normalised, shared_fraction


def searched(heldout: list[str], training: list[str]) -> float:
    """The same share by a search for every window in every training document."""
    trained = [normalised(text) for text in training]
    shared = total = 0
    for text in map(normalised, heldout):
        total += len(text.encode())
        if len(text) < WINDOW:
            shared += len(text.encode()) * (text in trained)
            continue
        covered = set()
        for start in range(len(text) - WINDOW + 1):
            if any(text[start : start + WINDOW] in other for other in trained):
                covered |= set(range(start, start + WINDOW))
        shared += sum(len(text[place].encode()) for place in covered)
    return shared / total if total else 0.0


PHRASES = [
    "the quick brown fox jumps over the lazy dog and runs ", "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往",
    "def area(width, height):\r\n    return width * height\n", "\ufeff", " \t\n", "x", "é😀 ",
]  # fmt: skip
TEXTS = st.lists(
    st.lists(st.sampled_from(PHRASES), max_size=7).map("".join), min_size=0, max_size=5
)


@settings(max_examples=150, deadline=None)
@given(heldout=TEXTS, training=TEXTS, block=st.sampled_from([7, 60, 1 << 20]))
def test_it_is_what_a_search_finds(heldout: list[str], training: list[str], block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap, "_BLOCK", block)
        assert shared_fraction(heldout, training) == searched(heldout, training)


def random_text(length: int, seed: int) -> str:
    return "".join(random.Random(seed).choices("abcdefgh é天\n", k=length))


def test_copies_with_other_white_space_are_shared() -> None:
    text = random_text(3000, 1)
    for copy in (
        text + "\n",
        text.replace("\n", "\r\n"),
        "\ufeff" + text,
        text.replace(" ", "\t "),
    ):
        assert shared_fraction([text], ["other", copy]) == 1.0
    assert shared_fraction([text], [text.upper()]) == 0.0
    assert shared_fraction([text], [random_text(3000, 2)]) == 0.0
    assert shared_fraction([], [text]) == shared_fraction(["\n"], [text]) == 0.0
    assert shared_fraction([text], []) == 0.0


def test_the_compared_form() -> None:
    assert normalised("\ufeff \n a\ufeffb\r\n\t  C ") == "ab C"
    assert normalised(" \ufeff ") == ""


@pytest.mark.parametrize("length", [WINDOW - 1, WINDOW, WINDOW + 1])
def test_a_text_of_about_a_window_is_shared_with_its_copy(length: int) -> None:
    text = "x" + "".join(random.Random(4).choices("abcdefgh", k=length - 1))
    assert shared_fraction([text], ["before", text + "\n"]) == 1.0
    # A text shorter than a window is compared whole.
    assert shared_fraction([text], [text + "y"]) == (length >= WINDOW)


def test_bytes_are_those_of_utf_8() -> None:
    text = "a\x7f\x80é\u07ff\u0800अ天\uffff😀"
    lengths = overlap._utf8_lengths(overlap._code_points(text))
    assert lengths.tolist() == [len(character.encode()) for character in text]


def test_what_is_shared_is_the_part_that_was_copied() -> None:
    letters = "".join(random.Random(3).choices("abcdefghijklmnop", k=2000))
    assert shared_fraction([letters], ["-" + letters[500:900] + "-"]) == 400 / 2000
    assert shared_fraction([letters], ["-" + letters[500 : 500 + WINDOW] + "-"]) == WINDOW / 2000
    assert shared_fraction([letters], ["-" + letters[500 : 499 + WINDOW] + "-"]) == 0.0
    # No window lies across two documents.
    assert shared_fraction([letters[:100]], [letters[:49], letters[49:98]]) == 0.0


def test_a_large_held_out_text_is_sampled_by_uid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [random_text(300, number) for number in range(20)]
    documents = [make_document("s", text, {"path": str(i)}) for i, text in enumerate(texts)]
    first = sorted(documents, key=lambda document: document.uid)[:4]
    write_documents(tmp_path, "heldout", documents)
    write_documents(tmp_path, "train", first[:2])
    assert 0.08 < heldout_overlap(tmp_path) < 0.12
    monkeypatch.setattr(overlap, "MOST_CHARACTERS", 1000)  # 300, 300, 300 and 100
    expected = shared_fraction(
        [*(document.text for document in first[:3]), first[3].text[:100]],
        [document.text for document in first[:2]],
    )
    assert heldout_overlap(tmp_path) == expected
    assert 0.55 < expected < 0.65
