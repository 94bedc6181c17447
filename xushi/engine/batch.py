"""Many prompts, each continued to its end, for reinforcement learning and evaluation.

Not here: text (llm).
"""

from collections.abc import Callable, Sequence
from itertools import groupby

from xushi.base.errors import BadInput
from xushi.engine.engine import Engine
from xushi.engine.params import SamplingParams
from xushi.engine.request import EndTokens, Request
from xushi.model import Deepseek


def generate_ids(
    model: Deepseek,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    eos_id: EndTokens,
    *,
    concurrency: int = 256,
    weights_version: int = 0,
    routing: bool = False,
    finished: Callable[[int, Request], None] | None = None,
) -> list[Request]:
    """Continue every prompt; returns finished requests in the order of `prompts`.

    `params` is one for all prompts, or one per prompt. With one for all, equal prompts get equal
    tokens, because they share a seed. Equal neighbouring prompts are computed once. The cache has
    room for `concurrency` requests of the largest size. `finished` is called with the number of a
    prompt and its request, as soon as it has finished. Errors as in `Engine.add`.
    """
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    if len(each) != len(prompts):
        raise BadInput(
            f"{len(prompts)} prompts and {len(each)} sampling parameters",
            "give one for all or one each",
        )
    if not prompts:
        return []
    context = model.config.max_position_embeddings
    largest = max(
        min(len(prompt) + p.max_tokens, context) for prompt, p in zip(prompts, each, strict=True)
    )
    engine = Engine(model, eos_id, min(concurrency, len(prompts)) * largest, weights_version)
    requests: list[Request] = []
    for _, group in groupby(zip(prompts, each, strict=True), key=lambda pair: list(pair[0])):
        pairs = list(group)
        requests += engine.add_group(pairs[0][0], [p for _, p in pairs], routing)
    _run(engine, requests, finished)
    return requests


def _run(
    engine: Engine,
    requests: Sequence[Request],
    finished: Callable[[int, Request], None] | None,
) -> None:
    """Step until all have finished, and tell of each as soon as it has."""
    waiting: Sequence[int] = range(len(requests)) if finished else ()
    while engine.has_work:
        engine.step()
        ended = [number for number in waiting if requests[number].finish_reason is not None]
        waiting = [number for number in waiting if requests[number].finish_reason is None]
        for number in ended:
            assert finished is not None
            finished(number, requests[number])
