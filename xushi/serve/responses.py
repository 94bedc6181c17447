"""Turn the events of a job into a response: one JSON object, or a stream of server-sent events.

Not here: connections (app), log-probability objects (logprobs).
"""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.concurrency import run_in_threadpool

from xushi.serve.logprobs import CompletionLogprobs, Scored, chat_logprobs, scored_prompt
from xushi.serve.protocol import ApiError
from xushi.serve.worker import Event, Failure, Job
from xushi.tokenizer import Vocabulary

DONE = b"data: [DONE]\n\n"
# A comment, which clients skip. Proxies end connections that are silent for a minute.
KEEP_ALIVE = b": keep-alive\n\n"
KEEP_ALIVE_SECONDS = 15.0


@dataclass(slots=True)
class Counts:
    """Token counts of one response so far."""

    prompt: int
    completion: int = 0
    reasoning: int = 0

    def add(self, event: Event) -> None:
        """Count the token of an event."""
        self.completion += event.token is not None
        self.reasoning += event.is_reasoning


@dataclass(slots=True)
class _Choice:
    """One choice so far. `begun`: an event of it has come."""

    logprobs: CompletionLogprobs
    begun: bool = False
    reasoning: str = ""
    content: str = ""
    tokens: list[Scored] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, event: Event) -> None:
        """Append the texts of an event."""
        for delta in event.deltas:
            if delta.channel == "reasoning":
                self.reasoning += delta.text
            else:
                self.content += delta.text
        self.finish_reason = event.finish_reason


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """What the client asked for, and the fields that all objects of one response share.

    `created` is in seconds since 1970. `alternatives` is how many the log-probabilities of a place
    name, None without log-probabilities. `echoes` has for each choice the prompt's text, and is
    empty if it is not asked for. `include_usage` and `usage_in_chunks` concern streams only.
    """

    identity: str
    created: int
    model: str
    chat: bool
    tokenizer: Vocabulary
    alternatives: int | None = None
    echoes: Sequence[str] = ()
    include_usage: bool = False
    usage_in_chunks: bool = False

    async def whole(self, job: Job, counts: Counts) -> dict[str, Any]:
        """Wait until the job has ended and return the response as one object."""
        events = [event async for event in _events(job) if event is not None]
        # A million log-probabilities take seconds, which other requests need not wait for.
        return await run_in_threadpool(self._table, job, events, counts)

    def _table(self, job: Job, events: Sequence[Event], counts: Counts) -> dict[str, Any]:
        """The response of all events of a job."""
        choices = self._new_choices(job)
        for event in events:
            counts.add(event)
            choice = choices[event.choice]
            choice.content += self._echo(choice, event)
            choice.tokens += self._scored(job, event)
            choice.add(event)
        return {
            **self._head("chat.completion" if self.chat else "text_completion"),
            "choices": [self._choice(index, choice) for index, choice in enumerate(choices)],
            "usage": self._usage(counts),
        }

    async def stream(self, job: Job, counts: Counts) -> AsyncIterator[bytes]:
        """The response as server-sent events. A failure becomes an error object and ends it."""
        choices = self._new_choices(job)
        if self.chat:
            for index in range(job.choices):
                body = {"delta": {"role": "assistant", "content": ""}}
                yield self._chunk(index, body, None, counts)
        try:
            async for event in _events(job):
                if event is None:
                    yield KEEP_ALIVE
                    continue
                counts.add(event)
                choice = choices[event.choice]
                if event.prompt is None:
                    chunks = self._chunks(job, event, choice, counts)
                else:  # as large as a whole response may be
                    chunks = await run_in_threadpool(self._chunks, job, event, choice, counts)
                for chunk in chunks:
                    yield chunk
        except ApiError as error:
            yield _sse(error.body)
            return
        if self.include_usage:
            yield _sse(
                {**self._head(self._chunk_object), "choices": [], "usage": self._usage(counts)}
            )
        yield DONE

    def _new_choices(self, job: Job) -> list[_Choice]:
        return [
            _Choice(CompletionLogprobs(self.tokenizer, bool(self.alternatives)))
            for _ in range(job.choices)
        ]

    def _chunks(self, job: Job, event: Event, choice: _Choice, counts: Counts) -> list[bytes]:
        """The chunks of one event: one for each delta, and one that ends the choice.

        The first chunk also has the log-probabilities.
        """
        texts = [("content", echo)] if (echo := self._echo(choice, event)) else []
        texts += [(delta.channel, delta.text) for delta in event.deltas]
        bodies = [self._text(channel, text) for channel, text in texts]
        logprobs = None
        if scored := self._scored(job, event):
            logprobs = self._logprobs(choice, scored)
            # The text comes later: it is half a character, or may become a stop string.
            bodies = bodies or [self._text(None, "")]
        chunks = []
        for number, body in enumerate(bodies):
            body["logprobs"] = None if number else logprobs
            chunks.append(self._chunk(event.choice, body, None, counts))
        if event.finish_reason is not None:
            end = self._text(None, "")
            chunks.append(self._chunk(event.choice, end, event.finish_reason, counts))
        return chunks

    @property
    def _chunk_object(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _chunk(
        self, index: int, body: dict[str, Any], finish_reason: str | None, counts: Counts
    ) -> bytes:
        table = {
            **self._head(self._chunk_object),
            "choices": [{"index": index, "logprobs": None, **body, "finish_reason": finish_reason}],
        }
        if self.usage_in_chunks:
            table["usage"] = self._usage(counts)
        elif self.include_usage:
            table["usage"] = None
        return _sse(table)

    def _text(self, channel: str | None, text: str) -> dict[str, Any]:
        """The text of a chunk. Without a channel a chat chunk has none."""
        if not self.chat:
            return {"text": text}
        if channel is None:
            return {"delta": {}}
        return {"delta": {"reasoning_content" if channel == "reasoning" else "content": text}}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.identity, "object": kind, "created": self.created, "model": self.model}

    def _choice(self, index: int, choice: _Choice) -> dict[str, Any]:
        text: dict[str, Any] = {"text": choice.content}
        if self.chat:
            text = {
                "message": {
                    "role": "assistant",
                    "content": choice.content,
                    "reasoning_content": choice.reasoning or None,
                }
            }
        logprobs = None if self.alternatives is None else self._logprobs(choice, choice.tokens)
        return {"index": index, **text, "logprobs": logprobs, "finish_reason": choice.finish_reason}

    def _echo(self, choice: _Choice, event: Event) -> str:
        """The prompt's text with the first event of a choice, if it is asked for."""
        if choice.begun or not self.echoes:
            return ""
        choice.begun = True
        return self.echoes[event.choice]

    def _scored(self, job: Job, event: Event) -> list[Scored]:
        """The tokens of an event that have log-probabilities, if they are asked for.

        In a chat those of the answer's text; otherwise all, since a client that sums them wants
        the probability of the end too.
        """
        if self.alternatives is None:
            return []
        tokens = []
        if event.prompt is not None:
            tokens = scored_prompt(job.prompt_of(event.choice), event.prompt)
        if event.token is not None and not (
            self.chat and (event.is_reasoning or not self.tokenizer.token_bytes(event.token))
        ):
            tokens.append(Scored(event.token, event.logprob, event.top))
        return tokens

    def _logprobs(self, choice: _Choice, tokens: list[Scored]) -> dict[str, Any]:
        if self.chat:
            return chat_logprobs(tokens, self.tokenizer)
        return choice.logprobs.of(tokens)

    def _usage(self, counts: Counts) -> dict[str, Any]:
        """The `usage` object. Reasoning tokens (chat only) are also completion tokens."""
        table: dict[str, Any] = {
            "prompt_tokens": counts.prompt,
            "completion_tokens": counts.completion,
            "total_tokens": counts.prompt + counts.completion,
        }
        if self.chat:
            table["completion_tokens_details"] = {"reasoning_tokens": counts.reasoning}
        return table


async def _events(job: Job) -> AsyncIterator[Event | None]:
    """The events of a job until all its choices have ended, and None after each time in which none
    came. A failure raises an `ApiError`.
    """
    left = job.choices
    while left:
        try:
            async with asyncio.timeout(KEEP_ALIVE_SECONDS):
                event = await job.events.get()
        except TimeoutError:
            yield None
            continue
        if isinstance(event, Failure):
            raise ApiError(
                503 if event.is_shutdown else 500,
                event.message,
                code="shutting_down" if event.is_shutdown else "engine_failed",
            )
        left -= event.finish_reason is not None
        yield event
        # Where events wait already, the loop would not learn that the client has left.
        await asyncio.sleep(0)


def _sse(table: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(table, separators=(",", ":")).encode() + b"\n\n"
