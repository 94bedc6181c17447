"""The server when clients disconnect, when there are too many, and when the engine fails."""

import asyncio
import threading
from contextlib import contextmanager
from dataclasses import replace

import httpx
import openai
import pytest
from openai import OpenAI

from xushi.engine import LLM, SamplingParams
from xushi.engine import engine as engine_module
from xushi.engine.sampling import sample
from xushi.serve import create_app, find_models
from xushi.serve import worker as worker_module
from xushi.serve.worker import Event, Failure, Job, Worker

LONG = {"model": "base", "prompt": "数", "max_tokens": 120, "n": 4, "seed": 1}


def quiet(worker):
    return worker.unfinished == 0 and worker.idle_slots == worker.llm.engine.slots


def is_freed(worker, steps, settles):
    """Whether all slots are free two steps after the worker knows that the client has left: the one
    that was waiting, and the one that begins with ending the job. The whole answer would take 120.
    """
    assert settles(lambda: worker._cancelled or quiet(worker))
    steps.let(2)
    return settles(lambda: quiet(worker))


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
    app = create_app(find_models(run_directory), queue_limit=4)
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


@contextmanager
def working(run_directory):
    """A worker of the base model without a server."""
    worker = Worker(LLM(run_directory / "export" / "base"))
    worker.start()
    try:
        yield worker
    finally:
        worker.close()
        worker.join(10)
        assert not worker.alive


def new_job(choices=1):
    params = [SamplingParams(3, seed=seed) for seed in range(choices)]
    return Job([([5, 6, 7], params)], chat=False)


async def next_event(job):
    return await asyncio.wait_for(job.events.get(), 20)


async def finished(job):
    """Whether all choices of the job end without a failure."""
    left = job.choices
    while left:
        event = await next_event(job)
        if not isinstance(event, Event):
            return False
        left -= event.finish_reason is not None
    return True


def broken(*_):
    raise RuntimeError("secret detail")


def test_a_fault_also_fails_the_jobs_in_the_queue(run_directory):
    with working(run_directory) as worker:
        entered = threading.Event()
        queued = threading.Event()
        step = worker._engine.step

        def failing():
            entered.set()
            assert queued.wait(20)
            worker._engine.step = step
            broken()

        async def fail_two():
            worker._engine.step = failing
            running, waiting, later = new_job(3), new_job(), new_job(2)
            worker.submit(running)
            assert await asyncio.to_thread(entered.wait, 20)
            worker.submit(waiting)
            queued.set()
            for job in (running, waiting):
                failure = await next_event(job)
                assert isinstance(failure, Failure) and not failure.is_shutdown
                assert "secret" not in failure.message and job.events.empty()
            worker.submit(later)
            assert await finished(later)

        asyncio.run(fail_two())
        assert quiet(worker)


def test_after_a_fault_the_engine_is_the_same_but_empty(run_directory, monkeypatch):
    """No second cache is made, since memory may be what was lacking, and the version of the weights
    stays.
    """
    with working(run_directory) as worker:
        engine = worker._engine
        engine.weights_version = 7
        cache = engine._cache
        decode = engine.model.decode
        calls = iter([decode, decode, broken])

        async def fail_one():
            with monkeypatch.context() as patch:
                patch.setattr(engine.model, "decode", lambda *arguments: next(calls)(*arguments))
                patch.setattr(engine_module, "LatentCache", broken)
                failed = new_job(4)
                worker.submit(failed)
                while not isinstance(await next_event(failed), Failure):
                    pass
            job = new_job()
            worker.submit(job)
            assert await finished(job)

        asyncio.run(fail_one())
        assert worker._engine is worker.llm.engine is engine and engine.weights_version == 7
        assert engine._cache is cache
        assert quiet(worker)


def test_a_stop_string_in_what_is_held_back_to_the_end(run_directory, monkeypatch):
    """The last token is half a character, whose sign is the stop string."""
    with working(run_directory) as worker:
        spell = worker.llm.tokenizer.token_bytes
        half = next(i for i in range(272) if spell(i) == b"\xe6")
        monkeypatch.setattr(
            engine_module, "sample", lambda *arguments: replace(sample(*arguments), tokens=[half])
        )

        async def ends():
            job = Job([([5, 6, 7], [SamplingParams(1, stop=("\ufffd",))])], chat=False)
            worker.submit(job)
            event = await next_event(job)
            assert (event.deltas, event.finish_reason) == ([], "stop")

        asyncio.run(ends())


