"""Decoding with the cache, and packed documents, against the whole forward of one document, for all
four models.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from xushi.model import LatentCache, ModelConfig

from .drawing import KINDS, TOLERANCE, configs, random_tokens


@settings(max_examples=15, deadline=None)
@given(config=st.sampled_from(KINDS).flatmap(configs), seed=st.integers(0, 2**31), data=st.data())
def test_decoding_equals_the_full_forward(
    config: ModelConfig, seed: int, data: st.DataObject, random_model
) -> None:
    """Chunks of any size, several sequences in one call, forks and truncation give the logits of
    the whole forward.
    """
    model = random_model(config, seed)
    tokens = random_tokens(config, seed, 3, 19)
    tokens[2, :8] = tokens[0, :8]  # the third sequence shares a prefix with the first
    with torch.no_grad():
        expected = model(tokens).logits
    cache = LatentCache(config, slots=200)
    first, second = cache.allocate(), cache.allocate()
    done = {first: 0, second: 0}
    row = {first: 0, second: 1}

    def step(additions: list[tuple[int, int]]) -> None:
        wanted = data.draw(st.sampled_from(["all", "last"]))
        flat = cache.extend(
            [(s, tokens[row[s], done[s] : done[s] + n].tolist()) for s, n in additions],
            wanted=wanted,
        )
        logits = model.decode(flat, cache).logits_MV
        begin = 0 if wanted == "all" else -1
        want = torch.cat([expected[row[s], done[s] : done[s] + n][begin:] for s, n in additions])
        assert (logits - want).abs().max() <= TOLERANCE * expected.abs().max()
        for s, n in additions:
            done[s] += n

    def advance(*sequences: int) -> None:
        while any(done[s] < 19 for s in sequences):
            wanted = [(s, min(9 - data.draw(st.integers(0, 9)), 19 - done[s])) for s in sequences]
            if wanted := [(s, n) for s, n in wanted if n]:
                step(wanted)

    common = data.draw(st.integers(1, 8))
    step([(first, common)])
    branch = cache.fork(first)
    row[branch], done[branch] = 2, common
    advance(first, second, branch)  # neither branch may overwrite what the other reads
    kept = data.draw(st.integers(0, 18))
    fork = cache.fork(first)
    cache.truncate(fork, kept)
    fork = cache.load(cache.unload(fork))  # entries may leave the cache and come back
    row[fork], done[fork] = 0, kept
    step([(fork, 19 - kept)])
    for sequence in (first, second, branch, fork):
        cache.free(sequence)
    assert cache.available == 200


def test_decoding_says_where_tokens_went(random_model, tiny) -> None:
    model = random_model(tiny(num_hidden_layers=3), 4)
    tokens = random_tokens(model.config, 4, 1, 9)
    cache = LatentCache(model.config, slots=20)
    flat = cache.extend([(cache.allocate(), tokens[0].tolist())], wanted="all")
    routed = model.decode(flat, cache, routing=True).routed_experts
    expected = torch.stack([choice.indices_Nk for choice in model.hidden(tokens).routing])
    assert routed is not None and torch.equal(routed.sort().values, expected.sort().values)
    assert model.decode(cache.extend([(0, [1])]), cache).routed_experts is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [(11, 9), (1, 2, 3, 14), (5, 15)])
def test_packed_documents_equal_documents_run_alone(
    kind: str, lengths: tuple[int, ...], random_model, tiny_of
) -> None:
    """Attention, windows, compressors and MTP restart with every document."""
    model = random_model(
        tiny_of(kind, num_nextn_predict_layers=0 if kind == "deepseek_v2" else 1), 5
    )
    documents = [random_tokens(model.config, 50 + n, 1, length) for n, length in enumerate(lengths)]
    packed = torch.cat(documents, 1)
    segments = torch.cat([torch.full((length,), n) for n, length in enumerate(lengths)])[None]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]

    def everything(tokens: Tensor, positions: Tensor, segments: Tensor | None) -> list[Tensor]:
        hidden = model.hidden(tokens, positions, segments)
        states = [model(tokens, positions, segments).logits]
        for layer in model.mtp_layers:
            shared = model.sequences(tokens, positions, segments)
            embedded = torch.nn.functional.embedding(tokens, model.model.embed_tokens.weight)
            states.append(layer.predict(hidden.carried, embedded, shared).hidden_BTD)
        return states

    alone = [
        everything(document, torch.arange(document.shape[1])[None], None) for document in documents
    ]
    for got, *parts in zip(everything(packed, positions, segments), *alone, strict=True):
        want = torch.cat(parts, 1)
        assert (got - want).abs().max() <= TOLERANCE * want.abs().max()
