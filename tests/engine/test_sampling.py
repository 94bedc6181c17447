"""Sampling against a plain float64 oracle written with sorted lists, and against expected
frequencies.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xushi.base.errors import XushiError
from xushi.engine import SamplingParams, sample
from xushi.engine.sampling import request_uniforms, sampling_key


@pytest.mark.parametrize("size", [4, 128])
def test_a_number_on_a_border_is_the_next_tokens(size: int) -> None:
    """Token i has the interval from the sum before it, included, to its own sum, excluded. Equal
    tokens have borders that are exact.
    """
    numbers = np.arange(1, 4) / 4
    found = sample(torch.zeros(3, size), [SamplingParams(1)] * 3, numbers)
    assert found.tokens == [size // 4, size // 2, size * 3 // 4]


def oracle(logits: list[float], p: SamplingParams) -> tuple[list[float], list[float]]:
    """Probabilities of every token under the model and under the sampling distribution."""

    def softmax(values):
        best = max(values)
        weights = [math.exp(v - best) for v in values]
        return [w / math.fsum(weights) for w in weights]

    model = softmax(logits)
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if p.temperature == 0:
        return model, [float(i == order[0]) for i in range(len(logits))]
    shaped = softmax([value / p.temperature for value in logits])
    kept = order[: p.top_k or None]
    if p.top_p < 1:
        mass, total, nucleus = 0.0, math.fsum(shaped[i] for i in kept), []
        for i in kept:
            if mass >= p.top_p * total:
                break
            nucleus.append(i)
            mass += shaped[i]
        kept = nucleus
    total = math.fsum(shaped[i] for i in kept)
    return model, [shaped[i] / total if i in kept else 0.0 for i in range(len(logits))]


params_strategy = st.builds(
    SamplingParams,
    max_tokens=st.just(1),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.0, 1.7]),
    top_p=st.sampled_from([1.0, 1.0, 0.9, 0.5, 1e-6]),
    top_k=st.sampled_from([0, 0, 1, 3, 100]),
)


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(-40, 40).map(lambda i: i / 8), min_size=9, max_size=9),
            params_strategy,
            st.floats(0.001, 0.999),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_matches_the_oracle_row_by_row(rows):
    logits = torch.tensor([row[0] for row in rows])
    got = sample(logits, [row[1] for row in rows], np.array([row[2] for row in rows]))
    for i, (values, p, u) in enumerate(rows):
        model, own = oracle(values, p)
        token = got.tokens[i]
        assert own[token] > 0
        assert got.logprobs[i] == pytest.approx(math.log(model[token]), abs=2e-6)
        assert got.sampling_logprobs[i] == pytest.approx(math.log(own[token]), abs=2e-6)
        if p.temperature:
            before = math.fsum(own[:token])
            assert before - 1e-6 <= u <= before + own[token] + 1e-6


@given(st.lists(params_strategy, min_size=2, max_size=5), st.integers(0, 1000))
def test_a_row_does_not_depend_on_its_neighbours(params, seed):
    logits = torch.randn(len(params), 11, generator=torch.Generator().manual_seed(seed))
    u = np.random.default_rng(seed).random(len(params))
    together = sample(logits, params, u)
    for i, p in enumerate(params):
        alone = sample(logits[i : i + 1], [p], u[i : i + 1])
        assert alone.tokens == [together.tokens[i]]
        assert alone.logprobs == [together.logprobs[i]]
        assert alone.sampling_logprobs == [together.sampling_logprobs[i]]


@pytest.mark.parametrize(
    "p",
    [
        SamplingParams(1),
        SamplingParams(1, temperature=0.6),
        SamplingParams(1, top_p=0.8),
        SamplingParams(1, top_k=4, top_p=0.9, temperature=1.3),
    ],
)
def test_frequencies(p):
    logits = torch.randn(12, generator=torch.Generator().manual_seed(5))
    _, expected = oracle(logits.double().tolist(), p)
    n = 20000
    keys = [sampling_key(seed) for seed in range(n // 100) for _ in range(100)]
    u = request_uniforms(keys, list(range(100)) * (n // 100))
    tokens = sample(logits.expand(n, -1), [p] * n, u).tokens
    counts = np.bincount(tokens, minlength=12)
    assert all(counts[i] == 0 for i in range(12) if expected[i] == 0)
    kept = [i for i in range(12) if expected[i] > 0]
    chi_square = sum((counts[i] - n * expected[i]) ** 2 / (n * expected[i]) for i in kept)
    degrees = len(kept) - 1
    assert chi_square < degrees + 4 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("size", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("dead", [0.0, 0.9])
def test_every_vocabulary_size_against_the_running_sum(size, dead):
    generator = torch.Generator().manual_seed(size)
    logits = 3 * torch.randn(400, size, generator=generator)
    logits[
        torch.rand(400, size, generator=generator) < dead
    ] = -1e4  # whole blocks without any probability
    u = np.random.default_rng(size).random(400)
    tokens = sample(logits, [SamplingParams(1)] * 400, u).tokens
    probabilities = logits.double().softmax(-1)
    after = probabilities.cumsum(-1)[range(400), tokens].numpy()
    before = after - probabilities[range(400), tokens].numpy()
    assert (before - 1e-6 <= u).all()
    assert (u <= after + 1e-6).all()


def test_greedy_takes_the_lowest_id_among_equals():
    got = sample(
        torch.tensor([[0.0, 2.0, 2.0, 1.0]] * 2),
        [SamplingParams(1, temperature=0), SamplingParams(1)],
        np.array([0.9, 1e-9]),
    )
    assert got.tokens == [1, 0]
    assert got.sampling_logprobs[0] == 0


def test_at_temperature_one_both_log_probabilities_are_the_same_bits():
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(1))
    got = sample(logits, [SamplingParams(1)] * 50, np.linspace(0.01, 0.99, 50))
    assert got.logprobs == got.sampling_logprobs


@pytest.mark.parametrize("u", [2.0**-54, 1 - 2.0**-53, 1.0])
@pytest.mark.parametrize(
    "p", [SamplingParams(1), SamplingParams(1, temperature=1e-300), SamplingParams(1, top_k=2)]
)
def test_extreme_uniforms_never_take_an_impossible_token(u, p):
    logits = torch.tensor([[-1e30, 5.0, 4.0, 3.0, -1e30]])
    assert sample(logits, [p], np.array([u])).tokens[0] in (1, 2, 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_logits_that_are_no_numbers_are_reported(bad, temperature):
    with pytest.raises(XushiError, match="not finite"):
        sample(
            torch.tensor([[0.0, bad, 1.0]]),
            [SamplingParams(1, temperature=temperature)],
            np.array([0.5]),
        )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", -1),
        ("top_logprobs", -1),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("seed", 0.5),
        ("stop", "text"),
        ("stop", ("",)),
    ],
)
def test_parameters_out_of_range_are_named(name, value):
    with pytest.raises(XushiError, match=name):
        SamplingParams(**{"max_tokens": 1, name: value})


def test_top_p_counts_what_top_k_left():
    """Of 0.4, 0.3, 0.2, 0.1 two are left; 0.5 of their 0.7 is in the first, 0.5 of 1 is not."""
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    got = sample(logits, [SamplingParams(1, top_k=2, top_p=0.5)], np.array([0.99]))
    assert got.tokens == [0]
    assert got.sampling_logprobs == [0.0]
