"""The HTTP application: routes, errors, and clients that disconnect.

Request bodies are read with `protocol.parse_body`, not by FastAPI, so that every error has OpenAI's
form. Not here: the process and its port (server), the engine's thread (worker).
"""

import asyncio
import base64
import hashlib
import json
import re
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from xushi.base.errors import XushiError
from xushi.engine import LLM, ContextLengthError, SamplingParams
from xushi.serve.cards import ModelCard, read_card
from xushi.serve.protocol import (
    DEFAULT_COMPLETION_TOKENS,
    LARGEST_BODY,
    ApiError,
    ChatBody,
    CompletionBody,
    parse_body,
)
from xushi.serve.responses import Counts, ResponseFormat
from xushi.serve.worker import QUEUE_LIMIT, Busy, Job, Worker

# The client has disconnected, so nobody reads the response. nginx logs such requests as 499.
CLIENT_GONE = 499


@dataclass(frozen=True)
class _Served:
    name: str
    worker: Worker
    card: ModelCard
    created: int
    chat: bool

    def describe(self) -> dict[str, Any]:
        """The model's entry in /v1/models. The key `xushi` holds what the chat page needs."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "xushi",
            "xushi": {
                "chat": self.chat,
                "context": self.worker.llm.context,
                **self.card.model_dump(),
            },
        }


def create_app(
    models: Mapping[str, Path],
    queue_limit: int = QUEUE_LIMIT,
    load: Callable[[Path], LLM] = LLM,
) -> FastAPI:
    """Load the models from their directories with `load` and build the application.

    Each model's thread runs while the application runs. A model without a chat template only
    completes text. `app.state.workers` holds the workers by name. A model that cannot be loaded is
    a `XushiError`.
    """
    served = {
        name: _Served(
            name,
            Worker(llm := load(path), queue_limit),
            read_card(name, path),
            int((path / "config.json").stat().st_mtime),
            llm.can_chat,
        )
        for name, path in models.items()
    }

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        for model in served.values():
            model.worker.start()
        yield
        for model in served.values():
            model.worker.close()
        for model in served.values():
            await run_in_threadpool(model.worker.join, 1.0)

    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.workers = {name: model.worker for name, model in served.items()}
    _add_error_forms(app)
    _add_information_routes(app, served)
    _add_completion_routes(app, served)
    return app


def _add_completion_routes(app: FastAPI, served: Mapping[str, _Served]) -> None:
    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body = parse_body(ChatBody, await _read_body(request))
        model = _find(served, body.model)
        if not model.chat:
            raise ApiError(
                400,
                f"model {model.name} only completes text, since it has no chat "
                "template; use /v1/completions",
                "model",
                "unsupported_model",
            )
        if body.max_tokens is not None and body.max_completion_tokens is not None:
            raise ApiError(400, "give max_tokens or max_completion_tokens, not both", "max_tokens")
        llm = model.worker.llm
        messages = [message.as_message() for message in body.messages]
        prompt = await run_in_threadpool(llm.conversation_ids, messages)
        max_tokens = body.max_completion_tokens or body.max_tokens or llm.context
        job = _checked_job(model.worker, body, [prompt], max_tokens, "messages")
        return await _answer(request, model, body, job)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = parse_body(CompletionBody, await _read_body(request))
        model = _find(served, body.model)
        prompts = await run_in_threadpool(
            lambda: [model.worker.llm.prompt_ids(prompt) for prompt in body.prompt]
        )
        max_tokens = body.max_tokens or DEFAULT_COMPLETION_TOKENS
        job = _checked_job(model.worker, body, prompts, max_tokens, "prompt")
        return await _answer(request, model, body, job)


def _checked_job(
    worker: Worker,
    body: ChatBody | CompletionBody,
    prompts: list[list[int]],
    max_tokens: int,
    param: str,
) -> Job:
    """The job for a request. An `ApiError` that names `param` if the engine would refuse it."""
    params = body.params(len(prompts), max_tokens, secrets.randbits(63))
    job = Job(list(zip(prompts, params, strict=True)), isinstance(body, ChatBody))
    if job.choices > worker.queue_limit:
        raise ApiError(
            400,
            f"the request asks for {job.choices} choices and this server allows "
            f"{worker.queue_limit}",
            "n",
            "invalid_value",
        )
    for prompt, choices in job.prompts:
        _check(worker, prompt, choices[0], param)
    return job


async def _answer(
    request: Request, model: _Served, body: ChatBody | CompletionBody, job: Job
) -> Response:
    """Queue the job and respond in the format asked for. The job ends with the connection."""
    worker = model.worker
    form = ResponseFormat(
        f"{'chatcmpl' if job.chat else 'cmpl'}-{uuid.uuid4().hex}",
        int(time.time()),
        model.name,
        job.chat,
        body.logprobs is not None and body.logprobs is not False,  # 0 asks for them too
        body.include_usage,
        worker.llm.tokenizer,
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
            retry_after=1,
        ) from None
    if body.stream:
        return _EventStream(form.stream(job, counts), worker, job)
    try:
        table = await _unless_gone(request, form.whole(job, counts))
    finally:
        worker.cancel(job)
    return Response(status_code=CLIENT_GONE) if table is None else _json(table)


def _check(worker: Worker, prompt: list[int], params: SamplingParams, param: str) -> None:
    try:
        worker.check(prompt, params)
    except ContextLengthError as error:
        raise ApiError(
            400, f"{error.problem}; {error.remedy}", param, "context_length_exceeded"
        ) from None
    except XushiError as error:
        raise ApiError(400, f"{error.problem}; {error.remedy}", param, "invalid_value") from None


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
    async for chunk in request.stream():
        body += chunk
        if len(body) > LARGEST_BODY:
            raise ApiError(
                413, f"the body is larger than {LARGEST_BODY} bytes", code="body_too_large"
            )
    return bytes(body)


def _find(served: Mapping[str, _Served], name: str) -> _Served:
    if name not in served:
        raise ApiError(
            404,
            f"model {name!r} does not exist; this server has {', '.join(served)}",
            "model",
            "model_not_found",
        )
    return served[name]


def _add_information_routes(app: FastAPI, served: Mapping[str, _Served]) -> None:
    html = resources.files("xushi.serve").joinpath("page.html").read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": _page_policy(html),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }

    @app.get("/")
    async def page() -> Response:
        return HTMLResponse(html, headers=headers)

    @app.get("/v1/models")
    async def list_models() -> Response:
        return _json({"object": "list", "data": [model.describe() for model in served.values()]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        return _json(_find(served, name).describe())

    @app.get("/health")
    async def health() -> Response:
        dead = [model.name for model in served.values() if not model.worker.alive]
        return _json({"status": "failed", "models": dead}, 503) if dead else _json({"status": "ok"})


def _page_policy(html: str) -> str:
    """A content security policy that allows only the page's own script and style."""

    def allow(tag: str) -> str:
        parts = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        return " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'"
            for part in parts
        )

    return (
        f"default-src 'none'; script-src {allow('script')}; style-src {allow('style')}; "
        "connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _json(
    table: dict[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    # json.dumps escapes to ASCII. An error may quote a lone surrogate from the request, which UTF-8
    # cannot encode.
    return Response(json.dumps(table), status, headers, "application/json")


def _add_error_forms(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return _json(error.body, error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.scope['path']}: {error.detail}"
        return _json(ApiError(error.status_code, message).body, error.status_code, error.headers)

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_GONE)

    @app.exception_handler(Exception)
    async def failed(_: Request, __: Exception) -> Response:
        return _json(
            ApiError(500, "the server failed; its log has the error", code="internal_error").body,
            500,
        )
