"""From sampled ids to text as it arrives: whole characters, reasoning apart from content, tool
calls, and stop strings.

Not here: the form of a conversation (tokenizer).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from xushi.base.messages import ToolCall
from xushi.tokenizer import StreamDecoder, Vocabulary, parse_tool_calls

Channel = Literal["reasoning", "content"]


@dataclass(frozen=True, slots=True)
class Delta:
    """The next characters of a text, never empty, and whether they are reasoning or content."""

    channel: Channel
    text: str


class StopFinder:
    """Passes text on up to the first stop string; holds back an end that may become one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that cannot belong to a stop string any more."""
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
        """The end of the text: what was held back is no stop string."""
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

    With `chat`, the reply to a conversation is reasoning up to the first `</think>` and content
    after it. It begins where `prompt_ids` say (`Vocabulary.reply_begins`). Without `chat` all text
    is content.

    With `calls`, tool calls are set apart once the request has ended, as `parse_assistant` reads
    them, and a malformed call is content, which comes with `flush`; without it the text of a call
    is content. Stop strings are looked for in the content only. Once one is found `stopped` is
    True, and the caller should end the request.
    """

    def __init__(
        self,
        tokenizer: Vocabulary,
        stop: Sequence[str] = (),
        chat: bool = False,
        calls: bool = False,
        prompt_ids: Sequence[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer, skip_special=True)
        self._finder = StopFinder(stop)
        self._calls_begin = tokenizer.tool_ids.calls_begin if calls and tokenizer.tool_ids else None
        self._call_ids: list[int] = []  # from the beginning of a block of calls on
        self.channel: Channel = "content"
        begins = tokenizer.reply_begins(prompt_ids) if chat else "content"
        if begins == "reasoning":
            self.channel = "reasoning"
        self._may_open = begins == "either"
        self.thought = False  # whether there is any reasoning, even if it is empty
        self.reasoning_tokens = 0
        self.tool_calls: tuple[ToolCall, ...] = ()

    @property
    def stopped(self) -> bool:
        """Whether a stop string has been found."""
        return self._finder.found

    def push(self, token: int) -> list[Delta]:
        """The text that this token completes: often none; with `</think>` the last reasoning."""
        if self._may_open and token == self._tokenizer.think_id:
            self.channel = "reasoning"
        self._may_open = False
        if self.channel == "content":
            if self._call_ids or token == self._calls_begin:
                self._call_ids.append(token)
                return []
            return self._content(token)
        self.reasoning_tokens += 1
        if token == self._tokenizer.think_id:
            self.thought = True
            return []
        if token != self._tokenizer.end_think_id:
            return self._reasoning(self._decoder.push(token))
        rest = self._decoder.flush()
        self.channel = "content"
        return self._reasoning(rest)

    def flush(self) -> list[Delta]:
        """The end of the request: the text that was held back."""
        if self.channel == "reasoning":
            return self._reasoning(self._decoder.flush())
        deltas = []
        ids = [token for token in self._call_ids if token not in self._tokenizer.eos_ids]
        calls = parse_tool_calls(self._tokenizer, ids)
        if calls is None:
            deltas = [delta for token in ids for delta in self._content(token)]
        else:
            self.tool_calls = calls
        rest = self._finder.push(self._decoder.flush()) + self._finder.flush()
        return deltas + _deltas("content", rest)

    def _content(self, token: int) -> list[Delta]:
        return _deltas("content", self._finder.push(self._decoder.push(token)))

    def _reasoning(self, text: str) -> list[Delta]:
        self.thought |= bool(text)
        return _deltas("reasoning", text)


def _deltas(channel: Channel, text: str) -> list[Delta]:
    return [Delta(channel, text)] if text else []
