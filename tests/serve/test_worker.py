"""What the server does when clients leave, come too many, or the engine fails."""

import threading

import httpx
import openai
import pytest
from openai import OpenAI

from xushi.serve import create_app, find_exports

LONG = {"model": "base", "prompt": "数", "max_tokens": 120, "n": 4, "seed": 1}


def quiet(worker):
    return worker.unfinished == 0 and worker.idle_slots == worker.llm.engine.slots


def is_freed(worker, steps, settles):
    """Whether it is quiet within 40 steps; to its end the answer would take 120."""
    for _ in range(40):
        steps.let(1)
        if settles(lambda: quiet(worker), 0.25):
            return True
    return False


def test_leaving_a_stream_frees_its_slots(app, http, steps, settles):
    worker = app.state.workers["base"]
    with http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as answer:
        steps.let(3)
        next(answer.iter_raw())
        assert worker.unfinished == 4
    assert is_freed(worker, steps, settles)


def test_leaving_before_a_whole_answer_frees_its_slots(app, address, steps, settles):
    worker = app.state.workers["base"]
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(address + "/v1/completions", json=LONG, timeout=httpx.Timeout(10, read=0.3))
    assert settles(lambda: worker.unfinished == 4)
    assert is_freed(worker, steps, settles)


def test_a_failing_step_fails_its_requests_and_no_others(app, client, http, monkeypatch, settles):
    worker = app.state.workers["base"]
    model = worker.llm.engine.model

    def broken(*_):
        raise RuntimeError("secret detail")

    with monkeypatch.context() as patch:
        patch.setattr(model, "decode", broken)
        with pytest.raises(openai.InternalServerError, match="the engine failed"):
            client.completions.create(model="base", prompt="a", max_tokens=3)
        with pytest.raises(openai.APIError, match="the engine failed"):
            list(client.completions.create(model="base", prompt="a", max_tokens=3, stream=True))
    assert http.get("/health").status_code == 200
    assert (
        client.completions.create(model="base", prompt="a", max_tokens=3).choices[0].finish_reason
    )
    assert settles(lambda: worker.unfinished == 0)


def test_many_at_once_each_get_their_own(client):
    alone = [
        client.completions.create(model="base", prompt="数", seed=seed, max_tokens=12)
        .choices[0]
        .text
        for seed in range(6)
    ]
    found: dict[int, str] = {}

    def ask(seed):
        found[seed] = (
            client.completions.create(model="base", prompt="数", seed=seed, max_tokens=12)
            .choices[0]
            .text
        )

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [found[seed] for seed in range(6)] == alone


def test_a_full_queue_says_come_back(run_directory, serving, settles):
    app = create_app(find_exports(run_directory), queue_limit=4)
    worker = app.state.workers["base"]
    release = threading.Event()
    step = worker._engine.step
    worker._engine.step = lambda: (release.wait(10), step())[1]
    with (
        serving(app) as (address, _),
        OpenAI(base_url=address + "/v1", api_key="none", max_retries=0) as client,
    ):
        stream = client.completions.create(**{**LONG, "max_tokens": 5}, stream=True)
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model="base", prompt="a")
        assert caught.value.response.headers["retry-after"] == "1"
        assert caught.value.code == "queue_full"
        with pytest.raises(openai.BadRequestError, match="allows 4"):
            client.completions.create(model="base", prompt="a", n=5)
        release.set()
        assert len({chunk.choices[0].index for chunk in stream}) == 4
        assert settles(lambda: worker.unfinished == 0)
        assert client.completions.create(model="base", prompt="a", n=4, max_tokens=2).choices
