import json
import threading
import time
from contextlib import contextmanager

import httpx
import pytest
import torch
from openai import OpenAI

from xushi.model import Deepseek, save_pretrained
from xushi.serve import create_app, find_models
from xushi.serve.server import Server, bind
from xushi.tokenizer import Tokenizer

from ..tiny import TINY

SHAPE = TINY.model_copy(
    update={
        "vocab_size": 272,
        "n_group": 2,
        "max_position_embeddings": 128,
        "num_nextn_predict_layers": 0,
        "initializer_range": 0.5,
    }
)

CARD = {
    "title": "Digit sums",
    "can": "It adds digits.",
    "cannot": "<script>alert(1)</script>",
    "example": "83514927",
    "chinese": {"title": "数位和", "can": "它求数位和。", "cannot": "<b>它不会别的。</b>"},
}


@pytest.fixture(scope="session")
def run_directory(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    tokenizer = Tokenizer.train(["数字之和是多少？数字之和是九。数字" * 3], 272)
    for seed, name in enumerate(("base", "reasoning")):
        directory = run / "export" / name
        model = Deepseek(SHAPE).initialise(seed)
        with torch.no_grad():
            if name == "reasoning":  # otherwise a random model rarely begins or ends an answer
                model.head_VD[[tokenizer.end_think_id, tokenizer.eos_id]] *= 4
        save_pretrained(model, directory)
        tokenizer.save(directory, chat=name == "reasoning")
    (run / "export" / "reasoning" / "model_card.json").write_text(json.dumps(CARD))
    return run


@contextmanager
def running(app):
    """A real server on a loopback port, in a thread; yields (address, server)."""
    listener = bind("127.0.0.1", 0)
    server = Server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", server
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def serving():
    return running


@pytest.fixture(scope="session")
def app(run_directory):
    return create_app(find_models(run_directory))


@pytest.fixture(scope="session")
def address(app):
    with running(app) as (address, _):
        yield address


@pytest.fixture(scope="session")
def client(address):
    with OpenAI(base_url=address + "/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def http(address):
    kind = {"Content-Type": "application/json"}
    with httpx.Client(base_url=address, timeout=30, headers=kind) as http:
        yield http


class Steps:
    """Makes an engine wait before each step until the test allows it, on a machine of any speed."""

    def __init__(self):
        self._allowed = threading.Semaphore(0)
        self._free = False

    def holding(self, step):
        def held():
            if not self._free:
                self._allowed.acquire()
            return step()

        return held

    def let(self, count):
        self._allowed.release(count)

    def let_all(self):
        self._free = True
        self._allowed.release(1000)


@pytest.fixture
def steps(app, monkeypatch):
    """Controls the steps of the model "base"."""
    steps = Steps()
    engine = app.state.workers["base"]._engine
    monkeypatch.setattr(engine, "step", steps.holding(engine.step))
    yield steps
    steps.let_all()


@pytest.fixture
def settles():
    """A function that waits for a condition and returns whether it became true; the limit is for
    tests that fail.
    """

    def wait(condition, seconds=30.0):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if condition():
                return True
            time.sleep(0.01)
        return False

    return wait
