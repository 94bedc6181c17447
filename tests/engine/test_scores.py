"""Log-probabilities of prompts against the model's own forward pass."""

import itertools

import numpy as np
import pytest
import torch

from xushi.base.errors import XushiError
from xushi.engine import ContextLengthError, Engine, SamplingParams
from xushi.engine import engine as engine_module

EOS = 1
SCORE = SamplingParams(0, top_logprobs=3, prompt_logprobs=True)


def prompts_of(*lengths):
    generator = np.random.default_rng(len(lengths))
    return [generator.integers(2, 272, length).tolist() for length in lengths]


def forward(model, ids):
    """Log-probabilities [places, V] of the model's own forward pass in float32."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    return torch.log_softmax(logits.double(), dim=-1)


def assert_scored(model, ids, scores, alternatives):
    """A logit is computed in two ways, which may differ by 1e-5 of the largest, and a
    log-probability by twice that. A log-probability is about as large as the largest logit.
    """
    expected = forward(model, ids)
    bound = 2e-5 * float(expected.abs().max())
    expected = expected[:-1]
    own = expected.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    np.testing.assert_allclose(scores.logprobs, own, rtol=0, atol=bound)
    assert len(scores.top_logprobs) == len(ids) - 1
    for row, top in zip(expected, scores.top_logprobs, strict=True):
        assert len(top) == alternatives
        assert all(first[1] >= second[1] for first, second in itertools.pairwise(top))
        for token, logprob in top:
            assert logprob == pytest.approx(float(row[token]), abs=bound)
        least = top[-1][1] if top else 0.0
        others = row.clone()
        others[[token for token, _ in top]] = -torch.inf
        assert not top or float(others.max()) <= least + bound


def run(engine):
    while engine.has_work:
        engine.step()


@pytest.mark.parametrize("chunk", [1, 3, 1 << 22])
def test_scores_are_those_of_the_forward_pass(model, monkeypatch, chunk):
    """However many tokens go into a call, and with other requests in it."""
    monkeypatch.setattr(engine_module, "SMALLEST_CHUNK", chunk)
    monkeypatch.setattr(engine_module, "SCORES_PER_CALL", chunk)
    engine = Engine(model, EOS, slots=400)
    greedy = SamplingParams(20, temperature=0, ignore_eos=True)
    beside = engine.add(*prompts_of(9), greedy)
    engine.step()
    prompts = prompts_of(1, 2, 30, 17, 63)
    scored = [engine.add(prompt, SCORE) for prompt in prompts]
    plain = engine.add(*prompts_of(12), greedy)
    run(engine)
    for prompt, request in zip(prompts, scored, strict=True):
        assert (request.token_ids, request.finish_reason) == ([], "length")
        assert_scored(model, prompt, request.prompt_scores, 3)
    for request in (beside, plain):
        assert request.prompt_scores is None
        places = forward(model, [*request.prompt_ids, *request.token_ids])
        assert request.token_ids == places.argmax(-1)[len(request.prompt_ids) - 1 : -1].tolist()
    assert engine.idle_slots == 400


def test_the_number_of_logits_of_a_call_is_limited(model, monkeypatch):
    monkeypatch.setattr(engine_module, "LOGITS_PER_CALL", 2 * 5 * 272)
    monkeypatch.setattr(engine_module, "SMALLEST_CHUNK", 1)
    engine = Engine(model, EOS, slots=100)
    decode = model.decode
    rows = []

    def counted(*arguments):
        decoded = decode(*arguments)
        rows.append(len(decoded.logits_MV))
        return decoded

    monkeypatch.setattr(model, "decode", counted)
    prompts = prompts_of(30, 31)
    scored = [engine.add(prompt, SCORE) for prompt in prompts]
    run(engine)
    assert max(rows) == 10
    for prompt, request in zip(prompts, scored, strict=True):
        assert_scored(model, prompt, request.prompt_scores, 3)


def test_requests_of_one_prompt_share_scores_and_get_their_own_tokens(model):
    engine = Engine(model, EOS, slots=200)
    [prompt] = prompts_of(14)
    params = [
        SamplingParams(4, seed=1, ignore_eos=True, top_logprobs=2, prompt_logprobs=True),
        SamplingParams(4, seed=2, ignore_eos=True),
        SamplingParams(0, top_logprobs=5, prompt_logprobs=True),
    ]
    first, second, third = engine.add_group(prompt, params)
    run(engine)
    assert_scored(model, prompt, first.prompt_scores, 5)
    assert third.prompt_scores is first.prompt_scores
    assert second.prompt_scores is None and second.top_logprobs == [[], [], [], []]
    after = forward(model, [*prompt, *first.token_ids])[len(prompt) - 1 : -1]
    for row, top, token, logprob in zip(
        after, first.top_logprobs, first.token_ids, first.logprobs, strict=True
    ):
        assert [found for found, _ in top] == row.topk(2).indices.tolist()
        assert logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert dict(top).get(token, logprob) == pytest.approx(logprob, abs=1e-6)


def test_several_requests_may_only_want_their_prompt(model):
    engine = Engine(model, EOS, slots=14)
    [prompt] = prompts_of(14)
    requests = engine.add_group(prompt, [SCORE, SCORE, SCORE])
    assert engine.step() == requests
    for request in requests:
        assert (request.token_ids, request.finish_reason) == ([], "length")
        assert_scored(model, prompt, request.prompt_scores, 3)
    assert engine.idle_slots == 14 and not engine.has_work


@pytest.mark.parametrize("steps", [0, 1])
def test_a_prompt_holds_all_its_slots_until_it_is_done(model, monkeypatch, steps):
    """A request that would need one slot too many waits."""
    monkeypatch.setattr(engine_module, "SMALLEST_CHUNK", 1)
    monkeypatch.setattr(engine_module, "SCORES_PER_CALL", 1)
    engine = Engine(model, EOS, slots=10)
    first = engine.add(*prompts_of(6), SCORE)
    for _ in range(steps):
        engine.step()
    second = engine.add([5, 6, 7], SamplingParams(3, ignore_eos=True))  # 5 slots
    while first.finish_reason is None:
        assert second not in engine.step()
    run(engine)
    assert len(second.token_ids) == 3 and engine.idle_slots == 10


def test_a_prompt_as_long_as_the_context_can_be_scored_and_not_continued(model):
    context = model.config.max_position_embeddings
    [prompt] = prompts_of(context)
    engine = Engine(model, EOS, slots=context)
    request = engine.add(prompt, SCORE)
    run(engine)
    assert_scored(model, prompt, request.prompt_scores, 3)
    with pytest.raises(ContextLengthError):
        engine.add(prompt, SamplingParams(1))
    with pytest.raises(ContextLengthError):
        engine.add([*prompt, 5], SCORE)
    with pytest.raises(XushiError, match="places in the cache"):
        Engine(model, EOS, slots=context - 1).add(prompt, SCORE)


def test_a_kept_sequence_is_not_scored(model):
    engine = Engine(model, EOS, slots=64)
    kept = engine.add([5, 6, 7], SamplingParams(0), keep=True)
    run(engine)
    with pytest.raises(XushiError, match="is not computed again"):
        engine.extend(kept, [8], SCORE)
    with pytest.raises(XushiError, match="no logits"):
        engine.extend(kept, [], SamplingParams(2))
    following = engine.extend(kept, [8], SamplingParams(2, seed=3, ignore_eos=True))
    run(engine)
    again = Engine(model, EOS, slots=64)
    fresh = again.add([5, 6, 7, 8], following.params)
    run(again)
    assert following.token_ids == fresh.token_ids and len(fresh.token_ids) == 2


def test_scores_that_are_no_numbers_are_an_error(model, monkeypatch):
    decode = model.decode

    def damaged(*arguments):
        decoded = decode(*arguments)
        decoded.logits_MV[0, 3] = float("nan")
        return decoded

    monkeypatch.setattr(model, "decode", damaged)
    engine = Engine(model, EOS, slots=64)
    engine.add([5, 6, 7], SCORE)
    with pytest.raises(XushiError, match="not finite"):
        engine.step()
