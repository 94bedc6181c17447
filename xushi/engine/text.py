"""From sampled ids to text as it arrives: whole characters, reasoning apart from the answer, and
stop strings.

Not here: how a conversation is laid out (tokenizer).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from xushi.tokenizer import StreamDecoder, Tokenizer

Channel = Literal["reasoning", "content"]


@dataclass(frozen=True, slots=True)
class Delta:
    """The next piece of text, never empty, and whether it is reasoning or answer."""

    channel: Channel
    text: str


class StopFinder:
    """Passes text on up to the first stop string, holding back an end that may become one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that is now sure not to belong to a stop string."""
        if self.found or not self._stop:
            return "" if self.found else text
        self._held += text
        places = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            return self._held[: min(places)]
        keep = max(_overlap(self._held, stop) for stop in self._stop)
        sure = self._held[: len(self._held) - keep]
        self._held = self._held[len(sure) :]
        return sure

    def flush(self) -> str:
        """The end: what was held back is text after all."""
        held, self._held = ("" if self.found else self._held), ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`."""
    return next(
        (
            size
            for size in range(min(len(stop) - 1, len(text)), 0, -1)
            if text.endswith(stop[:size])
        ),
        0,
    )


class TextStream:
    """The text of one request, token by token.

    With `chat`, everything before the first `</think>` is reasoning and what follows is the answer,
    as `Tokenizer.parse_assistant` has it; otherwise all is content. Special tokens give no text.
    Stop strings are looked for in the content only; once one is found `stopped` is True and the
    request should be ended.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), chat: bool = False) -> None:
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer, skip_special=True)
        self._finder = StopFinder(stop)
        self.channel: Channel = "reasoning" if chat else "content"
        self.thought = False  # whether there is any reasoning, be it empty
        self.reasoning_tokens = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string has been found."""
        return self._finder.found

    def push(self, token: int) -> list[Delta]:
        """The text that this token completes: none, one piece, or the end of the reasoning."""
        if self.channel == "content":
            return _deltas("content", self._finder.push(self._decoder.push(token)))
        self.reasoning_tokens += 1
        if token != self._tokenizer.end_think_id:
            self.thought |= token == self._tokenizer.think_id
            return self._reasoning(self._decoder.push(token))
        rest = self._decoder.flush()
        self.channel = "content"
        return self._reasoning(rest)

    def flush(self) -> list[Delta]:
        """The end of the request: what was held back."""
        rest = self._decoder.flush()
        if self.channel == "reasoning":
            return self._reasoning(rest)
        return _deltas("content", self._finder.push(rest) + self._finder.flush())

    def _reasoning(self, text: str) -> list[Delta]:
        self.thought |= bool(text)
        return _deltas("reasoning", text)


def _deltas(channel: Channel, text: str) -> list[Delta]:
    return [Delta(channel, text)] if text else []
