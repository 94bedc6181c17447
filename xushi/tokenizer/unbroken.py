"""Ids of a text of any length whose lines are too long to be encoded whole, in bounded memory.

The library needs dozens of bytes of memory per byte of what it encodes at once, and more time per
byte for a longer pre-token (a part that the pre-tokenizer cuts out). So the text is encoded in
windows. The ids equal those of the whole text.

Where a window ends inside a pre-token, the pre-token is encoded again in the next window. Where one
pre-token is longer than a window, neighbouring windows overlap, and are joined behind a token that
both have at the same place. That is exact: a sequence of tokens is what BPE makes of its text if
and only if every two neighbours are what BPE makes of their text, because the first merge across a
border between two tokens would also happen between these two alone. Where windows share no token,
or a run of white space is longer than a window, the window grows.

Not here: how ordinary text is cut into chunks (tokenizer).
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import tokenizers


@dataclass(frozen=True)
class UnbrokenText:
    """A tokenizer, the bytes of each of its tokens (int64 [V]), the characters of a window, and the
    bytes by which windows of one pre-token overlap.
    """

    backend: "tokenizers.Tokenizer"
    byte_lengths: npt.NDArray[np.int64]
    window: int
    overlap: int

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without special tokens."""
        ids: list[int] = []
        start = 0
        size = self.window
        while True:
            part = text[start : start + size]
            encoding = self.backend.encode(part, add_special_tokens=False)
            if start + size >= len(text):
                return ids + encoding.ids
            tokens, characters = _certain(encoding, part)
            if tokens:
                ids += encoding.ids[:tokens]
                start += characters
                size = self.window
                continue
            pre_token = None if part[-1].isspace() else self._pre_token(text, start, size)
            if pre_token is None:
                size *= 2
                continue
            ids += pre_token[0]
            start = pre_token[1]
            size = self.window

    def _pre_token(self, text: str, start: int, size: int) -> tuple[list[int], int] | None:
        """Ids of the pre-token that begins at `start` and is longer than `size` characters, and its
        end; None if two windows share no token.
        """
        window = self._window("", text, start, size)
        lead = ""
        done = 0  # tokens of `window` that are in `ids`
        ids: list[int] = []
        while not window.ended:
            borders = window.character_borders()
            if not lead:
                # Two characters tell the pre-tokenizer which kind of pre-token it is in. Whole
                # tokens leave repeated text in the same phase.
                lead = next((text[start : start + k] for k, _ in borders if k >= 2), "")
            most = window.byte_ends[-1] - self.overlap
            place = max((k for k, end in borders if end <= most), default=0)
            if not lead or place == 0:
                return None
            following = self._window(lead, text, window.start + place, size)
            joint = window.shared_with(following, done)
            if joint is None:
                return None
            ids += window.ids[done : joint[0]]
            window, done = following, joint[1]
        return ids + window.ids[done:], window.start + len(window.text)

    def _window(self, lead: str, text: str, start: int, size: int) -> "_Window":
        """At most `size` characters of a pre-token from `start` on, encoded behind `lead`."""
        part = text[start : start + size]
        encoding = self.backend.encode(lead + part, add_special_tokens=False)
        words = encoding.word_ids
        tokens = next((i for i, word in enumerate(words) if word != 0), len(words))
        ids = encoding.ids[:tokens]
        ended = tokens < len(words) or start + size >= len(text)
        before = len(lead.encode())
        byte_ends = [end - before for end in accumulate(self.byte_lengths[ids].tolist())]
        end = encoding.offsets[tokens - 1][1] - len(lead)
        return _Window(start, part[:end], ids, byte_ends, ended)


@dataclass(frozen=True)
class _Window:
    """`text`, a part of a pre-token, begins at character `start` of the whole text. `byte_ends`:
    where each token ends, in bytes from there; at most 0 for tokens before it. `ended`: whether the
    pre-token ends in it.
    """

    start: int
    text: str
    ids: list[int]
    byte_ends: list[int]
    ended: bool

    def character_borders(self) -> list[tuple[int, int]]:
        """(characters, bytes) before each end of a token that is the end of a character too."""
        data = np.frombuffer(self.text.encode(), dtype=np.uint8)
        starts = np.append(np.flatnonzero(data & 0xC0 != 0x80), len(data))
        ends = np.array([end for end in self.byte_ends if end > 0], dtype=np.int64)
        places = np.searchsorted(starts, ends)
        whole = starts[places] == ends
        return list(zip(places[whole].tolist(), ends[whole].tolist(), strict=True))

    def shared_with(self, following: "_Window", done: int) -> tuple[int, int] | None:
        """The numbers of tokens of both windows through the last token that they have at the same
        place; None without one from token `done` on.
        """
        shift = len(self.text[: following.start - self.start].encode())
        spans = {
            (first - shift, end - shift): number
            for number, (first, end) in enumerate(pairwise(self.byte_ends), 2)
            if number > done
        }
        there = enumerate(pairwise(following.byte_ends), 2)
        for number, span in reversed(list(there)):
            if span in spans and span[0] >= 0:
                return spans[span], number
        return None


def _certain(encoding: "tokenizers.Encoding", part: str) -> tuple[int, int]:
    """How many tokens and characters of a window lie before what may go on behind it: the last
    pre-token, and white space at the end, which line ends that follow would join.
    """
    words = encoding.word_ids
    tokens = words.index(words[-1])
    end = encoding.offsets[tokens][0]
    while tokens and part[end:].isspace():
        first = words.index(words[tokens - 1])
        start = encoding.offsets[first][0]
        if not part[start:end].isspace():
            break
        tokens, end = first, start
    return tokens, end
