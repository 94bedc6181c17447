"""A thread for each model that owns its engine: jobs come in through a bounded queue, events go out
to the event loop.

A step that fails ends the jobs of that moment; later jobs are served. Not here: HTTP and JSON (app,
protocol).
"""

import asyncio
import contextlib
import itertools
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from xushi.base.defaults import QUEUE_LIMIT
from xushi.base.errors import XushiError
from xushi.engine import (
    LLM,
    Alternatives,
    Delta,
    PromptScores,
    Request,
    SamplingParams,
    TextStream,
)

logger = logging.getLogger(__name__)

# A step of a large model on a slow machine takes seconds. Work that gets nowhere for this long is
# taken for stuck.
STALL_SECONDS = 120.0


class Busy(Exception):
    """The queue is full."""


@dataclass(frozen=True, slots=True)
class Event:
    """What one step of the engine added to one choice.

    `deltas` is the new text, which may lag behind the tokens. `finish_reason` is None until the
    choice has ended. `logprob` is the token's log-probability under the model, and `top` are the
    most probable tokens of its place. A choice of no tokens has one event without a token.
    `prompt` comes with the first event, if it is asked for.
    """

    choice: int
    deltas: list[Delta]
    finish_reason: str | None
    token: int | None = None
    logprob: float = 0.0
    top: Alternatives = field(default_factory=list)
    is_reasoning: bool = False
    prompt: PromptScores | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """Ends a job early: the engine failed, or the server is shutting down."""

    message: str
    is_shutdown: bool


_SHUTDOWN = Failure("the server is shutting down", True)
_FAILED = Failure("the engine failed; the server's log has the error", False)
_ENDED = Failure("the engine's thread has ended; restart the server", False)


