"""Continuous batching: requests enter and leave between steps, and each step is one call of the
model.

One thread owns an engine. Not here: text, stop strings (text, llm), threads and HTTP (serve).
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from xushi.base.errors import BadInput, XushiError
from xushi.engine.params import SamplingParams
from xushi.engine.sampling import request_uniforms, sample, sampling_key
from xushi.model import Deepseek, LatentCache

FinishReason = Literal["stop", "length", "abort"]

# The model pads every sequence of a call to its longest chunk of new tokens, and attention to its
# longest sequence. Prompts are fed in chunks that keep sequences x chunk x length under this many
# scores per head.
SCORES_PER_CALL = 1 << 22
SMALLEST_CHUNK = 16


class ContextLengthError(XushiError):
    """A prompt that leaves no place for an answer."""

    def __init__(self, prompt_tokens: int, context: int) -> None:
        super().__init__(
            f"the prompt has {prompt_tokens} tokens and the model's context holds {context}, "
            "one of them at least for the answer",
            "shorten the prompt",
        )
        self.prompt_tokens = prompt_tokens
        self.context = context


@dataclass(eq=False, slots=True)
class _Prompt:
    """A prompt in the cache, for the requests that share it."""

    ids: list[int]
    unfinished: int
    unjoined: int  # requests that do not have their own sequence yet
    charged: bool = False  # its slots are reserved
    sequence: int | None = None
    fed: int = 0
    logits_V: Tensor | None = (
        None  # of its last token, once all of it is fed and until all have joined
    )
    routed_experts: list[Tensor] = field(
        default_factory=list
    )  # of what is fed, where a request wants them

    def forget_logits(self) -> None:
        """Let go of the matrix of all rows of that call; keep this row for those that still wait."""
        self.logits_V = (
            self.logits_V.clone() if self.logits_V is not None and self.unjoined else None
        )


@dataclass(eq=False, slots=True)
class Request:
    """One continuation of one prompt; read it between steps, never write it.

    `token_ids` ends with eos where eos was sampled. Per token: `logprobs` under the model
    (temperature 1, whole vocabulary), and `sampling_logprobs` under the distribution it was drawn
    from. On request `routed_experts`, int64 [MoE layers, k] for each place that was computed: the
    prompt's, and each token's but the last one's.
    """

    prompt_ids: list[int]
    params: SamplingParams
    weights_version: int
    routed_experts: list[Tensor] | None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampling_logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    _limit: int = 0  # of generated tokens
    _key: int = 0
    _sequence: int | None = None
    _prompt: _Prompt | None = None  # until finished


class Engine:
    """Generates for many requests at once with a cache of `slots` tokens.

    A request enters when the cache has room for its prompt and all it may generate, in the order of
    adding; so nothing that has entered is ever thrown out. The model is used as it stands, its
    training flag included.
    """

    def __init__(self, model: Deepseek, eos_id: int, slots: int, weights_version: int = 0) -> None:
        self.model = model
        self.eos_id = eos_id
        self.slots = slots
        self.weights_version = weights_version
        self.context = model.config.max_position_embeddings
        self._cache = self._new_cache()
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._prefilling: list[_Prompt] = []
        self._reserved = 0

    def _new_cache(self) -> LatentCache:
        weight = self.model.head_VD
        dtype = self.model.compute_dtype or weight.dtype
        return LatentCache(self.model.config, self.slots, dtype, weight.device)

    def restart(self) -> None:
        """Drop all requests and begin with an empty cache, for example after a step has failed."""
        self._waiting.clear()
        self._running.clear()
        self._prefilling.clear()
        self._reserved = 0
        del self._cache  # first: there may be no memory for two caches
        self._cache = self._new_cache()

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._waiting or self._running)

    @property
    def idle_slots(self) -> int:
        """Cache slots that no sequence holds; all of them when there is no work."""
        return self._cache.available

    def check(self, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Raise the `XushiError` that `add` would raise; touches no state, so any thread may call
        it.
        """
        if not prompt_ids:
            raise BadInput(
                "the prompt has no tokens", "give at least one, for example the beginning of text"
            )
        size = self.model.config.vocab_size
        if min(prompt_ids) < 0 or max(prompt_ids) >= size:
            wrong = next(token for token in prompt_ids if not 0 <= token < size)
            raise BadInput(
                f"the prompt holds token id {wrong}, and the vocabulary has {size}",
                f"use ids from 0 to {size - 1}",
            )
        if len(prompt_ids) >= self.context:
            raise ContextLengthError(len(prompt_ids), self.context)
        need = len(prompt_ids) + self._room(prompt_ids, params) - 1
        if need > self.slots:
            raise BadInput(
                f"the request needs {need} places in the cache, which has {self.slots}",
                "shorten the prompt, lower max_tokens or give the engine more slots",
            )

    def add(
        self, prompt_ids: Sequence[int], params: SamplingParams, routing: bool = False
    ) -> Request:
        """Queue one request. What goes beyond the context is cut from max_tokens; errors as in
        `check`.
        """
        return self.add_group(prompt_ids, [params], routing)[0]

    def add_group(
        self, prompt_ids: Sequence[int], params: Sequence[SamplingParams], routing: bool = False
    ) -> list[Request]:
        """Queue several continuations of one prompt, which is computed and held once."""
        for each in params:
            self.check(prompt_ids, each)
        prompt = _Prompt(list(prompt_ids), unfinished=len(params), unjoined=len(params))
        requests = [
            Request(
                prompt.ids,
                each,
                self.weights_version,
                [] if routing else None,
                _prompt=prompt,
                _limit=self._room(prompt_ids, each),
                _key=sampling_key(each.seed),
            )
            for each in params
        ]
        self._waiting.extend(requests)
        return requests

    def abort(self, request: Request, reason: FinishReason = "abort") -> None:
        """End a request now and give back its place; no effect on one that is finished."""
        if request.finish_reason is not None:
            return
        waiting = len(self._waiting)
        self._waiting = deque(other for other in self._waiting if other is not request)
        if len(self._waiting) == waiting:
            self._running.remove(request)
            self._reserved -= request._limit - 1
        self._finish(request, reason)

    @torch.no_grad()
    def step(self) -> list[Request]:
        """One call of the model for everything that runs; the requests that got a token."""
        self._admit()
        decoding = [request for request in self._running if request._sequence is not None]
        logits_MV, routed = self._decode(decoding)
        joining = [
            r
            for r in self._running
            if r._sequence is None and r._prompt and r._prompt.logits_V is not None
        ]
        prompts = [prompt for r in joining if (prompt := r._prompt) is not None]
        for request, prompt in zip(joining, prompts, strict=True):
            self._join(request, prompt)
        progressed = decoding + joining
        if not progressed:
            return []
        if joining:
            rows = [prompt.logits_V for prompt in prompts if prompt.logits_V is not None]
            logits_MV = torch.cat([logits_MV, torch.stack(rows)]) if decoding else torch.stack(rows)
        counters = [len(request.token_ids) for request in progressed]
        sampled = sample(
            logits_MV,
            [request.params for request in progressed],
            request_uniforms([request._key for request in progressed], counters),
        )
        for row, request in enumerate(progressed):
            request.token_ids.append(sampled.tokens[row])
            request.logprobs.append(sampled.logprobs[row])
            request.sampling_logprobs.append(sampled.sampling_logprobs[row])
            if request.routed_experts is not None:
                request.routed_experts += (
                    [routed[row]]
                    if row < len(decoding)
                    else prompts[row - len(decoding)].routed_experts
                )
        for prompt in prompts:
            prompt.forget_logits()
        self._retire(progressed)
        return progressed

    def _room(self, prompt_ids: Sequence[int], params: SamplingParams) -> int:
        return min(params.max_tokens, self.context - len(prompt_ids))

    def _admit(self) -> None:
        """Move requests from the queue while the cache has room for all they may come to hold."""
        while self._waiting:
            request = self._waiting[0]
            prompt = request._prompt
            assert prompt is not None
            # The last token is never fed, so it needs no slot.
            need = request._limit - 1 + (0 if prompt.charged else len(prompt.ids))
            if self._reserved + need > self.slots:
                return
            self._waiting.popleft()
            self._running.append(request)
            self._reserved += need
            if not prompt.charged:
                prompt.charged = True
                prompt.sequence = self._cache.allocate()
                self._prefilling.append(prompt)

    def _decode(self, decoding: list[Request]) -> tuple[Tensor, list[Tensor]]:
        """Feed each decoding request's last token and each unfed prompt's next chunk.

        Returns logits [decoding, V] and, where a request wants them, each one's experts [MoE
        layers, k]; what is a prompt's is kept with it.
        """
        prefilling = self._prefilling
        additions: list[tuple[int, list[int]]] = []
        for request in decoding:
            assert request._sequence is not None
            additions.append((request._sequence, request.token_ids[-1:]))
        chunk = self._chunk(decoding) if prefilling else 0
        for prompt in prefilling:
            assert prompt.sequence is not None
            additions.append((prompt.sequence, prompt.ids[prompt.fed : prompt.fed + chunk]))
            prompt.fed += len(additions[-1][1])
        if not additions:
            return torch.empty(0, 0), []
        wants_routing = any(request.routed_experts is not None for request in self._running)
        decoded = self.model.decode(self._cache.extend(additions), self._cache, wants_routing)
        logits_MV, routed = decoded.logits_MV, list[Tensor]()
        if wants_routing:
            fed = sum(len(tokens) for _, tokens in additions)
            experts = decoded.routed_experts  # none of a dense model
            routed = (
                [torch.empty(0, 0, dtype=torch.int64)] * fed
                if experts is None
                else [*experts.cpu().unbind(1)]
            )
        place = len(decoding)
        for row, prompt in enumerate(prefilling, start=len(decoding)):
            chunk_end = place + len(additions[row][1])
            prompt.routed_experts += routed[place:chunk_end]
            place = chunk_end
            if prompt.fed == len(prompt.ids):
                prompt.logits_V = logits_MV[row]
        self._prefilling = [prompt for prompt in prefilling if prompt.fed < len(prompt.ids)]
        return logits_MV[: len(decoding)], routed

    def _chunk(self, decoding: list[Request]) -> int:
        """How many tokens of each prompt go into this call."""
        sequences = len(decoding) + len(self._prefilling)
        longest = max(
            [len(r.prompt_ids) + len(r.token_ids) for r in decoding]
            + [len(prompt.ids) for prompt in self._prefilling]
        )
        return max(SMALLEST_CHUNK, SCORES_PER_CALL // (sequences * longest))

    def _join(self, request: Request, prompt: _Prompt) -> None:
        """Give the request its own sequence: a fork of the prompt's, or that itself for the last
        one.
        """
        assert prompt.sequence is not None
        prompt.unjoined -= 1
        if prompt.unjoined:
            request._sequence = self._cache.fork(prompt.sequence)
        else:
            request._sequence, prompt.sequence = prompt.sequence, None

    def _retire(self, progressed: list[Request]) -> None:
        done = False
        for request in progressed:
            if request.token_ids[-1] == self.eos_id and not request.params.ignore_eos:
                self._finish(request, "stop")
            elif len(request.token_ids) == request._limit:
                self._finish(request, "length")
            else:
                continue
            done = True
            self._reserved -= request._limit - 1
        if done:
            self._running = [request for request in self._running if request.finish_reason is None]

    def _finish(self, request: Request, reason: FinishReason) -> None:
        """Free what the request alone holds, and its prompt with the last request that shares it."""
        prompt = request._prompt
        assert prompt is not None
        request.finish_reason, request._prompt = reason, None
        if request._sequence is not None:
            self._cache.free(request._sequence)
            request._sequence = None
        else:
            prompt.unjoined -= 1
        prompt.unfinished -= 1
        if prompt.unfinished:
            return
        if prompt.sequence is not None:
            self._cache.free(prompt.sequence)
            prompt.sequence = None
        if prompt.charged:
            self._reserved -= len(prompt.ids)
        self._prefilling = [other for other in self._prefilling if other is not prompt]
