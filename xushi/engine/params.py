"""The sampling parameters of one request. Not here: how a token is drawn (sampling)."""

import math
from dataclasses import dataclass

from xushi.base.errors import BadInput


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is continued. A value out of range is a `XushiError` that names the
    parameter.

    max_tokens: the largest number of generated tokens; 0 only computes the prompt. temperature: 0
    takes the most probable token. top_p: keep the smallest set of tokens that holds this
    probability. top_k: keep this many tokens; 0 keeps all. seed: the same prompt, weights and seed
    give the same tokens. stop: generation ends before any of these strings; only callers that make
    text (`LLM`, serve) look for them. ignore_eos: generate max_tokens tokens, for measurements.
    top_logprobs: how many of the most probable tokens to give at each place. prompt_logprobs: give
    log-probabilities of the prompt's tokens too.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    top_logprobs: int = 0
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        _whole("max_tokens", self.max_tokens, 0)
        _whole("top_k", self.top_k, 0)
        _whole("top_logprobs", self.top_logprobs, 0)
        _whole("seed", self.seed, None)
        if not (_is_number(self.temperature) and self.temperature >= 0):
            raise _wrong("temperature", self.temperature, "a number from 0 up")
        if not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise _wrong("top_p", self.top_p, "more than 0 and at most 1")
        if not isinstance(self.stop, tuple | list) or not all(
            isinstance(text, str) and text for text in self.stop
        ):
            raise BadInput(
                f"sampling parameter stop is {self.stop!r}",
                "give a tuple of strings that are not empty",
            )


def _whole(name: str, value: int, least: int | None) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or (least is not None and value < least)
    ):
        bound = "" if least is None else f" of at least {least}"
        raise _wrong(name, value, f"a whole number{bound}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _wrong(name: str, value: object, wanted: str) -> BadInput:
    return BadInput(f"sampling parameter {name} is {value!r}", f"give {wanted}")
