"""A thread for each model that owns its engine: jobs come in through a bounded queue, events go out
to the event loop.

A step that fails ends the jobs of that moment; later jobs are served. Not here: HTTP and JSON (app,
protocol).
"""

import asyncio
import itertools
import logging
import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from xushi.base.errors import XushiError
from xushi.engine import LLM, Delta, Request, SamplingParams, TextStream

logger = logging.getLogger(__name__)

# How many continuations may be running or waiting. A client that asks for more must retry later.
QUEUE_LIMIT = 256


class Busy(Exception):
    """The queue is full."""


@dataclass(frozen=True, slots=True)
class Event:
    """What one step of the engine added to one choice.

    `logprob` is the token's log-probability under the model. `deltas` is the new text, which may
    lag behind the tokens. `finish_reason` is None until the choice has ended.
    """

    choice: int
    token: int
    logprob: float
    is_reasoning: bool
    deltas: list[Delta]
    finish_reason: str | None


@dataclass(frozen=True, slots=True)
class Failure:
    """Ends a job early: the engine failed, or the server is shutting down."""

    message: str
    is_shutdown: bool


_SHUTDOWN = Failure("the server is shutting down", True)
_ENDED = Failure("the engine failed and could not be restarted; restart the server", False)


@dataclass(eq=False, slots=True)
class Job:
    """One HTTP request. `prompts` pairs each prompt with the parameters of its choices.

    The choices are numbered from 0 over all prompts. Create a job on the event loop that reads
    `events`.
    """

    prompts: list[tuple[list[int], list[SamplingParams]]]
    chat: bool
    events: "asyncio.Queue[Event | Failure]" = field(default_factory=asyncio.Queue)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    @property
    def choices(self) -> int:
        """The number of continuations that the job asks for."""
        return sum(len(params) for _, params in self.prompts)

    def send(self, events: "list[Event | Failure]") -> None:
        """Put events into the queue. Any thread may call it."""

        def put() -> None:
            for event in events:
                self.events.put_nowait(event)

        try:
            self.loop.call_soon_threadsafe(put)
        except RuntimeError:  # the loop is closed, so nobody reads the queue any more
            logger.debug("events of a job came after its event loop had closed")


@dataclass(slots=True)
class _Choice:
    job: Job
    index: int
    text: TextStream


class Worker:
    """Runs the jobs of one model. Call `start` before `submit`; `close` ends the thread."""

    def __init__(self, llm: LLM, queue_limit: int = QUEUE_LIMIT) -> None:
        self.llm = llm
        self.queue_limit = queue_limit
        self._engine = llm.engine
        self._choices: dict[Request, _Choice] = {}
        self._wake = threading.Condition()  # guards the four attributes below
        self._submitted: list[Job] = []
        self._cancelled: list[Job] = []
        self._unfinished = 0
        self._ending: Failure | None = None  # why no more jobs are served
        self._thread = threading.Thread(target=self._run, name="xushi-engine", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the thread is running."""
        return self._thread.is_alive()

    @property
    def unfinished(self) -> int:
        """How many continuations are waiting or running."""
        with self._wake:
            return self._unfinished

    @property
    def idle_slots(self) -> int:
        """How many cache slots are free."""
        return self._engine.idle_slots

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Ask the thread to end after its current step and to fail all unfinished jobs.

        Returns at once. Jobs that are submitted later fail too.
        """
        with self._wake:
            self._ending = self._ending or _SHUTDOWN
            self._wake.notify()

    def join(self, seconds: float) -> None:
        """Wait at most `seconds` for the thread to end."""
        if self._thread.is_alive():
            self._thread.join(seconds)

    def check(self, prompt_ids: list[int], params: SamplingParams) -> None:
        """Raise the `XushiError` that the engine would raise for this prompt."""
        self._engine.check(prompt_ids, params)

    def submit(self, job: Job) -> None:
        """Queue a job whose prompts have been checked. `Busy` if not all of it fits.

        When the thread has ended or is about to, the job fails at once.
        """
        with self._wake:
            if self._ending is not None:
                job.send([self._ending])
                return
            if self._unfinished + job.choices > self.queue_limit:
                raise Busy
            self._unfinished += job.choices
            self._submitted.append(job)
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """End the rest of a job at the next step. No effect if it has ended already."""
        with self._wake:
            self._cancelled.append(job)
            self._wake.notify()

    def _run(self) -> None:
        try:
            while self._serve_next():
                pass
        except Exception:
            logger.exception("the engine could not be restarted")
        finally:
            with self._wake:
                self._ending = self._ending or _ENDED
            self._fail_all(self._ending)

    def _serve_next(self) -> bool:
        """Wait until there is work and take one step. False once the worker is closed."""
        with self._wake:
            while not (self._submitted or self._cancelled or self._ending or self._engine.has_work):
                self._wake.wait()
            if self._ending is not None:
                return False
            submitted, self._submitted = self._submitted, []
            cancelled, self._cancelled = self._cancelled, []
        failure = self._step(submitted, cancelled)
        if failure is not None:
            # The jobs first: their clients must not wait for a restart that may itself fail.
            self._fail_all(failure, submitted)
            self._engine.restart()
        return True

    def _step(self, submitted: Sequence[Job], cancelled: Sequence[Job]) -> Failure | None:
        """Add new jobs, end cancelled ones and take a step of the engine.

        Any exception becomes a `Failure`, so that other and later jobs are served. It is not kept:
        its traceback refers to the cache.
        """
        try:
            for job in submitted:
                self._admit(job)
            for request in [r for r, choice in self._choices.items() if choice.job in cancelled]:
                self._engine.abort(request)
                self._forget(request)
            self._deliver(self._engine.step())
        except Exception as error:
            logger.exception("a step of the engine failed")
            if isinstance(error, XushiError):
                return Failure(error.problem, False)
            return Failure("the engine failed; the server's log has the error", False)
        return None

    def _admit(self, job: Job) -> None:
        numbers = itertools.count()
        tokenizer = self.llm.tokenizer
        for prompt_ids, params in job.prompts:
            for request in self._engine.add_group(prompt_ids, params):
                stop = request.params.stop
                text = TextStream(tokenizer, stop, job.chat, prompt_ids=prompt_ids)
                self._choices[request] = _Choice(job, next(numbers), text)

    def _deliver(self, progressed: list[Request]) -> None:
        """Send each job the events of its requests' newest tokens, in one call for each job."""
        outgoing: dict[Job, list[Event | Failure]] = defaultdict(list)
        for request in progressed:
            choice = self._choices[request]
            text = choice.text
            is_reasoning = text.channel == "reasoning"
            deltas = text.push(request.token_ids[-1])
            if text.stopped:
                self._engine.abort(request, "stop")
            reason = request.finish_reason
            if reason is not None:
                deltas += text.flush()
                if text.stopped:  # a stop string may also be in what was held back to the end
                    reason = "stop"
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

    def _fail_all(self, failure: Failure, taken: Sequence[Job] = ()) -> None:
        """Fail every job: in the engine, `taken` from the queue but not yet added, and queued."""
        with self._wake:
            jobs = {choice.job for choice in self._choices.values()}
            jobs |= {*taken, *self._submitted}
            self._choices.clear()
            self._submitted.clear()
            self._unfinished = 0
        for job in jobs:
            job.send([failure])