def test_jobs_that_the_engine_does_not_accept_fail(run_directory, monkeypatch):
    with working(run_directory) as worker:

        async def fail():
            with monkeypatch.context() as patch:
                patch.setattr(worker._engine, "add_group", broken)
                job = new_job()
                worker.submit(job)
                assert isinstance(await next_event(job), Failure)
            worker.submit(job)
            assert await finished(job)

        asyncio.run(fail())


def test_an_engine_that_cannot_be_restarted_fails_its_jobs_and_lives(run_directory, settles):
    """As when there is no memory, neither for a step nor for what comes after it, and then there is
    some again.
    """
    with working(run_directory) as worker:
        told = threading.Event()
        step, restart = worker._engine.step, worker._engine.restart

        tries = []

        def no_memory():
            assert told.wait(20), "the client must be told before the restart"
            tries.append(1)
            raise MemoryError

        worker._engine.step, worker._engine.restart = broken, no_memory

        async def fail():
            first, second, third = new_job(2), new_job(), new_job()
            worker.submit(first)
            assert isinstance(await next_event(first), Failure)
            told.set()
            assert await asyncio.to_thread(settles, lambda: worker.trouble is not None)
            assert worker.trouble == "it could not be restarted after a fault"
            worker.cancel(first)  # as every request ends
            await asyncio.sleep(0.05)
            assert len(tries) == 1, "it is tried again with the next request only"
            worker._engine.step = step
            worker.submit(second)
            assert isinstance(await next_event(second), Failure)
            worker.cancel(second)
            await asyncio.sleep(0.05)
            assert len(tries) == 2, "once for each request"
            worker._engine.restart = restart
            worker.submit(third)
            assert await finished(third)

        asyncio.run(fail())
        assert worker.trouble is None
        assert quiet(worker)


def test_jobs_fail_when_the_thread_is_gone(run_directory, monkeypatch):
    """Even when it ended in a way that nothing could be done about."""
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with working(run_directory) as worker:

        def ends(*_):
            raise SystemExit

        worker._engine.step = ends

        async def fail():
            running, late = new_job(), new_job()
            worker.submit(running)
            assert "thread has ended" in (await next_event(running)).message
            await asyncio.to_thread(worker.join, 20)
            worker._ending = None  # as if it had been killed
            worker.submit(late)
            assert "thread has ended" in (await next_event(late)).message
            assert worker.trouble == "its thread has ended"
            assert worker.unfinished == 0

        asyncio.run(fail())


@contextmanager
def held(run_directory):
    """A worker whose steps wait: (worker, an event that says that one waits, an event that lets
    them go on).
    """
    with working(run_directory) as worker:
        entered, release = threading.Event(), threading.Event()
        step = worker._engine.step
        worker._engine.step = lambda: (entered.set(), release.wait(20), step())[2]
        yield worker, entered, release


def test_a_step_that_never_ends_is_seen(run_directory, monkeypatch, settles):
    with held(run_directory) as (worker, entered, release):

        async def stall():
            monkeypatch.setattr(worker_module, "STALL_SECONDS", 0.0)
            assert worker.trouble is None, "nothing is waiting"
            job = new_job()
            worker.submit(job)
            assert await asyncio.to_thread(entered.wait, 20)
            assert await asyncio.to_thread(settles, lambda: worker.trouble is not None)
            assert "nothing has happened" in worker.trouble
            monkeypatch.setattr(worker_module, "STALL_SECONDS", 60.0)
            assert worker.trouble is None, "it may take a while"
            release.set()
            assert await finished(job)

        asyncio.run(stall())


def test_closing_ends_jobs_before_the_step_ends(run_directory):
    with held(run_directory) as (worker, entered, release):

        async def close():
            job = new_job(2)
            worker.submit(job)
            assert await asyncio.to_thread(entered.wait, 20)
            unread = Event(0, [], None, 5)
            job.send([unread] * 100)
            worker.close()
            await asyncio.sleep(0)
            assert (await next_event(job)).is_shutdown
            assert not release.is_set() and worker.unfinished == 0
            release.set()

        asyncio.run(close())


def test_a_job_that_comes_while_closing_fails(run_directory):
    with held(run_directory) as (worker, entered, release):

        async def close():
            running, during, after = new_job(), new_job(), new_job()
            worker.submit(running)
            assert await asyncio.to_thread(entered.wait, 20)
            worker.close()
            worker.submit(during)
            assert (await next_event(during)).is_shutdown
            release.set()
            await asyncio.to_thread(worker.join, 20)
            worker.submit(after)
            assert (await next_event(after)).is_shutdown
            while not isinstance(event := await next_event(running), Failure):
                assert event.finish_reason is None
            assert event.is_shutdown

        asyncio.run(close())
