"""What the engine knows of a request and of its prompt.

Not here: when anything of it changes (engine).
"""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from xushi.engine.kept import KeptSequence
from xushi.engine.params import SamplingParams

FinishReason = Literal["stop", "length", "abort"]


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
    1, whole vocabulary), and `sampling_logprobs` under the distribution it was drawn from. If
    routing was asked for, `routed_experts` has int64 [MoE layers, k] for each place that was
    computed: the prompt's, and each token's but the last one's.
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
    _keep: bool = False
    _sequence: int | None = None  # its id in the cache, from joining until finished
    _prompt: Prompt | None = None  # until finished
    _kept: KeptSequence | None = None  # once finished, until extended or released
