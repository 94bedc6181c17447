"""From logits to tokens: each row has its own parameters and one uniform number per token.

A token is the inverse of the cumulative distribution, in the order of token ids, at a uniform
number. That number depends on the request's seed and on how many tokens it has so far, and on
nothing else in the batch.

Axes: M rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from xushi.base.errors import Failed
from xushi.base.seeds import derive, uniforms
from xushi.engine.params import SamplingParams

BLOCK = 64

# Tokens with their log-probabilities, the most probable first.
Alternatives = list[tuple[int, float]]

NOT_FINITE = (
    "the model's logits are not finite numbers, so no token can be drawn",
    "its weights are damaged or diverged: load an earlier checkpoint",
)


@dataclass(frozen=True, slots=True)
class Sampled:
    """Per row: the token, its natural log-probability under the model and under the sampling
    distribution, and the most probable tokens under the model, as many as its parameters ask for.
    """

    tokens: list[int]
    logprobs: list[float]
    sampling_logprobs: list[float]
    top_logprobs: list[Alternatives]


def sampling_key(seed: int) -> int:
    """The 64-bit key of a request's stream of uniform numbers."""
    return derive(seed, "sampling")


def sample(
    logits_MV: Tensor, params: Sequence[SamplingParams], uniforms_M: npt.NDArray[np.float64]
) -> Sampled:
    """Draw one token per row of float32 logits [M, V] with uniform numbers [M] in (0, 1).

    Temperature divides the logits; then top-k keeps the k most probable tokens, then top-p the
    smallest set of those whose renormalised probability reaches p; among equals the lower id goes
    first. Temperature 0 takes the argmax, whose sampling log-probability is 0. The model's
    log-probability is at temperature 1 over the whole vocabulary. Logits that are not finite
    numbers are a `XushiError`.
    """
    logprobs_MV = torch.log_softmax(logits_MV, dim=-1)
    size = logits_MV.shape[1]
    tokens = np.zeros(len(params), dtype=np.int64)
    own = np.zeros(len(params), dtype=np.float64)  # the sampling log-probabilities
    # Three computations, chosen row by row: other rows must not change how one is rounded.
    greedy = [row for row, p in enumerate(params) if p.temperature == 0]
    shaped = [row for row, p in enumerate(params) if p.temperature and _is_shaped(p, size)]
    plain = [row for row, p in enumerate(params) if p.temperature and not _is_shaped(p, size)]
    if greedy:
        tokens[greedy] = _rows(logprobs_MV, greedy).argmax(-1).cpu().numpy()
    for rows in (plain, shaped):
        if rows:
            scores_MV = _rows(logprobs_MV, rows)
            if rows is shaped:
                scores_MV = _shape(scores_MV, [params[row] for row in rows])
            tokens_M, own_M = _draw(scores_MV, uniforms_M[rows])
            tokens[rows], own[rows] = tokens_M.cpu().numpy(), own_M.cpu().numpy()
    chosen = torch.from_numpy(tokens).to(logits_MV.device)
    model = logprobs_MV.gather(1, chosen[:, None])[:, 0].double().cpu().numpy()
    if not np.isfinite(model).all():
        raise Failed(*NOT_FINITE)
    top = most_probable(logprobs_MV, [p.top_logprobs for p in params])
    return Sampled(tokens.tolist(), model.tolist(), own.tolist(), top)


def most_probable(logprobs_MV: Tensor, counts: Sequence[int]) -> list[Alternatives]:
    """Per row of log-probabilities [M, V] the `counts[row]` most probable tokens, of equals the
    lower id first.
    """
    most = min(max(counts, default=0), logprobs_MV.shape[1])
    if most == 0:
        return [[] for _ in counts]
    values_MK, tokens_MK = logprobs_MV.topk(most, dim=-1)
    rows = zip(tokens_MK.tolist(), values_MK.tolist(), counts, strict=True)
    return [
        sorted(zip(tokens, values, strict=True), key=lambda pair: (-pair[1], pair[0]))[:count]
        for tokens, values, count in rows
    ]


def request_uniforms(keys: Sequence[int], counters: Sequence[int]) -> npt.NDArray[np.float64]:
    """The next uniform numbers of requests, from their keys and how many tokens they have."""
    return uniforms(np.array(keys, dtype=np.uint64), np.array(counters, dtype=np.uint64))


def _rows(table_MV: Tensor, rows: list[int]) -> Tensor:
    if len(rows) == table_MV.shape[0]:
        return table_MV
    return table_MV.index_select(0, torch.tensor(rows, device=table_MV.device))


