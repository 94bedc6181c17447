"""Many prompts, each continued to its end, for reinforcement learning and evaluation.

Not here: text (llm).
"""

from collections.abc import Sequence
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
) -> list[Request]:
    """Continue every prompt; returns finished requests in the order of `prompts`.

    `params` is one for all prompts, or one per prompt. With one for all, equal prompts get equal
    tokens, because they share a seed. Equal neighbouring prompts are computed once. The cache has
    room for `concurrency` requests of the largest size. Errors as in `Engine.add`.
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
    while engine.has_work:
        engine.step()
    return requests
