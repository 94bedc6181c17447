"""The `logprobs` objects of choices. Not here: the other objects of a response (responses)."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xushi.engine import Alternatives, PromptScores
from xushi.tokenizer import Vocabulary


@dataclass(frozen=True, slots=True)
class Scored:
    """A token, its natural log-probability at temperature 1, and the most probable tokens of its
    place. The first token of a prompt has neither.
    """

    token: int
    logprob: float | None = None
    top: Alternatives | None = None


def scored_prompt(ids: Sequence[int], scores: PromptScores) -> list[Scored]:
    """All tokens of a prompt."""
    rest = zip(ids[1:], scores.logprobs, scores.top_logprobs, strict=True)
    return [Scored(ids[0]), *(Scored(*each) for each in rest)]


def chat_logprobs(tokens: Sequence[Scored], tokenizer: Vocabulary) -> dict[str, Any]:
    """The `logprobs` of a chat choice: of the answer's tokens."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        spelled = tokenizer.token_bytes(token)
        return {
            "token": spelled.decode("utf-8", "replace"),
            "logprob": logprob,
            "bytes": list(spelled),
        }

    content = [
        {
            **entry(scored.token, scored.logprob),
            "top_logprobs": [entry(token, logprob) for token, logprob in scored.top or []],
        }
        for scored in tokens
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """The `logprobs` of a completion choice, whose tokens may come in several parts.

    With `alternatives` each place but a prompt's first names the most probable tokens and its own.
    A token whose bytes are not UTF-8 by themselves is written as `bytes:` and its bytes in
    hexadecimal, so that different tokens have different names.
    """

    def __init__(self, tokenizer: Vocabulary, alternatives: bool) -> None:
        self._tokenizer = tokenizer
        self._alternatives = alternatives
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._characters = 0

    def of(self, tokens: Sequence[Scored]) -> dict[str, Any]:
        """The object for the next tokens. `text_offset` is the number of whole characters that the
        choice's tokens have given before each.
        """
        return {
            "tokens": [self._name(scored.token) for scored in tokens],
            "token_logprobs": [scored.logprob for scored in tokens],
            "top_logprobs": [self._top(each) for each in tokens] if self._alternatives else None,
            "text_offset": [self._place(scored.token) for scored in tokens],
        }

    def _name(self, token: int) -> str:
        spelled = self._tokenizer.spelling(token)
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)

    def _top(self, scored: Scored) -> dict[str, float] | None:
        if scored.top is None or scored.logprob is None:
            return None
        named = {self._name(token): logprob for token, logprob in scored.top}
        return {**named, self._name(scored.token): scored.logprob}

    def _place(self, token: int) -> int:
        before = self._characters
        spelled = self._tokenizer.spelling(token, skip_special=True)
        self._characters += len(self._decoder.decode(spelled))
        return before