def _is_shaped(params: SamplingParams, size: int) -> bool:
    return params.temperature != 1 or params.top_p < 1 or 0 < params.top_k < size


def _draw(scores_MV: Tensor, uniforms_M: npt.NDArray[np.float64]) -> tuple[Tensor, Tensor]:
    """Tokens [M] drawn from log-probabilities [M, V], and their log-probabilities [M].

    The block of tokens is found first, then the place in it, because running sums over a whole
    vocabulary take a tenth of the time of a small model's step. Axes: X blocks, Z tokens of a
    block.
    """
    size = scores_MV.shape[1]
    weights_MV = (
        scores_MV.exp() if size % BLOCK == 0 else F.pad(scores_MV.exp(), (0, -size % BLOCK))
    )
    weights_MXZ = weights_MV.view(len(uniforms_M), -1, BLOCK)
    blocks_MX = weights_MXZ.sum(-1).double().cumsum(-1)
    target_M1 = torch.from_numpy(uniforms_M).to(blocks_MX.device)[:, None] * blocks_MX[:, -1:]
    block_M1 = _place(blocks_MX, target_M1)
    before_M1 = blocks_MX.gather(1, (block_M1 - 1).clamp(min=0)).masked_fill(block_M1 == 0, 0.0)
    inside_MZ = (
        weights_MXZ.gather(1, block_M1[..., None].expand(-1, -1, BLOCK))[:, 0].double().cumsum(-1)
    )
    tokens_M1 = block_M1 * BLOCK + _place(inside_MZ, target_M1 - before_M1)
    tokens_M1.clamp_(max=size - 1)  # NaN in the logits finds no place; `sample` reports it
    return tokens_M1[:, 0], scores_MV.gather(1, tokens_M1)[:, 0]


def _place(cumulative: Tensor, target_M1: Tensor) -> Tensor:
    """The first place in rising sums [M, n] whose sum is above the target.

    The target is kept below the total, which rounding may have reached, so the place always has a
    weight above 0.
    """
    total_M1 = cumulative[:, -1:]
    below_M1 = torch.minimum(target_M1, torch.nextafter(total_M1, torch.zeros_like(total_M1)))
    return torch.searchsorted(cumulative, below_M1, right=True).clamp(max=cumulative.shape[1] - 1)


def _shape(logprobs_MV: Tensor, params: list[SamplingParams]) -> Tensor:
    """Log-probabilities [M, V], float64, after temperature, top-k and top-p."""
    temperature_M = torch.tensor(
        [p.temperature for p in params], dtype=torch.float64, device=logprobs_MV.device
    )
    # Subtracting the maximum first keeps the smallest temperatures from overflowing.
    relative_MV = logprobs_MV.double() - logprobs_MV.double().amax(-1, keepdim=True)
    scores_MV = (relative_MV / temperature_M[:, None]).log_softmax(-1)
    filtered = [
        row for row, p in enumerate(params) if p.top_p < 1 or 0 < p.top_k < logprobs_MV.shape[1]
    ]
    if not filtered:
        return scores_MV
    kept_MV = _filter(_rows(scores_MV, filtered), [params[row] for row in filtered])
    return scores_MV.index_copy(0, torch.tensor(filtered, device=kept_MV.device), kept_MV)


def _filter(scores_MV: Tensor, params: list[SamplingParams]) -> Tensor:
    """Log-probabilities [M, V]: -inf for tokens that top-k or top-p drop, the rest renormalised."""
    size = scores_MV.shape[1]
    top_k_M = torch.tensor([min(p.top_k, size) or size for p in params], device=scores_MV.device)
    top_p_M = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=scores_MV.device)
    sorted_MV, order_MV = scores_MV.sort(dim=-1, descending=True, stable=True)
    drop_MV = torch.arange(size, device=scores_MV.device) >= top_k_M[:, None]
    probabilities_MV = sorted_MV.exp().masked_fill(drop_MV, 0.0)
    before_MV = probabilities_MV.cumsum(-1) - probabilities_MV
    # A token is dropped if those before it already hold p. With p = 1 rounding must not drop any.
    reached_MV = before_MV >= (top_p_M * probabilities_MV.sum(-1))[:, None]
    drop_MV |= reached_MV & (top_p_M < 1)[:, None]
    kept_MV = torch.full_like(scores_MV, float("-inf")).scatter(
        1, order_MV, sorted_MV.masked_fill(drop_MV, float("-inf"))
    )
    return kept_MV.log_softmax(-1)
