"""Bits of a text: minus log2 of the probabilities that the model gives its tokens, however they are
batched.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xushi.evaluate import total_bits
from xushi.model import Batch, Deepseek
from xushi.train import pack_examples


def documents(seed: int, lengths: list[int], vocabulary: int) -> list[list[int]]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocabulary, (n,), generator=g).tolist() for n in lengths]


def packed(texts: list[list[int]], width: int) -> Batch:
    return pack_examples([(ids, [True] * len(ids)) for ids in texts], width, 0).batch


def test_a_text_is_minus_log2_of_its_probability(model, exact) -> None:
    texts = documents(1, [30, 2, 17, 9, 25], model.config.vocab_size)
    want = -sum(float(exact(ids).sum()) for ids in texts) / math.log(2)
    assert want > 300
    assert total_bits(model, [packed(texts, 32)]) == pytest.approx(want, rel=1e-6)


@settings(max_examples=15)
@given(width=st.sampled_from([29, 40, 64]), size=st.integers(1, 5), order=st.permutations(range(5)))
def test_batching_does_not_matter(width: int, size: int, order: list[int], model) -> None:
    texts = documents(2, [30, 2, 17, 9, 25], model.config.vocab_size)
    whole = total_bits(model, [packed(texts, 64)])
    shuffled = [texts[i] for i in order]
    parts = [packed(shuffled[i : i + size], width) for i in range(0, 5, size)]
    assert total_bits(model, parts) == pytest.approx(whole, rel=1e-6)
    alike = [p for p in parts if p.tokens.shape[1] == parts[0].tokens.shape[1]]
    rows = Batch(*map(torch.cat, zip(*alike, strict=True)))
    by_row = rows.split(rows.rows)
    assert total_bits(model, by_row) == pytest.approx(total_bits(model, [rows]), rel=1e-6)


def test_only_target_tokens_count(model, exact) -> None:
    (ids,) = documents(3, [20], model.config.vocab_size)
    learned = [place % 3 == 0 for place in range(20)]
    batch = pack_examples([(ids, learned)], 40, 0).batch
    want = -float(exact(ids)[torch.tensor(learned[1:])].sum()) / math.log(2)
    assert total_bits(model, [batch]) == pytest.approx(want, rel=1e-6)


def test_nothing_takes_no_bits(model) -> None:
    assert total_bits(model, []) == 0


def test_a_uniform_model_takes_log2_of_the_vocabulary(model) -> None:
    flat = Deepseek(model.config).initialise(0)
    assert flat.lm_head is not None
    flat.lm_head.weight.data.zero_()
    texts = documents(4, [33], model.config.vocab_size)
    assert total_bits(flat, [packed(texts, 32)]) == pytest.approx(
        32 * math.log2(model.config.vocab_size), rel=1e-6
    )


def test_many_tokens_add_up_without_loss(model) -> None:
    """Sums over many batches lose digits in float32; they are taken in float64."""
    batch = packed(documents(5, [60] * 20, model.config.vocab_size), 60)
    one = total_bits(model, [batch])
    assert total_bits(model, [batch] * 40) == pytest.approx(40 * one, rel=1e-12)


def test_the_model_and_its_gradients_are_left_alone(model) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    total_bits(model, [packed(documents(6, [9], model.config.vocab_size), 9)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