@dataclass(eq=False, slots=True)
class Job:
    """One HTTP request. `prompts` pairs each prompt with the parameters of its choices.

    The choices are numbered from 0 over all prompts. `chat` says that they are answers to a
    conversation, which may have reasoning. Create a job on the event loop that reads `events`.
    """

    prompts: list[tuple[list[int], list[SamplingParams]]]
    chat: bool
    events: "asyncio.Queue[Event | Failure]" = field(default_factory=asyncio.Queue)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    @property
    def choices(self) -> int:
        """The number of continuations that the job asks for."""
        return sum(len(params) for _, params in self.prompts)

    def prompt_of(self, choice: int) -> list[int]:
        """The prompt of a choice."""
        first = 0
        for ids, params in self.prompts:
            first += len(params)
            if choice < first:
                return ids
        raise IndexError(choice)

    def send(self, events: "list[Event | Failure]") -> None:
        """Put events into the queue. Any thread may call it. A shutdown does not wait until what
        came before it is read.
        """

        def put() -> None:
            for event in events:
                if event is _SHUTDOWN:
                    while not self.events.empty():
                        self.events.get_nowait()
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
        self._broken = False  # a step has failed, and the engine could not be restarted
        self._wake = threading.Condition()  # guards the five attributes below
        self._submitted: list[Job] = []
        self._cancelled: list[Job] = []
        self._unfinished: dict[Job, int] = {}  # choices that are waiting or running
        self._moved = 0.0  # when work began or a step last ended, in seconds of the monotonic clock
        self._ending: Failure | None = None  # why no more jobs are served
        self._thread = threading.Thread(target=self._run, name="xushi-engine", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the thread is running."""
        return self._thread.is_alive()

    @property
    def trouble(self) -> str | None:
        """Why jobs fail or get nowhere at present; None if they do not."""
        if not self.alive:
            return "its thread has ended"
        if self._broken:
            return "it could not be restarted after a fault"
        with self._wake:
            still = time.monotonic() - self._moved
            if self._unfinished and still > STALL_SECONDS:
                return f"requests are waiting and nothing has happened for {still:.0f} seconds"
        return None

    @property
    def unfinished(self) -> int:
        """How many continuations are waiting or running."""
        with self._wake:
            return sum(self._unfinished.values())

    @property
    def idle_slots(self) -> int:
        """How many cache slots are free."""
        return self._engine.idle_slots

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Fail all unfinished jobs, and ask the thread to end after its current step.

        Returns at once. Jobs that are submitted later fail too.
        """
        with self._wake:
            self._ending = self._ending or _SHUTDOWN
            self._wake.notify()
        self._fail_all(_SHUTDOWN)

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
            if self._ending is None and not self.alive:
                self._ending = _ENDED
            if self._ending is not None:
                job.send([self._ending])
                return
            if sum(self._unfinished.values()) + job.choices > self.queue_limit:
                raise Busy
            if not self._unfinished:
                self._moved = time.monotonic()
            self._unfinished[job] = job.choices
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
        finally:
            with self._wake:
                self._ending = self._ending or _ENDED
            self._fail_all(self._ending)

    def _serve_next(self) -> bool:
        """Wait until there is work and take one step. False once the worker is closed."""
        with self._wake:
            while not (self._submitted or self._ending or self._can_cancel or self._has_work):
                self._wake.wait()
            if self._ending is not None:
                return False
            submitted, self._submitted = self._submitted, []
            cancelled, self._cancelled = self._cancelled, []
        failure = self._step(submitted, cancelled)
        with self._wake:
            self._moved = time.monotonic()
        if failure is not None:
            # The jobs first: their clients must not wait for a restart that may itself fail.
            self._fail_all(failure)
            self._choices.clear()
            if not self._broken:  # else the step has just tried
                self._broken = True
                self._restart()
        return True

    @property
    def _can_cancel(self) -> bool:
        """Whether a job is to be ended. A broken engine has none: only a request restarts it."""
        return bool(self._cancelled) and not self._broken

    @property
    def _has_work(self) -> bool:
        return self._engine.has_work and not self._broken

    def _restart(self) -> None:
        """Empty the engine. If that fails, the next step tries it again."""
        try:
            self._engine.restart()
            self._broken = False
        except Exception:
            with contextlib.suppress(MemoryError):
                logger.exception("the engine could not be restarted")

    def _step(self, submitted: Sequence[Job], cancelled: Sequence[Job]) -> Failure | None:
        """Add new jobs, end cancelled ones and take a step of the engine.

        Any exception becomes a `Failure`, so that other and later jobs are served. It is not kept:
        its traceback refers to what the step had computed.
        """
        try:
            if self._broken:
                self._engine.restart()
                self._broken = False
            for job in submitted:
                self._admit(job)
            for request in [r for r, choice in self._choices.items() if choice.job in cancelled]:
                self._engine.abort(request)
                self._forget(request)
            self._deliver(self._engine.step())
        except Exception as error:
            with contextlib.suppress(MemoryError):  # there may be none for the report either
                logger.exception("a step of the engine failed")
            return Failure(error.problem, False) if isinstance(error, XushiError) else _FAILED
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
            outgoing[choice.job].append(self._event(request, choice))
        for job, events in outgoing.items():
            job.send(events)

    def _event(self, request: Request, choice: _Choice) -> Event:
        """What a step has added to a request, which is forgotten if it has ended."""
        text = choice.text
        thought = text.reasoning_tokens
        deltas = [delta for token in request.token_ids[-1:] for delta in text.push(token)]
        is_reasoning = text.reasoning_tokens > thought
        if text.stopped:
            self._engine.abort(request, "stop")
        reason = request.finish_reason
        if reason is not None:
            deltas += text.flush()
            if text.stopped:  # a stop string may also be in what was held back to the end
                reason = "stop"
            self._forget(request)
        drawn = bool(request.token_ids)
        return Event(
            choice.index,
            deltas,
            reason,
            token=request.token_ids[-1] if drawn else None,
            logprob=request.logprobs[-1] if drawn else 0.0,
            top=request.top_logprobs[-1] if drawn else [],
            is_reasoning=is_reasoning,
            prompt=request.prompt_scores if len(request.token_ids) < 2 else None,
        )

    def _forget(self, request: Request) -> None:
        job = self._choices.pop(request).job
        with self._wake:
            if job in self._unfinished:  # else it has failed
                self._unfinished[job] -= 1
                if not self._unfinished[job]:
                    del self._unfinished[job]

    def _fail_all(self, failure: Failure) -> None:
        """Fail every unfinished job, in the engine or in the queue. Any thread may call it."""
        with self._wake:
            jobs = list(self._unfinished)
            self._unfinished.clear()
            self._submitted.clear()
        for job in jobs:
            job.send([failure])
