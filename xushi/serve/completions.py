"""The two routes that generate, and clients that disconnect.

Request bodies are read with `protocol.parse_body`, not by FastAPI, so that every error has OpenAI's
form. Not here: the other routes (app), who may ask (access).
"""

import asyncio
import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from xushi.serve.protocol import (
    DEFAULT_COMPLETION_TOKENS,
    LARGEST_BODY,
    MOST_SCORES,
    ApiError,
    ChatBody,
    CompletionBody,
    parse_body,
)
from xushi.serve.responses import Counts, ResponseFormat
from xushi.serve.served import Served, find
from xushi.serve.worker import Busy, Job, Worker

# The client has disconnected, so nobody reads the response. nginx logs such requests as 499.
CLIENT_GONE = 499
# A body of the largest size takes this long at 17 kB a second.
SECONDS_FOR_BODY = 60.0


def add_completion_routes(app: FastAPI, served: Mapping[str, Served]) -> None:
    """Add POST /v1/chat/completions and /v1/completions."""

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body = parse_body(ChatBody, await _read_body(request))
        model = find(served, body.model)
        if not model.chat:
            raise ApiError(
                400,
                f"model {model.name} only completes text, since it has no chat "
                "template; use /v1/completions",
                "model",
                "unsupported_model",
            )
        return await _answer(request, model, body, await _chat_job(model, body), [])

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = parse_body(CompletionBody, await _read_body(request))
        model = find(served, body.model)
        job = await _completion_job(model, body)
        echoes: list[str] = []
        if body.echo:
            decode = model.worker.llm.tokenizer.decode
            texts = [p if isinstance(p, str) else decode(p, skip_special=True) for p in body.prompt]
            echoes = [text for text in texts for _ in range(body.n)]
        return await _answer(request, model, body, job, echoes)


async def _chat_job(model: Served, body: ChatBody) -> Job:
    """A last message of the assistant is continued: in its text, or in its reasoning if it has no
    text yet.
    """
    continued = body.messages[-1].role == "assistant"
    messages = [message.as_message() for message in body.messages[:-1]]
    last = body.messages[-1].as_message(with_reasoning=continued)
    prompt = await model.conversation([*messages, last], continued)
    context = model.worker.llm.context
    most = context  # where the request has no limit
    if body.logprobs and not body.stream:
        most = min(context, MOST_SCORES // (body.n * (1 + body.top_logprobs)))
    max_tokens = body.max_completion_tokens or body.max_tokens or most
    if body.logprobs:
        _limit_scores(body, [prompt], max_tokens, context, body.top_logprobs, False)
    params = body.params(1, max_tokens, secrets.randbits(63), body.top_logprobs)
    job = Job([(prompt, params[0])], chat=True)
    model.check(job, "messages")
    return job


async def _completion_job(model: Served, body: CompletionBody) -> Job:
    prompts = [await model.prompt(prompt) for prompt in body.prompt]
    max_tokens = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    scored = body.echo and body.logprobs is not None
    if body.logprobs is not None:
        context = model.worker.llm.context
        _limit_scores(body, prompts, max_tokens, context, body.logprobs, scored)
    params = body.params(len(prompts), max_tokens, secrets.randbits(63), body.logprobs or 0, scored)
    job = Job(list(zip(prompts, params, strict=True)), chat=False)
    model.check(job, "prompt")
    return job


def _limit_scores(
    body: ChatBody | CompletionBody,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    context: int,
    alternatives: int,
    scored: bool,
) -> None:
    """Refuse a response with more than MOST_SCORES log-probabilities: those of its prompts if they
    are `scored`, and of what it may generate, which a stream sends chunk by chunk.
    """
    places = sum(map(len, prompts)) if scored else 0
    if not body.stream:
        places += sum(max(0, min(max_tokens, context - len(prompt))) for prompt in prompts)
    scores = places * body.n * (1 + alternatives)
    if scores > MOST_SCORES:
        raise ApiError(
            400,
            f"the response may have {scores} log-probabilities, and {MOST_SCORES} are allowed; "
            "send fewer prompts, lower logprobs, max_tokens or n, or stream what is generated",
            "top_logprobs" if isinstance(body, ChatBody) and alternatives else "logprobs",
            "invalid_value",
        )


async def _answer(
    request: Request, model: Served, body: ChatBody | CompletionBody, job: Job, echoes: list[str]
) -> Response:
    """Queue the job and respond in the format asked for. The job ends with the connection."""
    worker = model.worker
    chat = isinstance(body, ChatBody)
    if isinstance(body, ChatBody):
        alternatives = body.top_logprobs if body.logprobs else None
    else:
        alternatives = body.logprobs
    form = ResponseFormat(
        f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
        int(time.time()),
        model.name,
        chat,
        worker.llm.tokenizer,
        alternatives,
        echoes,
        body.stream_options.include_usage,
        body.stream_options.continuous_usage_stats,
    )
    counts = Counts(sum(len(prompt) for prompt, _ in job.prompts))
    try:
        worker.submit(job)
    except Busy:
        raise ApiError(
            429,
            f"the server is busy: {worker.queue_limit} continuations are waiting or running",
            None,
            "queue_full",
            {"Retry-After": "1"},
        ) from None
    if body.stream:
        return _EventStream(form.stream(job, counts), worker, job)
    try:
        table = await _unless_gone(request, form.whole(job, counts))
    finally:
        worker.cancel(job)
    if table is None:
        return Response(status_code=CLIENT_GONE)
    return await run_in_threadpool(json_response, table)  # it may be tens of megabytes


class _EventStream(StreamingResponse):
    """A stream of server-sent events. When it ends, for whatever reason, the job is cancelled."""

    def __init__(self, content: AsyncIterator[bytes], worker: Worker, job: Job) -> None:
        super().__init__(
            content,
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._worker = worker
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._worker.cancel(self._job)


async def _unless_gone(request: Request, answer: Any) -> dict[str, Any] | None:
    """Wait for the answer. None if the client disconnects first."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    waiting = [asyncio.ensure_future(answer), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        return waiting[0].result() if waiting[0].done() else None
    finally:
        for task in waiting:
            task.cancel()


async def _read_body(request: Request) -> bytes:
    body = bytearray()
    try:
        async with asyncio.timeout(SECONDS_FOR_BODY):
            async for chunk in request.stream():
                body += chunk
                if len(body) > LARGEST_BODY:
                    raise ApiError(
                        413, f"the body is larger than {LARGEST_BODY} bytes", code="body_too_large"
                    )
    except TimeoutError:
        raise ApiError(
            408, f"the body did not arrive within {SECONDS_FOR_BODY:.0f} seconds", code="timeout"
        ) from None
    return bytes(body)


def json_response(
    table: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A response of JSON."""
    # json.dumps escapes to ASCII. An error may quote a lone surrogate from the request, which UTF-8
    # cannot encode.
    return Response(json.dumps(table), status, headers, "application/json")
