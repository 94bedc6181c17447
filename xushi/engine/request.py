"""What the engine knows of a request and of its prompt.

Not here: when anything of it changes (engine).
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from xushi.base.errors import BadInput
from xushi.engine.kept import KeptSequence
from xushi.engine.params import SamplingParams
from xushi.engine.sampling import Alternatives, Sampled
from xushi.engine.scores import PromptScores

EndTokens = int | Collection[int]  # each of the ids ends a request
FinishReason = Literal["stop", "length", "abort"]


class ContextLengthError(BadInput):
    """A prompt that leaves no room for an answer in the context.

    `at_least` says that the prompt was not counted, and has this many tokens or more. `whole` is
    the model's own context, of which the cache may hold less.
    """

    def __init__(
        self, prompt_tokens: int, context: int, whole: int, at_least: bool = False
    ) -> None:
        holder = "model's context holds" if context >= whole else "cache holds"
        super().__init__(
            f"the prompt has {'at least ' if at_least else ''}{prompt_tokens} tokens and the "
            f"{holder} {context}, at least one of them for an answer",
            "shorten the prompt"
            if context >= whole
            else f"shorten the prompt, or give a larger cache, up to the model's context of {whole}"
            ": --cache-tokens (LLM: slots); --dtype bf16 makes room for more",
        )
        self.prompt_tokens = prompt_tokens
        self.context = context


@dataclass(eq=False, slots=True)
class Prompt:
    """A prompt in the cache, for the requests that share it."""

    ids: list[int]
    unfinished: int  # requests
    unjoined: int  # requests that do not have their own sequence yet
    admitted: bool = False
    sequence: int | None = None  # its id in the cache, once admitted
    kept: KeptSequence | None = None  # the beginning of an extended prompt, until admitted
    fed: int = 0  # tokens in the cache
    logits_V: Tensor | None = None  # of the last token, from when it is fed until all have joined
    routed_experts: list[Tensor] = field(default_factory=list)  # of `fed` tokens, if wanted
    scores: PromptScores | None = None  # of its tokens, if wanted

    @property
    def places(self) -> int:
        """Cache slots that its admission takes."""
        in_cache = 0 if self.kept is None or self.kept.entries is not None else self.kept.length
        return len(self.ids) - in_cache

    def forget_logits(self) -> None:
        """Drop the matrix of that call's logits; keep this row while requests wait to join."""
        self.logits_V = (
            self.logits_V.clone() if self.logits_V is not None and self.unjoined else None
        )


@dataclass(eq=False, slots=True)
class Request:
    """One continuation of one prompt; read it between steps, never write it.

    `token_ids` ends with eos if eos was sampled. Per token: `logprobs` under the model (temperature
    1, whole vocabulary), `sampling_logprobs` under the distribution it was drawn from, and
    `top_logprobs`, the most probable tokens, as many as `params` asks for. `prompt_scores` are
    there, if asked for, once the prompt is computed. If routing was asked for, `routed_experts` has
    int64 [MoE layers, k] for each place that was computed: the prompt's, and each token's but the
    last one's.
    """

    prompt_ids: list[int]
    params: SamplingParams
    weights_version: int
    routed_experts: list[Tensor] | None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampling_logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[Alternatives] = field(default_factory=list)
    prompt_scores: PromptScores | None = None
    finish_reason: FinishReason | None = None
    _limit: int = 0  # of generated tokens
    _key: int = 0
    _keep: bool = False
    _sequence: int | None = None  # its id in the cache, from joining until finished
    _prompt: Prompt | None = None  # until finished
    _kept: KeptSequence | None = None  # once finished, until extended or released

    def _record(self, sampled: Sampled, row: int) -> None:
        """Take row `row`'s token, unless only the prompt is wanted."""
        if self._limit:
            self.token_ids.append(sampled.tokens[row])
            self.logprobs.append(sampled.logprobs[row])
            self.sampling_logprobs.append(sampled.sampling_logprobs[row])
            self.top_logprobs.append(sampled.top_logprobs[row])
