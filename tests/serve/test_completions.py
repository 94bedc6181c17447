"""Many clients that disconnect at any moment."""

import gc
import random
import threading

import httpx
import pytest

from xushi.engine import Request
from xushi.serve import create_app, find_models
from xushi.serve.responses import ResponseFormat
from xushi.serve.worker import Job

STREAMS = 64
ROUNDS = 3


def hang_up(address, generator):
    """Ask for something long and leave: before the answer, within it, or never."""
    patience = generator.choice([0, 0, 1, 3, 10, 1000])
    body = {
        "model": "base",
        "prompt": "数字" * generator.randint(1, 30),
        "max_tokens": generator.randint(1, 60),
        "n": generator.randint(1, 4),
        "stream": generator.random() < 0.8,
        "echo": generator.random() < 0.3,
        "logprobs": generator.choice([None, 0, 3]),
    }
    # A client that gives up on a whole answer closes its connection.
    limit = 60 if body["stream"] or patience else 0.01
    try:
        with httpx.stream("POST", address + "/v1/completions", json=body, timeout=limit) as answer:
            assert answer.status_code in (200, 429)
            for _, _ in zip(range(patience), answer.iter_lines(), strict=False):
                pass
    except httpx.TimeoutException:
        assert limit < 1


@pytest.mark.slow
def test_clients_that_hang_up_leave_nothing_behind(run_directory, serving, settles, caplog):
    app = create_app(find_models(run_directory))
    worker = app.state.workers["base"]
    failures = []

    def client(seed):
        try:
            hang_up(address, random.Random(seed))
        except Exception as error:
            failures.append(error)

    def left():
        gc.collect()
        return sum(type(each) in (Job, Request, ResponseFormat) for each in gc.get_objects())

    with serving(app) as (address, server):
        before = None
        for number in range(ROUNDS):
            threads = [
                threading.Thread(target=client, args=(number * STREAMS + index,))
                for index in range(STREAMS)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(120)
            assert not failures
            assert settles(lambda: worker.unfinished == 0)
            assert settles(lambda: worker.idle_slots == worker.llm.engine.slots)
            assert settles(lambda: not server.server_state.tasks)
            assert settles(lambda: left() == 0), "something still refers to an ended request"
            counted = threading.active_count()
            before = counted if before is None else before
            assert counted <= before + 1
        assert worker.trouble is None
    assert not caplog.records
