"""Numbers as written: sensible digits, and never rounded into a claim."""

import html
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xushi.report.numbers import count, digits, duration, escape, memory, percent, raw, size


def _plain(text: str) -> str:
    return text.replace("\u202f", " ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (digits(1.52134), "1.52"),
        (digits(0.0), "0"),
        (digits(18432.7), "18 433"),
        (digits(2.86e-6), "2.86e−6"),
        (digits(-0.5), "−0.500"),
        (count(620), "620"),
        (count(4096), "4 096"),
        (count(5079040), "5.08 M"),
        (count(999_999), "1.00 M"),
        (size(24113408), "24.1 MB"),
        (size(512), "512 B"),
        (memory(2104819712), "1.96 GiB"),
        (duration(0.42), "0.42 s"),
        (duration(59.7), "1 min 00 s"),
        (duration(517.4), "8 min 37 s"),
        (duration(3599.8), "1 h 00 min"),
        (duration(9.97), "10 s"),
        (raw(True), "true"),
        (raw("a"), "a"),
        (raw(0.1), "0.1"),
        (raw(math.nan), "NaN"),
    ],
)
def test_written(text: str, expected: str) -> None:
    assert _plain(text) == expected


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0.0853, "8.5 %"),
        (1.0, "100 %"),
        (0.0, "0 %"),
        (0.9997, "99.97 %"),
        (0.99996, "99.996 %"),
        (0.0001, "0.01 %"),
        (0.5, "50 %"),
        (-0.041, "−4.1 %"),
        (math.nan, "not finite"),
    ],
)
def test_percent_never_claims_all_or_none(share: float, expected: str) -> None:
    assert _plain(percent(share)) == expected


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_every_float_can_be_written(value: float) -> None:
    for write in (digits, count, size, memory, percent, duration):
        assert write(value)


@given(st.text(st.characters()))
def test_escaped_text_is_text(text: str) -> None:
    escaped = escape(text)
    escaped.encode("utf-8")
    assert not set("<>\"'") & set(escaped)
    kept = "".join(character for character in html.unescape(escaped) if character != "\ufffd")
    assert set(kept) <= set(text)


def test_lone_surrogates_and_control_characters_are_replaced() -> None:
    assert escape("a\ud800b\x00c\x1bd\n\te") == "a\ufffdb\ufffdc\ufffdd\n\te"
