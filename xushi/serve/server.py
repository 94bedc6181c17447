"""The server process: its port, uvicorn, and a quick shutdown. Not here: routes (app)."""

import errno
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from xushi.base.defaults import HOST, PORT, QUEUE_LIMIT
from xushi.base.errors import BadInput, Failed
from xushi.engine import LLM
from xushi.serve.access import Access, clean_origins, is_loopback, read_keys
from xushi.serve.app import create_app
from xushi.serve.cards import find_models
from xushi.serve.connections import ACCEPTED_AT_ONCE, WAITING_CONNECTIONS, Connection
from xushi.serve.worker import Worker

# After Ctrl-C open connections are closed after this time; their jobs fail at once.
SECONDS_TO_CLOSE = 1


class Server(uvicorn.Server):
    """A uvicorn server that closes the workers as soon as a signal arrives.

    Open streams then end with an error object, and uvicorn does not wait for them.
    """

    def __init__(self, app: FastAPI) -> None:
        """`app` comes from `create_app`."""
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                ws="none",
                backlog=ACCEPTED_AT_ONCE,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=SECONDS_TO_CLOSE,
            )
        )
        self._workers: list[Worker] = list(app.state.workers.values())

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        for listener in sockets or []:
            listener.listen(WAITING_CONNECTIONS)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal shuts down in order, a second one at once."""
        for worker in self._workers:
            worker.close()
        super().handle_exit(sig, frame)


def serve(
    directory: Path,
    host: str = HOST,
    port: int = PORT,
    *,
    allow_origins: Sequence[str] = (),
    api_key_file: Path | None = None,
    queue_limit: int = QUEUE_LIMIT,
    load: Callable[[Path], LLM] = LLM,
) -> None:
    """Serve a run's models, or the model of a directory in Hugging Face's layout, until Ctrl-C.
    `load` makes an `LLM` from a model's directory.

    Pages of `allow_origins` may use the API. With keys in `api_key_file` or in XUSHI_API_KEYS it
    needs one. At most `queue_limit` continuations run or wait. A directory without a model
    and a port in use are a `XushiError`.
    """
    if queue_limit < 1:
        raise BadInput(f"--queue-limit {queue_limit} lets nothing in", "give at least 1")
    keys = read_keys(api_key_file, os.environ)
    models = find_models(directory)
    with bind(host, port) as listener:
        local = is_loopback(listener.getsockname()[0])
        app = create_app(
            models, queue_limit, Access(local, clean_origins(allow_origins), keys), load
        )
        print(*(describe(name, each.llm) for name, each in app.state.workers.items()), sep="\n")
        if not local and not keys:
            print(
                "warning: whoever reaches this machine may use the models; "
                "give --api-key-file, or --host 127.0.0.1 for this machine only",
                file=sys.stderr,
            )
        address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        print(
            f"serving {', '.join(models)} of {directory}\n"
            f"  page  {address}/\n"
            f"  API   {address}/v1\n"
            "Press Ctrl-C to stop",
            flush=True,
        )
        run(Server(app), listener)


def describe(name: str, llm: LLM) -> str:
    """One line on a model that was loaded: what it takes, and whether it can only complete text."""
    only = "" if llm.can_chat else "; without a chat template it only completes text"
    return f"{name}: {llm.memory}{only}"


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. A port that cannot be used is a `XushiError`."""
    if not 0 <= port <= 65535:
        raise BadInput(f"port {port} does not exist", "choose one from 1024 to 65535 with --port")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except socket.gaierror as error:
        raise BadInput(
            f"host {host!r} has no address: {error.strerror}",
            "give --host 127.0.0.1 for this machine only, or --host 0.0.0.0 for the network",
        ) from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise BadInput(
                f"port {port} of {host} is in use",
                f"choose another, for example --port {port + 1}"
                if port < 65535
                else "choose another with --port",
            ) from None
        if error.errno == errno.EACCES:
            raise BadInput(
                f"no permission to use port {port} of {host}", "choose one above 1023 with --port"
            ) from None
        raise BadInput(
            f"cannot listen on {host} port {port}: {error.strerror}",
            "give --host 127.0.0.1 for this machine only",
        ) from None


def run(server: Server, listener: socket.socket) -> None:
    """Serve until a signal. Ctrl-C is a normal end."""
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        return  # uvicorn raises it again after its shutdown
    if not server.started:
        raise Failed("the server could not start", "fix the error in its log above")
