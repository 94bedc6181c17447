import asyncio
import os
import signal
import socket
import threading
import time
from types import SimpleNamespace

import httpx
import pytest

from xushi.base.errors import XushiError
from xushi.serve import create_app, find_models, serve
from xushi.serve import server as server_module
from xushi.serve.cards import read_card


def test_a_port_in_use_is_reported_before_anything_is_loaded(run_directory, monkeypatch):
    monkeypatch.setattr(server_module, "create_app", lambda *_: pytest.fail("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            XushiError, match=rf"port {port} of 127.0.0.1 is in use\n.*--port {port + 1}"
        ):
            serve(run_directory, port=port)


@pytest.mark.parametrize(
    ("host", "port", "message"),
    [
        ("127.0.0.1", 70000, "port 70000 does not exist"),
        ("127.0.0.1", -1, "port -1 does not exist"),
        ("203.0.113.7", 8000, "cannot listen on 203.0.113.7"),
        ("no.such.host.invalid", 8000, "has no address"),
    ],
)
def test_places_that_cannot_be_listened_on(host, port, message):
    with pytest.raises(XushiError, match=message):
        server_module.bind(host, port)


def test_many_may_wait_and_few_are_accepted_at_once(monkeypatch):
    """uvicorn listens with the number that asyncio accepts at once; what waits is bounded after."""
    waiting = []
    listener = SimpleNamespace(listen=waiting.append)

    async def begin(server, sockets):
        sockets[0].listen(server.config.backlog)

    monkeypatch.setattr(server_module.uvicorn.Server, "startup", begin)
    app = SimpleNamespace(state=SimpleNamespace(workers={}))
    asyncio.run(server_module.Server(app).startup([listener]))
    assert waiting == [16, 1024]


def test_a_server_that_never_started_is_an_error():
    with pytest.raises(XushiError, match="the server could not start"):
        server_module.run(SimpleNamespace(run=lambda sockets: None, started=False), None)


def test_a_run_without_exports(tmp_path):
    with pytest.raises(XushiError, match="holds no model"):
        serve(tmp_path)
    with pytest.raises(XushiError, match="does not exist"):
        serve(tmp_path / "gone")
    (tmp_path / "export" / "base").mkdir(parents=True)
    (tmp_path / "export" / "base" / "config.json").write_text("{}")
    assert list(find_models(tmp_path)) == ["base"]


def test_a_damaged_model_card_is_named(tmp_path):
    for text, message in (
        ("{", "cannot be read"),
        ("[]", "not a JSON object"),
        ('{"titel": ""}', "mean title"),
        ('{"title": 3}', r"title: must be a text.*\nremove it, or export the model again"),
    ):
        (tmp_path / "model_card.json").write_text(text)
        with pytest.raises(XushiError, match=message):
            read_card("base", tmp_path)


def test_control_c_ends_open_streams_before_their_answers_end(run_directory):
    app = create_app(find_models(run_directory))
    engine = app.state.workers["base"]._engine
    step = engine.step
    engine.step = lambda: (time.sleep(0.05), step())[1]
    server = server_module.Server(app)
    listener = server_module.bind("127.0.0.1", 0)
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    seen = []

    def press() -> None:
        with httpx.stream(
            "POST",
            address + "/v1/completions",
            timeout=20,
            json={"model": "base", "prompt": "数", "max_tokens": 120, "n": 4, "stream": True},
        ) as answer:
            for line in answer.iter_lines():
                if not seen:
                    os.kill(os.getpid(), signal.SIGINT)
                seen.append(line)

    thread = threading.Thread(target=press)
    thread.start()
    server_module.run(server, listener)
    thread.join(30)
    assert not thread.is_alive()
    listener.close()
    assert "shutting_down" in "".join(seen)
    assert not any(worker.alive for worker in app.state.workers.values())


@pytest.fixture
def served(monkeypatch):
    """Runs `serve` without serving; returns what the application would be made with."""
    made = {}

    def create(models, queue_limit, access, load):
        made.update(queue_limit=queue_limit, access=access)
        return SimpleNamespace(state=SimpleNamespace(workers={}))

    monkeypatch.setattr(server_module, "create_app", create)
    monkeypatch.setattr(server_module, "Server", lambda app: app)
    monkeypatch.setattr(server_module, "run", lambda *_: None)
    return made


def test_what_is_reachable_from_elsewhere_without_a_key_is_warned_of(
    run_directory, served, capsys, tmp_path, monkeypatch
):
    monkeypatch.delenv("XUSHI_API_KEYS", raising=False)
    serve(run_directory, "127.0.0.1", 0)
    assert served["access"].local and capsys.readouterr().err == ""
    serve(run_directory, "0.0.0.0", 0)
    assert not served["access"].local
    assert "whoever reaches this machine may use the models" in capsys.readouterr().err
    (tmp_path / "keys").write_text("one\ntwo\n")
    serve(run_directory, "0.0.0.0", 0, api_key_file=tmp_path / "keys")
    assert served["access"].keys == ("one", "two") and capsys.readouterr().err == ""


def test_options_of_the_server(run_directory, served):
    serve(run_directory, port=0, allow_origins=["http://localhost:3000/"], queue_limit=7)
    assert served["access"].origins == ("http://localhost:3000",) and served["queue_limit"] == 7
    with pytest.raises(XushiError, match="--allow-origin 'here' is not an origin"):
        serve(run_directory, port=0, allow_origins=["here"])
    with pytest.raises(XushiError, match="--queue-limit 0 lets nothing in"):
        serve(run_directory, port=0, queue_limit=0)


def test_health_says_which_model_is_in_trouble(run_directory, serving, monkeypatch):
    app = create_app(find_models(run_directory))
    with serving(app) as (address, _):
        assert httpx.get(address + "/health").json() == {"status": "ok"}
        worker = app.state.workers["base"]
        worker.close()
        worker.join(20)
        answer = httpx.get(address + "/health")
        assert answer.status_code == 503
        assert answer.json() == {"status": "failed", "models": {"base": "its thread has ended"}}
