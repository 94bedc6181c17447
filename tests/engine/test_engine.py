"""The engine against plain decoding: the full forward, one sequence at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xushi.base.errors import BadInput, XushiError
from xushi.engine import ContextLengthError, Engine, SamplingParams, generate_ids, sample
from xushi.engine import engine as engine_module
from xushi.engine.sampling import request_uniforms, sampling_key

EOS = 1


def plain(model, prompt, p, eos=EOS):
    """Token by token through the full forward, with no cache."""
    ids, logprobs = list(prompt), []
    with torch.no_grad():
        while len(logprobs) < p.max_tokens and len(ids) < model.config.max_position_embeddings:
            logits = model(torch.tensor([ids])).logits[0, -1:]
            got = sample(logits, [p], request_uniforms([sampling_key(p.seed)], [len(logprobs)]))
            ids += got.tokens
            logprobs += got.logprobs
            if got.tokens[0] == eos and not p.ignore_eos:
                break
    return ids[len(prompt) :], logprobs


def run(engine):
    while engine.has_work:
        engine.step()


def prompts_of(count, seed=0, longest=20):
    generator = np.random.default_rng(seed)
    return [
        generator.integers(2, 272, generator.integers(1, longest)).tolist() for _ in range(count)
    ]


def test_equals_plain_decoding_with_other_requests_beside_it(model):
    prompts = prompts_of(7)
    params = [
        SamplingParams(
            max_tokens=3 + 2 * i, temperature=[0.0, 1.0, 0.8][i % 3], seed=i, top_p=[1, 0.9][i % 2]
        )
        for i in range(7)
    ]
    engine = Engine(model, EOS, slots=70)  # too few for all at once
    requests = [engine.add(prompt, p) for prompt, p in zip(prompts, params, strict=True)]
    run(engine)
    for prompt, p, request in zip(prompts, params, requests, strict=True):
        tokens, logprobs = plain(model, prompt, p)
        assert request.token_ids == tokens
        np.testing.assert_allclose(request.logprobs, logprobs, atol=1e-4)
        assert request.finish_reason == ("stop" if tokens[-1] == EOS else "length")
    assert engine.idle_slots == 70


def test_requests_enter_while_others_run(model):
    engine = Engine(model, EOS, slots=200)
    p = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    first = engine.add([5, 6, 7], p)
    engine.step()
    engine.step()
    second = engine.add([9, 9], p)
    assert set(engine.step()) == {first, second}
    run(engine)
    assert first.token_ids == plain(model, [5, 6, 7], p)[0]
    assert second.token_ids == plain(model, [9, 9], p)[0]


def test_long_prompts_are_fed_in_chunks(model, monkeypatch):
    prompt = prompts_of(1, longest=2)[0] * 40
    p = SamplingParams(max_tokens=5, seed=4)
    monkeypatch.setattr(engine_module, "SCORES_PER_CALL", 1)
    monkeypatch.setattr(engine_module, "SMALLEST_CHUNK", 3)
    engine = Engine(model, EOS, slots=128)
    beside = engine.add([8], SamplingParams(max_tokens=20, seed=1))
    request = engine.add(prompt, p)
    assert engine.step() == [beside]
    run(engine)
    assert request.token_ids == plain(model, prompt, p)[0]


@pytest.mark.parametrize("slots", [64, 24])
def test_a_group_equals_separate_requests(model, slots):
    prompt = prompts_of(1, seed=3)[0][:10]
    params = [SamplingParams(max_tokens=8, seed=seed) for seed in range(6)]
    together = Engine(model, EOS, slots)
    group = together.add_group(prompt, params, routing=True)
    run(together)
    alone = Engine(model, EOS, slots)
    singles = [alone.add(prompt, p, routing=True) for p in params]
    run(alone)
    assert [r.token_ids for r in group] == [r.token_ids for r in singles]
    assert len({tuple(r.token_ids) for r in group}) > 1
    for one, other in zip(group, singles, strict=True):
        assert all(
            torch.equal(a, b) for a, b in zip(one.routed_experts, other.routed_experts, strict=True)
        )
    assert together.idle_slots == alone.idle_slots == slots


def test_a_prompt_is_computed_once_for_its_group(model, monkeypatch):
    fed = []
    decode = model.decode
    monkeypatch.setattr(
        model, "decode", lambda flat, *rest: fed.append(len(flat.tokens_N)) or decode(flat, *rest)
    )
    engine = Engine(model, EOS, slots=100)
    engine.add_group(
        list(range(2, 12)),
        [SamplingParams(max_tokens=3, seed=s, ignore_eos=True) for s in range(4)],
    )
    run(engine)
    assert fed == [10, 4, 4]


def test_routed_experts_are_those_of_the_full_forward(model):
    p = SamplingParams(max_tokens=6, ignore_eos=True)
    request = generate_ids(model, [[4, 5, 6]], p, EOS, routing=True)[0]
    ids = [4, 5, 6, *request.token_ids]
    with torch.no_grad():
        choice = model.hidden(torch.tensor([ids])).routing[0].indices_Nk
    assert len(request.routed_experts) == len(ids) - 1
    for index, experts in enumerate(request.routed_experts):
        assert experts.shape == (1, 2)
        assert sorted(experts[0].tolist()) == sorted(choice[index].tolist())


def test_abort_frees_and_disturbs_nobody(model):
    engine = Engine(model, EOS, slots=60)
    p = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)
    kept = engine.add([5, 6, 7], p)
    running = engine.add([7, 8], p)
    group = engine.add_group([3, 3, 3], [p, p, p])
    waiting = engine.add([9] * 40, p)
    engine.step()
    for request in (running, group[0], waiting):
        engine.abort(request)
        engine.abort(request)
    run(engine)
    assert running.finish_reason == waiting.finish_reason == "abort"
    assert len(running.token_ids) == 1
    assert waiting.token_ids == []
    assert kept.token_ids == plain(model, [5, 6, 7], p)[0]
    assert group[1].token_ids == group[2].token_ids == plain(model, [3, 3, 3], p)[0]
    assert engine.idle_slots == 60


@settings(max_examples=40)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(1, 12), st.integers(1, 8), st.integers(1, 3)),
            st.tuples(st.just("step"), st.just(0), st.just(0), st.just(0)),
            st.tuples(st.just("abort"), st.integers(0, 30), st.just(0), st.just(0)),
        ),
        max_size=25,
    ),
    st.integers(20, 40),
)
def test_any_order_of_adding_stepping_and_aborting_ends_clean(model, actions, slots):
    engine = Engine(model, EOS, slots)
    requests = []
    for action, first, tokens, members in actions:
        if action == "add":
            requests += engine.add_group(
                [2 + first] * first, [SamplingParams(tokens, seed=s) for s in range(members)]
            )
        elif action == "step":
            engine.step()
        elif first < len(requests):
            engine.abort(requests[first])
    for _ in range(500):
        if not engine.has_work:
            break
        assert engine.step() or engine._prefilling
    assert not engine.has_work
    assert engine.idle_slots == slots
    assert engine._promised() == 0
    for request in requests:
        assert (
            request.finish_reason == "abort"
            or 1 <= len(request.token_ids) <= request.params.max_tokens
        )


def test_a_request_that_needs_all_slots_enters(model):
    p = SamplingParams(max_tokens=6, ignore_eos=True)
    engine = Engine(model, EOS, slots=10)
    exact = engine.add([2] * 5, p)  # the last of six tokens is never fed
    assert engine.step() == [exact]
    run(engine)
    assert len(exact.token_ids) == 6
    with pytest.raises(XushiError, match="needs 11 places in the cache, which has 10"):
        engine.add([2] * 6, p)
    # Beside another, it waits for the last slot.
    other = engine.add([2], SamplingParams(max_tokens=2, ignore_eos=True))
    exact = engine.add([2] * 5, p)
    assert engine.step() == [other]
    assert engine.step() == [other]
    assert engine.step() == [exact]


def test_abort_ends_a_prompt_that_is_still_being_fed(model, monkeypatch):
    monkeypatch.setattr(engine_module, "SCORES_PER_CALL", 1)
    monkeypatch.setattr(engine_module, "SMALLEST_CHUNK", 4)
    short = [5, 6]
    engine = Engine(model, EOS, slots=100)
    given_up = engine.add([2] * 20, SamplingParams(max_tokens=3, ignore_eos=True))
    assert engine.step() == [] and given_up.token_ids == []
    engine.abort(given_up)
    p = SamplingParams(max_tokens=4, ignore_eos=True)
    kept = engine.add(short, p)
    run(engine)
    assert kept.token_ids == plain(model, short, p)[0]
    assert engine.idle_slots == 100


def test_a_request_enters_beside_a_prompt_that_is_still_being_fed(model, monkeypatch):
    """What the first holds and may come to hold is counted to the slot while it has no token."""
    monkeypatch.setattr(engine_module, "SCORES_PER_CALL", 1)
    monkeypatch.setattr(engine_module, "SMALLEST_CHUNK", 2)
    p = SamplingParams(max_tokens=3, ignore_eos=True)
    engine = Engine(model, EOS, slots=8 + 2 + 2 + 2)
    long = engine.add([2] * 8, p)
    assert engine.step() == []
    short = engine.add([2] * 2, p)
    assert engine.step() == [short] and not long.token_ids


@pytest.mark.parametrize("ignore", [False, True])
def test_eos_ends_a_request_unless_it_is_ignored(model, ignore):
    greedy = SamplingParams(max_tokens=4, temperature=0, ignore_eos=ignore)
    first = plain(model, [2, 3], greedy, eos=-1)[0][0]
    engine = Engine(model, first, slots=100)
    request = engine.add([2, 3], greedy)
    run(engine)
    assert request.token_ids[0] == first
    assert (len(request.token_ids), request.finish_reason) == (
        (4, "length") if ignore else (1, "stop")
    )


def test_chunks_keep_to_the_memory_bound(model, monkeypatch):
    """Sequences x new tokens x length, as the model pads them, never pass the bound."""
    scores = []
    decode = model.decode

    def watched(flat, *rest):
        sequences, length = flat.slot_table_SL.shape
        chunk = int(flat.columns_N.max()) + 1
        scores.append((chunk, sequences * chunk * length))
        return decode(flat, *rest)

    monkeypatch.setattr(model, "decode", watched)
    monkeypatch.setattr(engine_module, "SCORES_PER_CALL", 600)
    monkeypatch.setattr(engine_module, "SMALLEST_CHUNK", 1)
    engine = Engine(model, EOS, slots=400)
    for prompt in prompts_of(6, seed=4, longest=40):
        engine.add(prompt, SamplingParams(max_tokens=20, ignore_eos=True))
        engine.step()
    run(engine)
    assert all(size <= 600 for _, size in scores)
    assert max(chunk for chunk, _ in scores) > 3
    # The length counts: a short prompt beside a long sequence is fed in small chunks.
    engine.add([2] * 60, SamplingParams(max_tokens=1))
    scores.clear()
    run(engine)
    assert [chunk for chunk, _ in scores] == [10] * 6


def test_context(model):
    engine = Engine(model, EOS, slots=200)
    p = SamplingParams(max_tokens=100, ignore_eos=True)
    assert issubclass(ContextLengthError, BadInput), "a user's fault has an exit code"
    with pytest.raises(ContextLengthError, match=r"64 tokens .* context holds 64"):
        engine.add([2] * 64, p)
    with pytest.raises(XushiError, match="no tokens"):
        engine.add([], p)
    with pytest.raises(XushiError, match="token id 272"):
        engine.add([2, 272], p)
    with pytest.raises(XushiError, match="has 30"):
        Engine(model, EOS, slots=30).add([2] * 20, p)
    last, cut = engine.add([2] * 63, p), engine.add([2] * 60, p)
    run(engine)
    assert (len(last.token_ids), len(cut.token_ids)) == (1, 4)
    assert last.finish_reason == cut.finish_reason == "length"


def test_generate_ids_keeps_order_shares_prompts_and_leaves_the_model_alone(model):
    prompts = [prompt for prompt in prompts_of(5, seed=2) for _ in range(3)]
    params = [SamplingParams(max_tokens=6, seed=seed) for seed in range(15)]
    model.train()
    try:
        requests = generate_ids(model, prompts, params, EOS, concurrency=4, weights_version=7)
        assert model.training
    finally:
        model.eval()
    for prompt, p, request in zip(prompts, params, requests, strict=True):
        assert request.token_ids == plain(model, prompt, p)[0]
        assert request.weights_version == 7
    assert generate_ids(model, [], SamplingParams(1), EOS) == []
    with pytest.raises(XushiError, match="2 prompts and 1 sampling"):
        generate_ids(model, [[2], [3]], [SamplingParams(1)], EOS)
    # the weights can still be trained after sampling
    model(torch.tensor([[2, 3]])).logits.sum().backward()
    model.zero_grad(set_to_none=True)
