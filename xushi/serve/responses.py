"""Turn the events of a job into a response: one JSON object, or a stream of server-sent events.

Not here: connections (app), usage and log-probability objects (protocol).
"""

import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

from xushi.serve.protocol import ApiError, chat_logprobs, completion_logprobs, usage
from xushi.serve.worker import Event, Failure, Job
from xushi.tokenizer import Vocabulary

DONE = b"data: [DONE]\n\n"


@dataclass(slots=True)
class Counts:
    """Token counts of one response so far."""

    prompt: int
    completion: int = 0
    reasoning: int = 0

    def add(self, event: Event) -> None:
        """Count the token of an event."""
        self.completion += 1
        self.reasoning += event.is_reasoning


@dataclass(slots=True)
class _Choice:
    reasoning: str = ""
    content: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, event: Event, is_text: bool) -> None:
        """Append an event; `is_text` says whether its token belongs to the answer's text."""
        for delta in event.deltas:
            if delta.channel == "reasoning":
                self.reasoning += delta.text
            else:
                self.content += delta.text
        if is_text:
            self.tokens.append(event.token)
            self.logprobs.append(event.logprob)
        self.finish_reason = event.finish_reason


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """What the client asked for, and the fields that all objects of one response share.

    `created` is in seconds since 1970. `include_usage` concerns streams only.
    """

    identity: str
    created: int
    model: str
    chat: bool
    wants_logprobs: bool
    include_usage: bool
    tokenizer: Vocabulary

    async def whole(self, job: Job, counts: Counts) -> dict[str, Any]:
        """Wait until the job has ended and return the response as one object."""
        choices = [_Choice() for _ in range(job.choices)]
        async for event in _events(job):
            counts.add(event)
            choices[event.choice].add(event, self._is_text(event))
        return {
            **self._head("chat.completion" if self.chat else "text_completion"),
            "choices": [self._choice(index, choice) for index, choice in enumerate(choices)],
            "usage": self._usage(counts),
        }

    async def stream(self, job: Job, counts: Counts) -> AsyncIterator[bytes]:
        """The response as server-sent events. A failure becomes an error object and ends it."""
        # For each choice: characters of the tokens whose log-probabilities have been sent.
        offsets = [0] * job.choices
        if self.chat:
            for index in range(job.choices):
                yield self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None)
        try:
            async for event in _events(job):
                counts.add(event)
                for chunk in self._chunks(event, offsets):
                    yield chunk
        except ApiError as error:
            yield _sse(error.body)
            return
        if self.include_usage:
            yield _sse(
                {**self._head(self._chunk_object), "choices": [], "usage": self._usage(counts)}
            )
        yield DONE

    def _chunks(self, event: Event, offsets: list[int]) -> Iterator[bytes]:
        """The chunks of one event: one for each delta, and one that ends the choice.

        The first chunk also has the token's log-probability.
        """
        logprobs = None
        if self.wants_logprobs and self._is_text(event):
            logprobs = self._logprobs([event.token], [event.logprob], offsets[event.choice])
            offsets[event.choice] += len(
                self.tokenizer.token_bytes(event.token).decode("utf-8", "replace")
            )
        bodies = [
            {"delta": {"reasoning_content" if d.channel == "reasoning" else "content": d.text}}
            if self.chat
            else {"text": d.text}
            for d in event.deltas
        ]
        empty: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
        if logprobs and not bodies:
            # The text comes later: it is half a character, or may become a stop string.
            bodies = [empty]
        for number, body in enumerate(bodies):
            yield self._chunk(
                event.choice, {**body, "logprobs": None if number else logprobs}, None
            )
        if event.finish_reason is not None:
            yield self._chunk(event.choice, {**empty, "logprobs": None}, event.finish_reason)

    @property
    def _chunk_object(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _chunk(self, index: int, body: dict[str, Any], finish_reason: str | None) -> bytes:
        table = {
            **self._head(self._chunk_object),
            "choices": [{"index": index, "logprobs": None, **body, "finish_reason": finish_reason}],
        }
        if self.include_usage:
            table["usage"] = None
        return _sse(table)

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.identity, "object": kind, "created": self.created, "model": self.model}

    def _choice(self, index: int, choice: _Choice) -> dict[str, Any]:
        logprobs = (
            self._logprobs(choice.tokens, choice.logprobs, 0) if self.wants_logprobs else None
        )
        text: dict[str, Any] = {"text": choice.content}
        if self.chat:
            text = {
                "message": {
                    "role": "assistant",
                    "content": choice.content,
                    "reasoning_content": choice.reasoning or None,
                }
            }
        return {"index": index, **text, "logprobs": logprobs, "finish_reason": choice.finish_reason}

    def _logprobs(self, tokens: list[int], logprobs: list[float], offset: int) -> dict[str, Any]:
        spell = self.tokenizer.token_bytes
        if self.chat:
            return chat_logprobs(tokens, logprobs, spell)
        return completion_logprobs(tokens, logprobs, spell, offset)

    def _is_text(self, event: Event) -> bool:
        return not event.is_reasoning and bool(self.tokenizer.token_bytes(event.token))

    def _usage(self, counts: Counts) -> dict[str, Any]:
        return usage(counts.prompt, counts.completion, counts.reasoning if self.chat else None)


async def _events(job: Job) -> AsyncIterator[Event]:
    """The events of a job until all its choices have ended. A failure raises an `ApiError`."""
    left = job.choices
    while left:
        event = await job.events.get()
        if isinstance(event, Failure):
            raise ApiError(
                503 if event.is_shutdown else 500,
                event.message,
                code="shutting_down" if event.is_shutdown else "engine_failed",
            )
        left -= event.finish_reason is not None
        yield event


def _sse(table: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(table, separators=(",", ":")).encode() + b"\n\n"
