"""One thread per model that owns its engine: jobs go in through a bounded queue, events come out on
the event loop.

A fault inside a step fails the requests of that moment and not the server. Not here: HTTP and JSON
(app, protocol).
"""

import asyncio
import itertools
import logging
import threading
from collections import defaultdict
from dataclasses import dataclass, field

from xushi.base.errors import XushiError
from xushi.engine import LLM, Delta, Engine, Request, SamplingParams, TextStream

logger = logging.getLogger(__name__)

# Continuations that may be unfinished at once, running or waiting; beyond it a client is told to
# come back.
QUEUE_LIMIT = 256


class Busy(Exception):
    """The queue is full."""


@dataclass(frozen=True, slots=True)
class Event:
    """What one step gave one choice: a token, its model log-probability, its text so far, perhaps
    the end.
    """

    choice: int
    token: int
    logprob: float
    is_reasoning: bool
    deltas: list[Delta]
    finish_reason: str | None


@dataclass(frozen=True, slots=True)
class Failure:
    """The job is over: the server failed or is going away."""

    message: str
    is_shutdown: bool


@dataclass(eq=False, slots=True)
class Job:
    """One HTTP request: prompts with the parameters of their choices, numbered through, and where
    events go.

    Make it on the event loop that reads `events`.
    """

    prompts: list[tuple[list[int], list[SamplingParams]]]
    chat: bool
    events: "asyncio.Queue[Event | Failure]" = field(default_factory=asyncio.Queue)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    @property
    def choices(self) -> int:
        """How many continuations it asks for."""
        return sum(len(params) for _, params in self.prompts)

    def send(self, events: "list[Event | Failure]") -> None:
        """Hand events to the reader; from any thread."""

        def put() -> None:
            for event in events:
                self.events.put_nowait(event)

        try:
            self.loop.call_soon_threadsafe(put)
        except RuntimeError:  # the loop is closed, so the reader is gone with it
            logger.debug("events of a job came after its event loop had closed")


@dataclass(slots=True)
class _Choice:
    job: Job
    index: int
    text: TextStream


class Worker:
    """Runs the jobs of one model. `start` before the first `submit`; `close` ends the thread."""

    def __init__(self, llm: LLM, queue_limit: int = QUEUE_LIMIT) -> None:
        self.llm = llm
        self.queue_limit = queue_limit
        self._engine = llm.engine
        self._choices: dict[Request, _Choice] = {}
        self._wake = threading.Condition()  # guards the four below
        self._submitted: list[Job] = []
        self._cancelled: list[Job] = []
        self._unfinished = 0
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="xushi-engine", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the thread serves."""
        return self._thread.is_alive()

    @property
    def unfinished(self) -> int:
        """Continuations waiting or running."""
        with self._wake:
            return self._unfinished

    @property
    def idle_slots(self) -> int:
        """Cache slots that nobody holds."""
        return self._engine.idle_slots

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def close(self) -> None:
        """Fail what is unfinished and end after the step at hand; returns at once."""
        with self._wake:
            self._closing = True
            self._wake.notify()

    def join(self, seconds: float) -> None:
        """Wait so long for the thread's end."""
        if self._thread.is_alive():
            self._thread.join(seconds)

    def check(self, prompt_ids: list[int], params: SamplingParams) -> None:
        """Raise the `XushiError` that the engine would raise for this prompt."""
        self._engine.check(prompt_ids, params)

    def submit(self, job: Job) -> None:
        """Queue a job whose prompts have been checked; `Busy` if it does not fit, and then none of
        it is queued.
        """
        with self._wake:
            if self._unfinished + job.choices > self.queue_limit:
                raise Busy
            if self._closing:
                job.send([_SHUTDOWN])
                return
            self._unfinished += job.choices
            self._submitted.append(job)
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """End what is left of a job, at the next step; no effect on one that is over."""
        with self._wake:
            self._cancelled.append(job)
            self._wake.notify()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (
                    self._submitted or self._cancelled or self._closing or self._engine.has_work
                ):
                    self._wake.wait()
                submitted, self._submitted = self._submitted, []
                cancelled, self._cancelled = self._cancelled, []
                closing = self._closing
            try:
                for job in submitted:
                    self._admit(job)
                for request in [
                    r for r, choice in self._choices.items() if choice.job in cancelled
                ]:
                    self._engine.abort(request)
                    self._forget(request)
                if closing:
                    self._fail_all(_SHUTDOWN, submitted)
                    return
                self._deliver(self._engine.step())
            except (
                Exception
            ) as error:  # whatever it is, the other jobs and the next ones must be served
                logger.exception("a step of the engine failed")
                message = (
                    error.problem
                    if isinstance(error, XushiError)
                    else "the engine failed; the log says why"
                )
                self._engine = Engine(self._engine.model, self._engine.eos_id, self._engine.slots)
                self._fail_all(Failure(message, False), submitted)

    def _admit(self, job: Job) -> None:
        numbers = itertools.count()
        tokenizer = self.llm.tokenizer
        for prompt_ids, params in job.prompts:
            for request in self._engine.add_group(prompt_ids, params):
                self._choices[request] = _Choice(
                    job, next(numbers), TextStream(tokenizer, request.params.stop, job.chat)
                )

    def _deliver(self, progressed: list[Request]) -> None:
        """Turn the newest token of each request into an event; one wake-up of the loop per job."""
        outgoing: dict[Job, list[Event | Failure]] = defaultdict(list)
        for request in progressed:
            choice = self._choices[request]
            text = choice.text
            is_reasoning = text.channel == "reasoning"
            deltas = text.push(request.token_ids[-1])
            if text.stopped:
                self._engine.abort(request, "stop")
            reason = "stop" if text.stopped else request.finish_reason
            if reason is not None:
                deltas += text.flush()
                self._forget(request)
            outgoing[choice.job].append(
                Event(
                    choice.index,
                    request.token_ids[-1],
                    request.logprobs[-1],
                    is_reasoning,
                    deltas,
                    reason,
                )
            )
        for job, events in outgoing.items():
            job.send(events)

    def _forget(self, request: Request) -> None:
        del self._choices[request]
        with self._wake:
            self._unfinished -= 1

    def _fail_all(self, failure: Failure, taken: list[Job]) -> None:
        """Fail every job: those in the engine, those just taken from the queue and those still in
        it.
        """
        with self._wake:
            jobs = (
                {choice.job for choice in self._choices.values()}
                | set(taken)
                | set(self._submitted)
            )
            self._choices.clear()
            self._submitted.clear()
            self._unfinished = 0
        for job in jobs:
            job.send([failure])


_SHUTDOWN = Failure("the server is shutting down", True)
