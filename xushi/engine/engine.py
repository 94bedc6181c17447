"""Continuous batching: requests enter and leave between steps, and each step is one call of the
model.

One thread owns an engine. Not here: text and stop strings (text, llm), threads and HTTP (serve).
"""

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from xushi.base.errors import BadInput
from xushi.engine.kept import KeptSequences
from xushi.engine.params import SamplingParams
from xushi.engine.request import ContextLengthError, EndTokens, FinishReason, Prompt, Request
from xushi.engine.sampling import request_uniforms, sample, sampling_key
from xushi.engine.scores import LOGITS_PER_CALL, PromptScores, want_every_row
from xushi.model import Deepseek, LatentCache

# The model pads each sequence of a call to the call's longest chunk of new tokens, and attention
# pads to its longest sequence. Prompts are fed in chunks that keep sequences x chunk x length at or
# below this many scores per head.
SCORES_PER_CALL = 1 << 22
SMALLEST_CHUNK = 16


class Engine:
    """Generates for many requests at once with a cache of `slots` tokens.

    A request enters when the cache has room for its prompt and all it may generate, in the order of
    adding; so a request that has entered always runs to its end. The model is used as it is, its
    training flag included.

    A request added with `keep` leaves its sequence in the cache when it finishes, for `extend`.
    Such a sequence never blocks the queue: where the next request needs its slots, its entries are
    copied out of the cache, and copied back when it is extended. So whatever is waiting, and in
    whatever order a caller extends and releases, the first of the queue enters once the running
    requests have finished.
    """

    def __init__(
        self, model: Deepseek, eos_ids: EndTokens, slots: int, weights_version: int = 0
    ) -> None:
        self.model = model
        self.eos_ids = frozenset([eos_ids] if isinstance(eos_ids, int) else eos_ids)
        self.slots = slots
        self.weights_version = weights_version
        self.context = model.config.max_position_embeddings
        weight = model.head_VD
        dtype = model.compute_dtype or weight.dtype
        self._cache = LatentCache(model.config, slots, dtype, weight.device)
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._prefilling: list[Prompt] = []
        self._kept = KeptSequences(self._cache)

    def restart(self) -> None:
        """Abort all requests and empty the cache, for example after a step has failed. What was
        kept in it is lost too. It needs no memory of the cache's size, since memory may be what a
        step lacked.
        """
        for request in [*self._waiting, *self._running]:
            request.finish_reason = "abort"
            request._prompt = request._sequence = None
        self._waiting.clear()
        self._running.clear()
        self._prefilling.clear()
        self._cache.clear()
        self._kept = KeptSequences(self._cache)

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._waiting or self._running)

    @property
    def idle_slots(self) -> int:
        """Cache slots that no sequence holds; all of them when nothing is unfinished or kept."""
        return self._cache.available

    def check(self, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Raise the `XushiError` that `add` would raise. Changes nothing, so any thread may call
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
        if len(prompt_ids) + min(params.max_tokens, 1) > self.context:
            raise self.too_long(len(prompt_ids))
        need = len(prompt_ids) + max(self._limit(prompt_ids, params) - 1, 0)
        if need > self.slots:
            raise BadInput(
                f"the request needs {need} places in the cache, which has {self.slots}",
                "shorten the prompt, lower max_tokens or give the engine more slots",
            )

    def too_long(self, tokens: int, at_least: bool = False) -> ContextLengthError:
        """The error for a prompt of `tokens` tokens, or more where `at_least` is set."""
        whole = self.model.config.max_position_embeddings
        return ContextLengthError(tokens, self.context, whole, at_least)

    def add(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        routing: bool = False,
        keep: bool = False,
    ) -> Request:
        """Queue one request. Tokens beyond the context are cut from max_tokens.

        `routing` records the routed experts. With `keep` the finished request holds its sequence
        until `extend` or `release`. Errors as in `check`.
        """
        return self.add_group(prompt_ids, [params], routing, keep)[0]

    def add_group(
        self,
        prompt_ids: Sequence[int],
        params: Sequence[SamplingParams],
        routing: bool = False,
        keep: bool = False,
    ) -> list[Request]:
        """Queue several continuations of one prompt, which is computed and held once. If several
        ask for its scores, they share those with the most alternatives.
        """
        for each in params:
            self.check(prompt_ids, each)
        prompt = Prompt(list(prompt_ids), unfinished=len(params), unjoined=len(params))
        if scored := [each.top_logprobs for each in params if each.prompt_logprobs]:
            prompt.scores = PromptScores(max(scored))
        return [self._queue(prompt, each, [] if routing else None, keep) for each in params]

    def extend(self, request: Request, more_ids: Sequence[int], params: SamplingParams) -> Request:
        """Queue a continuation of a finished request that was added with `keep`.

        The new prompt is the old one, its tokens and `more_ids`; only what the cache does not have
        is computed. The new request's `routed_experts` cover the whole prompt. It is kept like the
        old one, which holds nothing any more. The weights must be those of the old request. Errors
        as in `check`, and then the old request still holds its sequence.
        """
        kept = request._kept
        if kept is None or not self._kept.holds(kept):
            raise BadInput(
                "the request holds no sequence to extend",
                "add it with keep=True, let it finish, and extend or release it once",
            )
        ids = [*request.prompt_ids, *request.token_ids, *more_ids]
        self.check(ids, params)
        if params.prompt_logprobs or len(ids) == kept.length:
            raise BadInput(
                "a kept sequence is not computed again, so its tokens get no log-probabilities and "
                "no logits",
                "extend it by at least one token and without prompt_logprobs, or add the prompt "
                "again",
            )
        request._kept = None
        experts = request.routed_experts
        prompt = Prompt(
            ids,
            unfinished=1,
            unjoined=1,
            kept=kept,
            fed=kept.length,
            routed_experts=list(experts or []),
        )
        return self._queue(prompt, params, None if experts is None else [], keep=True)

    def release(self, request: Request) -> None:
        """Give back what a request holds, and end it if it is unfinished; else without effect."""
        self.abort(request)
        if request._kept is not None:
            self._kept.drop(request._kept)
            request._kept = None

    def abort(self, request: Request, reason: FinishReason = "abort") -> None:
        """End an unfinished request now; it keeps nothing. No effect on a finished one."""
        if request.finish_reason is not None:
            return
        waiting = len(self._waiting)
        self._waiting = deque(other for other in self._waiting if other is not request)
        if len(self._waiting) == waiting:
            self._running.remove(request)
        self._finish(request, reason)

    @torch.no_grad()
    def step(self) -> list[Request]:
        """One call of the model for all that runs; returns the requests that got a token, or whose
        prompt is done and which want none.
        """
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
            request._record(sampled, row)
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

    def _limit(self, prompt_ids: Sequence[int], params: SamplingParams) -> int:
        return min(params.max_tokens, self.context - len(prompt_ids))

    def _queue(
        self, prompt: Prompt, params: SamplingParams, experts: list[Tensor] | None, keep: bool
    ) -> Request:
        request = Request(
            prompt.ids,
            params,
            self.weights_version,
            experts,
            _prompt=prompt,
            _limit=self._limit(prompt.ids, params),
            _key=sampling_key(params.seed),
            _keep=keep,
        )
        self._waiting.append(request)
        return request

    def _admit(self) -> None:
        """Move requests from the queue while the cache has room for all they may come to hold."""
        if not self._waiting:
            return
        room = self._cache.available - self._promised()
        while self._waiting:
            request = self._waiting[0]
            prompt = request._prompt
            assert prompt is not None
            # The last token is never fed, so it needs no slot.
            need = max(request._limit - 1, 0) + (0 if prompt.admitted else prompt.places)
            if need > room:
                room += self._kept.make_room(need - room, prompt.kept)
            if need > room:
                return
            room -= need
            self._waiting.popleft()
            self._running.append(request)
            if not prompt.admitted:
                prompt.admitted = True
                prompt.sequence = (
                    self._cache.allocate() if prompt.kept is None else self._kept.take(prompt.kept)
                )
                prompt.kept = None
                self._prefilling.append(prompt)

    def _promised(self) -> int:
        """Slots that admitted requests and their prompts do not hold yet and may come to hold."""
        prompts = sum(len(prompt.ids) - prompt.fed for prompt in self._prefilling)
        # Of n generated tokens n - 1 are in the cache, and the last of `_limit` never will be.
        return prompts + sum(max(r._limit, 1) - max(len(r.token_ids), 1) for r in self._running)

    def _decode(self, decoding: list[Request]) -> tuple[Tensor, list[Tensor]]:
        """Feed the last token of each decoding request and the next chunk of each unfed prompt.

        Returns the decoding requests' logits [decoding, V] and, if a running request asks for them,
        the experts [MoE layers, k] of all tokens of the call, the decoding requests' first. A
        prompt's logits and experts are stored in it.
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
        flat = self._cache.extend(additions)
        if any(prompt.scores for prompt in prefilling):
            scored = [False] * len(decoding) + [prompt.scores is not None for prompt in prefilling]
            flat = want_every_row(flat, scored)
        decoded = self.model.decode(flat, self._cache, wants_routing)
        logits_MV = decoded.logits_MV
        routed: list[Tensor] = []
        if wants_routing:
            fed = sum(len(tokens) for _, tokens in additions)
            experts = decoded.routed_experts  # none of a dense model
            routed = (
                [torch.empty(0, 0, dtype=torch.int64)] * fed
                if experts is None
                else [*experts.cpu().unbind(1)]
            )
        place = row = len(decoding)
        for prompt, (_, chunk_ids) in zip(prefilling, additions[row:], strict=True):
            prompt.routed_experts += routed[place : place + len(chunk_ids)]
            place += len(chunk_ids)
            rows = len(chunk_ids) if prompt.scores else 1
            if prompt.scores:
                next_ids = prompt.ids[prompt.fed - len(chunk_ids) + 1 : prompt.fed + 1]
                prompt.scores.add(logits_MV[row : row + len(next_ids)], next_ids)
            row += rows
            if prompt.fed == len(prompt.ids):
                prompt.logits_V = logits_MV[row - 1]
        self._prefilling = [prompt for prompt in prefilling if prompt.fed < len(prompt.ids)]
        return logits_MV[: len(decoding)], routed

    def _chunk(self, decoding: list[Request]) -> int:
        """How many tokens of each prompt go into this call."""
        sequences = len(decoding) + len(self._prefilling)
        longest = max(
            [len(r.prompt_ids) + len(r.token_ids) for r in decoding]
            + [len(prompt.ids) for prompt in self._prefilling]
        )
        chunk = SCORES_PER_CALL // (sequences * longest)
        if scored := sum(prompt.scores is not None for prompt in self._prefilling):
            chunk = min(chunk, LOGITS_PER_CALL // (scored * self.model.config.vocab_size))
        return max(SMALLEST_CHUNK, chunk)

    def _join(self, request: Request, prompt: Prompt) -> None:
        """Give the request its own sequence: a fork of the prompt's, or for the last request the
        prompt's itself.
        """
        assert prompt.sequence is not None
        prompt.unjoined -= 1
        request.prompt_scores = prompt.scores if request.params.prompt_logprobs else None
        if prompt.unjoined:
            request._sequence = self._cache.fork(prompt.sequence)
        else:
            request._sequence, prompt.sequence = prompt.sequence, None

    def _retire(self, progressed: list[Request]) -> None:
        done = False
        for request in progressed:
            ended = request.token_ids and request.token_ids[-1] in self.eos_ids
            if ended and not request.params.ignore_eos:
                self._finish(request, "stop", request._keep)
            elif len(request.token_ids) == request._limit:
                self._finish(request, "length", request._keep)
            else:
                continue
            done = True
        if done:
            self._running = [request for request in self._running if request.finish_reason is None]

    def _finish(self, request: Request, reason: FinishReason, keep: bool = False) -> None:
        """Keep or free the request's sequence, and free its prompt with the last that shares it."""
        prompt = request._prompt
        assert prompt is not None
        request.finish_reason = reason
        request._prompt = None
        if request._sequence is None:
            prompt.unjoined -= 1
        elif keep:
            request._kept = self._kept.add(request._sequence)
        else:
            self._cache.free(request._sequence)
        request._sequence = None
        prompt.unfinished -= 1
        if prompt.unfinished:
            return
        if prompt.sequence is not None:
            self._cache.free(prompt.sequence)
            prompt.sequence = None
        if prompt.kept is not None:
            self._kept.drop(prompt.kept)
        self._prefilling = [other for other in self._prefilling if other is not prompt]
