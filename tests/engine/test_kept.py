"""Kept sequences: an extended request equals a fresh one, and the queue never blocks."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from xushi.base.errors import XushiError
from xushi.engine import ContextLengthError, Engine, SamplingParams

EOS = 1
NEVER_EOS = 300  # is no token


def drain(engine):
    """Run to the end; a queue that does not move is an error."""
    for _ in range(1000):
        if not engine.has_work:
            return
        assert engine.step() or engine._prefilling
    raise AssertionError("the queue does not move")


def fresh(model, prompt_ids, params, eos=EOS):
    """The same request in an engine of its own."""
    engine = Engine(model, eos, slots=64)
    request = engine.add(prompt_ids, params, routing=True)
    drain(engine)
    return request


def assert_equal(request, expected):
    assert request.token_ids == expected.token_ids
    assert request.finish_reason == expected.finish_reason
    # Two ways of computing logits may differ by 1e-5 of the largest, and log-probabilities by twice
    # that. A log-probability is about as large as the largest logit.
    bound = 2e-5 * max(map(abs, expected.logprobs))
    np.testing.assert_allclose(request.logprobs, expected.logprobs, rtol=0, atol=bound)
    np.testing.assert_allclose(
        request.sampling_logprobs, expected.sampling_logprobs, rtol=0, atol=bound
    )
    assert len(request.routed_experts) == len(request.prompt_ids) + len(request.token_ids) - 1
    for one, other in zip(request.routed_experts, expected.routed_experts, strict=True):
        assert one.sort().values.tolist() == other.sort().values.tolist()


def assert_computed(model, request):
    """The record against one forward pass over all ids, through the recorded experts.

    Sampling again could give another token where a uniform number lies at a border. Where two groups
    of experts score the same, either may be recorded.
    """
    ids = [*request.prompt_ids, *request.token_ids]
    chosen = torch.stack(request.routed_experts)[:, 0]  # [places, k] of the one MoE layer
    with torch.no_grad():
        trunk = model.hidden(torch.tensor([ids[:-1]]), pinned=[chosen])
        logits = F.linear(trunk.hidden_BTD[0, len(request.prompt_ids) - 1 :], model.head_VD)
    tokens = torch.tensor(request.token_ids)
    logprobs = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    bound = 2 * 1e-5 * float(logits.abs().max())  # see assert_equal
    np.testing.assert_allclose(request.logprobs, logprobs, rtol=0, atol=bound)
    assert request.sampling_logprobs == request.logprobs
    groups = trunk.routing[0].scores_NE.view(-1, 2, 2).sum(-1)
    tied = (groups[:, 0] - groups[:, 1]).abs() < 1e-4
    assert (tied | (groups.argmax(-1) == chosen[:, 0] // 2)).all()


def test_an_extended_request_equals_a_fresh_one_and_computes_only_what_is_new(model, monkeypatch):
    engine = Engine(model, EOS, slots=64)
    first = engine.add([5, 6, 7], SamplingParams(6, seed=1), routing=True, keep=True)
    drain(engine)
    fed = []
    decode = model.decode
    monkeypatch.setattr(
        model, "decode", lambda flat, *rest: fed.append(len(flat.tokens_N)) or decode(flat, *rest)
    )
    params = SamplingParams(4, seed=2, ignore_eos=True)
    second = engine.extend(first, [9, 8], params)
    drain(engine)
    third = engine.extend(second, [], params)
    drain(engine)
    # The last token of the old request, the new ids, and then each token but the last.
    assert fed == [3, 1, 1, 1, 1, 1, 1, 1]
    monkeypatch.undo()
    assert second.prompt_ids == [5, 6, 7, *first.token_ids, 9, 8]
    assert third.prompt_ids == [*second.prompt_ids, *second.token_ids]
    assert_equal(second, fresh(model, second.prompt_ids, params))
    assert_equal(third, fresh(model, third.prompt_ids, params))
    engine.release(third)
    assert engine.idle_slots == 64


def test_without_routing_an_extended_request_has_none(model):
    engine = Engine(model, EOS, slots=64)
    first = engine.add([5], SamplingParams(2), keep=True)
    drain(engine)
    second = engine.extend(first, [6], SamplingParams(2))
    drain(engine)
    assert second.routed_experts is None


def test_members_of_a_group_are_extended_apart(model):
    engine = Engine(model, NEVER_EOS, slots=40)
    prompt = [5, 6, 7, 8, 9, 10]
    group = engine.add_group(
        prompt, [SamplingParams(3, seed=s) for s in range(3)], routing=True, keep=True
    )
    drain(engine)
    # The prompt is held once, and of three tokens the cache has two.
    assert engine.idle_slots == 40 - 6 - 3 * 2
    longer = [engine.extend(r, [20 + i], SamplingParams(4)) for i, r in enumerate(group)]
    drain(engine)
    for request in longer:
        assert_equal(request, fresh(model, request.prompt_ids, request.params, NEVER_EOS))
        engine.release(request)
    assert engine.idle_slots == 40


def test_kept_sequences_give_way_and_come_back(model):
    """Each needs more than half of the cache in its last turn."""
    engine = Engine(model, NEVER_EOS, slots=21)
    params = SamplingParams(4, seed=3)
    turn = [engine.add([10 + i] * 8, params, routing=True, keep=True) for i in range(3)]
    drain(engine)
    for _ in range(2):
        turn = [engine.extend(request, [4], params) for request in turn]
        drain(engine)
        for request in turn:
            assert_equal(request, fresh(model, request.prompt_ids, params, NEVER_EOS))
    other = engine.add([3] * 18, params)
    drain(engine)
    assert other.finish_reason == "length"
    assert engine.idle_slots == 21, "all that is kept is outside of the cache"
    for request in turn:
        engine.release(request)
    assert len(engine._kept) == 0


def test_no_more_sequences_leave_the_cache_than_must(model):
    engine = Engine(model, NEVER_EOS, slots=20)
    params = SamplingParams(1)
    kept = [engine.add([5 + i] * 5, params, keep=True) for i in range(3)]
    drain(engine)
    assert engine.idle_slots == 5
    # 5 tokens are in the cache, and 5 more fit: the last one, 3 new ones and the first of 2.
    longer = engine.extend(kept[0], [4, 4, 4], SamplingParams(2))
    drain(engine)
    assert engine.idle_slots == 0
    # The oldest leaves first.
    engine.add([4] * 4, params)
    drain(engine)
    assert engine.idle_slots == 5
    engine.release(kept[1])
    assert engine.idle_slots == 5
    engine.release(kept[2])
    assert engine.idle_slots == 10
    engine.release(longer)
    assert engine.idle_slots == 20


def test_no_sequence_leaves_the_cache_for_a_request_that_must_wait_anyway(model):
    engine = Engine(model, NEVER_EOS, slots=20)
    kept = engine.add([5] * 4, SamplingParams(1), keep=True)
    drain(engine)
    beside = engine.add([6] * 4, SamplingParams(7))  # 10 slots, so that 6 are left
    wide = engine.add([7] * 11, SamplingParams(1))  # 1 more than all that is left and kept
    for _ in range(7):
        assert len(engine._kept) == 1
        assert engine.step() == [beside]
    assert engine.step() == [wide]
    assert len(engine._kept) == 1
    engine.release(kept)
    assert engine.idle_slots == 20


def test_an_extension_waits_in_the_cache_for_what_is_running(model):
    engine = Engine(model, NEVER_EOS, slots=20)
    kept = engine.add([5] * 8, SamplingParams(1), keep=True)
    drain(engine)
    beside = engine.add([6] * 4, SamplingParams(7))  # 10 slots, so that 2 are left
    longer = engine.extend(kept, [4, 4], SamplingParams(1))  # 3 more
    for _ in range(7):
        assert engine.step() == [beside]
        assert len(engine._kept) == 1
    assert engine.step() == [longer]
    engine.release(longer)
    assert engine.idle_slots == 20


def test_only_a_finished_request_that_is_kept_can_be_extended(model):
    engine = Engine(model, NEVER_EOS, slots=64)
    params = SamplingParams(3)
    plain = engine.add([5], params)
    kept = engine.add([6], params, keep=True)
    stopped = engine.add([7], params, keep=True)
    engine.step()
    engine.abort(stopped)
    for request in (plain, kept, stopped):
        with pytest.raises(XushiError, match="holds no sequence to extend"):
            engine.extend(request, [], params)
    drain(engine)
    for request in (plain, stopped):
        with pytest.raises(XushiError, match="holds no sequence to extend"):
            engine.extend(request, [], params)
    # A refused extension leaves the sequence as it is.
    with pytest.raises(ContextLengthError):
        engine.extend(kept, [5] * 60, params)
    with pytest.raises(XushiError, match="token id 999"):
        engine.extend(kept, [999], params)
    engine.abort(kept)
    assert engine.idle_slots == 64 - 3
    longer = engine.extend(kept, [5], params)
    with pytest.raises(XushiError, match="holds no sequence to extend"):
        engine.extend(kept, [], params)
    engine.release(kept)
    drain(engine)
    assert longer.finish_reason == "length"
    for request in (longer, longer, kept, plain):
        engine.release(request)
    assert engine.idle_slots == 64


def test_a_restart_loses_what_the_cache_held(model):
    engine = Engine(model, NEVER_EOS, slots=19)
    params = SamplingParams(2)
    outside = engine.add([5] * 8, params, keep=True)
    inside = engine.add([6] * 10, params, keep=True)
    drain(engine)
    assert engine.idle_slots == 19 - 11
    running = engine.add_group([7] * 3, [SamplingParams(3)] * 2)
    engine.step()
    waiting = engine.add([8] * 15, params)
    engine.step()
    engine.restart()
    assert not engine.has_work
    with pytest.raises(XushiError, match="holds no sequence to extend"):
        engine.extend(inside, [4], params)
    longer = engine.extend(outside, [4], params)
    drain(engine)
    for request in (*running, waiting):
        assert request.finish_reason == "abort"
        engine.abort(request)  # without effect
        engine.release(request)
    assert longer.token_ids == fresh(model, longer.prompt_ids, params, NEVER_EOS).token_ids
    for request in (longer, inside, outside):
        engine.release(request)
    assert engine.idle_slots == 19


def test_release_ends_what_is_unfinished(model):
    engine = Engine(model, NEVER_EOS, slots=30)
    params = SamplingParams(5)
    kept = engine.add([5], params, keep=True)
    drain(engine)
    running = engine.add([5] * 20, params, keep=True)
    engine.step()
    waiting = engine.extend(kept, [6] * 10, params)
    engine.step()
    assert waiting.token_ids == []
    for request in (waiting, running):
        engine.release(request)
        assert request.finish_reason == "abort"
    assert not engine.has_work
    assert engine.idle_slots == 30


SIZES = st.tuples(st.integers(0, 4), st.integers(1, 5))  # new ids, tokens
ACTIONS = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 8), st.tuples(st.integers(1, 3), st.integers(1, 4))),
    st.tuples(st.sampled_from(["step", "drain", "drain"]), st.just(0), SIZES),
    st.tuples(st.sampled_from(["extend", "extend all"]), st.integers(0, 12), SIZES),
    st.tuples(st.sampled_from(["release", "abort"]), st.integers(0, 12), SIZES),
)


@settings(max_examples=60, deadline=None)
@given(actions=st.lists(ACTIONS, max_size=20), slots=st.integers(12, 24))
def test_episodes_in_any_order_end_with_the_right_record(model, actions, slots):
    """A caller may extend one sequence, all or none, release or forget them: the queue moves."""
    engine = Engine(model, EOS, slots)
    requests = []

    def extend(request, more, tokens):
        try:
            requests.append(
                engine.extend(request, [5] * more, SamplingParams(tokens, seed=len(requests)))
            )
        except XushiError:
            held = len(request.prompt_ids) + len(request.token_ids)
            assert held + more + tokens - 1 > slots
            assert request._kept is not None

    for action, number, (size, count) in [("add", 4, (2, 3)), ("drain", 0, (0, 1)), *actions]:
        kept = [request for request in requests if request._kept is not None]
        if action == "add":
            params = [SamplingParams(count, seed=member) for member in range(size)]
            requests += engine.add_group([2 + number] * number, params, routing=True, keep=True)
        elif action == "step":
            engine.step()
        elif action == "drain":
            drain(engine)
        elif action == "extend all":
            for request in kept:
                extend(request, size, count)
        elif action == "extend" and kept:
            extend(kept[number % len(kept)], size, count)
        elif action == "release":
            engine.release(requests[number % len(requests)])
        elif action == "abort":
            engine.abort(requests[number % len(requests)])
    drain(engine)
    assert engine._promised() == 0
    for request in requests:
        if request.finish_reason != "abort":
            assert_computed(model, request)
    for request in requests:
        engine.release(request)
    assert engine.idle_slots == slots
    assert len(engine._kept) == 0
