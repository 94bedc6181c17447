"""Connections that send half a request, and too many of them, on a real server."""

import resource
import signal
import socket
import subprocess
import sys
import textwrap
from contextlib import ExitStack

import httpx
import pytest

from xushi.serve import connections, create_app, find_models

HALF = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: "
WHOLE = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


def connect(address, stack):
    host, port = address.removeprefix("http://").split(":")
    return stack.enter_context(socket.create_connection((host, int(port)), timeout=20))


def is_closed(connection):
    """Whether the server closes the connection; the time limit is for tests that fail."""
    try:
        return connection.recv(1000) == b""
    except ConnectionResetError:
        return True


def is_answered(connection):
    answer = b""
    while not answer.endswith(b"}"):
        answer += connection.recv(10_000) or b"}"
    return answer.startswith(b"HTTP/1.1 200") and b"ok" in answer


def test_headers_must_come_in_time(address, monkeypatch):
    monkeypatch.setattr(connections, "SECONDS_FOR_HEADERS", 0.2)
    with ExitStack() as stack:
        silent, half = connect(address, stack), connect(address, stack)
        half.sendall(HALF)
        assert is_closed(silent) and is_closed(half)
        monkeypatch.setattr(connections, "SECONDS_FOR_HEADERS", 20.0)
        second = connect(address, stack)
        second.sendall(WHOLE)
        assert is_answered(second)
        monkeypatch.setattr(connections, "SECONDS_FOR_HEADERS", 0.2)
        second.sendall(HALF)  # on the same connection, after a whole request
        assert is_closed(second)


def test_a_slow_answer_is_not_cut_off(app, address, monkeypatch, steps, settles):
    """The time is for headers, not for what comes after them. They come in two parts here, so that
    the time runs until the request is known.
    """
    made = []
    connected = connections.Connection.connection_made
    monkeypatch.setattr(
        connections.Connection,
        "connection_made",
        lambda self, transport: (made.append(self), connected(self, transport))[1],
    )
    worker = app.state.workers["base"]
    body = b'{"model": "base", "prompt": "a", "max_tokens": 3, "stream": true}'
    with ExitStack() as stack:
        connection = connect(address, stack)
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n")
        assert settles(lambda: made and made[0]._headers_timer is not None)
        timer = made[0]._headers_timer
        assert not timer.cancelled()
        connection.sendall(b"Content-Type: application/json\r\nConnection: close\r\n")
        connection.sendall(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert settles(lambda: worker.unfinished == 1)
        assert timer.cancelled() and made[0]._headers_timer is None
        steps.let_all()
        answer = b"".join(iter(lambda: connection.recv(10_000), b""))
    assert b"data: [DONE]\n\n" in answer


def test_the_oldest_idle_connection_leaves_for_a_new_one(run_directory, serving, monkeypatch):
    monkeypatch.setattr(connections, "connection_limit", lambda: 3)
    with serving(create_app(find_models(run_directory))) as (address, _), ExitStack() as stack:
        first, second, third = (connect(address, stack) for _ in range(3))
        for each in (first, second, third):
            each.sendall(HALF)
        first.sendall(b"\r\n\r\n")  # answered, so it has waited for the shortest time
        assert is_answered(first)
        fourth = connect(address, stack)
        fourth.sendall(WHOLE)
        assert is_answered(fourth)
        assert is_closed(second)
        third.sendall(b"\r\n\r\n")
        assert is_answered(third)


@pytest.mark.parametrize(
    ("files", "limit"), [(64, 16), (256, 128), (10_000, 1000), (resource.RLIM_INFINITY, 1000)]
)
def test_the_limit_leaves_files_for_everything_else(monkeypatch, files, limit):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))
    assert connections.connection_limit() == limit


def start_server(run_directory, *options, files=256):
    """The command in a process of its own that may open few files; returns (process, address)."""
    script = textwrap.dedent(
        f"""
        import resource, sys
        resource.setrlimit(resource.RLIMIT_NOFILE, ({files}, {files}))
        from xushi.cli import main
        sys.argv = ["xushi", "serve", {str(run_directory)!r}, "--port", "0", *{list(options)!r}]
        main()
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "page" in line:
            return process, line.split()[-1].rstrip("/")
    raise AssertionError(process.communicate())


@pytest.mark.slow
def test_half_requests_of_more_connections_than_files_do_no_harm(run_directory):
    process, address = start_server(run_directory)
    try:
        with ExitStack() as stack:
            for _ in range(400):
                connect(address, stack).sendall(HALF)
            for _ in range(5):
                assert httpx.get(address + "/health", timeout=20).json() == {"status": "ok"}
            for _ in range(400):
                connect(address, stack).sendall(HALF)
            assert httpx.get(address + "/health", timeout=20).json() == {"status": "ok"}
        assert httpx.get(address + "/health", timeout=20).json() == {"status": "ok"}
    finally:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
