"""The HTTP application: its models, the routes that inform, and the form of errors.

Not here: the routes that generate (completions), who may ask (access), the process and its port
(server), the engine's thread (worker).
"""

import base64
import hashlib
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from importlib import resources
from pathlib import Path

from fastapi import FastAPI, Request
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, Response

from xushi.base.defaults import QUEUE_LIMIT
from xushi.engine import LLM
from xushi.serve.access import Access, AccessMiddleware
from xushi.serve.cards import read_card
from xushi.serve.completions import CLIENT_GONE, add_completion_routes, json_response
from xushi.serve.openapi import describe_api
from xushi.serve.protocol import ApiError
from xushi.serve.served import Served, find
from xushi.serve.worker import Worker

READ = ["GET", "HEAD"]


def create_app(
    models: Mapping[str, Path],
    queue_limit: int = QUEUE_LIMIT,
    access: Access | None = None,
    load: Callable[[Path], LLM] = LLM,
) -> FastAPI:
    """Load the models from their directories with `load` and build the application.

    Each model's thread runs while the application runs. A model without a chat template only
    completes text. `app.state.workers` holds the workers by name. Without `access` only this
    machine may ask, without a key. A model that cannot be loaded is a `XushiError`.
    """
    served = {
        name: Served(
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
    add_completion_routes(app, served)
    app.add_middleware(AccessMiddleware, access=access or Access())
    return app


def _add_information_routes(app: FastAPI, served: Mapping[str, Served]) -> None:
    html = resources.files("xushi.serve").joinpath("page.html").read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": _page_policy(html),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }

    @app.api_route("/", methods=READ)
    async def page() -> Response:
        return HTMLResponse(html, headers=headers)

    @app.api_route("/v1/models", methods=READ)
    async def list_models() -> Response:
        return json_response(
            {"object": "list", "data": [model.describe() for model in served.values()]}
        )

    @app.api_route("/v1/models/{name:path}", methods=READ)
    async def one_model(name: str) -> Response:
        return json_response(find(served, name).describe())

    @app.api_route("/health", methods=READ)
    async def health() -> Response:
        found = {model.name: model.worker.trouble for model in served.values()}
        troubles = {name: trouble for name, trouble in found.items() if trouble}
        if troubles:
            return json_response({"status": "failed", "models": troubles}, 503)
        return json_response({"status": "ok"})

    @app.api_route("/openapi.json", methods=READ)
    async def openapi() -> Response:
        return json_response(describe_api())


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


def _add_error_forms(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return json_response(error.body, error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.scope['path']}: {error.detail}"
        return json_response(
            ApiError(error.status_code, message).body, error.status_code, error.headers
        )

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_GONE)
