"""Bits of a text: minus log2 of the probabilities that the model gives its tokens, however they are
batched.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xushi.base.errors import BadInput
from xushi.data import (
    DataConfig,
    HeldoutText,
    SourceConfig,
    build_corpus,
    heldout_batches,
    heldout_bytes,
    read_documents,
    tokenize_corpus,
)
from xushi.evaluate import DocumentBits, bits_by_document, total_bits
from xushi.model import Batch, Deepseek
from xushi.tokenizer import Tokenizer
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


LENGTH = 32


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of 1 to 90 bytes: held-out documents end in the middle of a sequence, at its end, and
    go on over several.
    """
    directory = tmp_path_factory.mktemp("heldout")
    (directory / "texts").mkdir()
    for number in range(150):
        text = f"{number:03}" + "0123456789天" * (number % 8) + "x" * (number % 11)
        (directory / "texts" / f"{number:03}.txt").write_text(text[: 1 + number * 7 % 90])
    source = SourceConfig(name="texts", kind="text", glob=str(directory / "texts"))
    config = DataConfig(sources=[source], sequence_length=LENGTH, heldout=0.08)
    build_corpus(config, {}, directory / "corpus")
    return directory / "corpus"


@pytest.fixture(scope="module")
def tokens(corpus: Path, tokenizer: Tokenizer) -> Path:
    tokenize_corpus(corpus, tokenizer, corpus.parent / "tokens", LENGTH)
    return corpus.parent / "tokens"


@pytest.fixture(scope="module")
def wide(model: Deepseek) -> Deepseek:
    """The model in float64."""
    return Deepseek(model.config).initialise(3).double()


def test_documents_are_those_of_the_corpus(
    corpus: Path, tokens: Path, model: Deepseek, tokenizer: Tokenizer
) -> None:
    done: list[int] = []
    found = bits_by_document(model, tokens, 3, done.append)
    sequences = HeldoutText.open(tokens).packed.sequences
    assert done == [*range(3, sequences, 3), sequences]
    held = list(read_documents(corpus, "heldout"))
    assert len(held) > 5 and found.uids == [document.uid for document in held]
    assert found.bytes_D.tolist() == [len(document.text.encode()) for document in held]
    assert found.bytes_D.sum() == len(heldout_bytes(corpus))
    assert np.all(found.bits_D > found.bytes_D)


def test_every_target_belongs_to_its_document(tokens: Path) -> None:
    heldout = HeldoutText.open(tokens)
    packed = heldout.packed
    seen: dict[int, list[int]] = {}
    for batch, documents_BT in heldout.batches(4):
        assert ((documents_BT >= 0) == batch.loss_mask.numpy()).all()
        for target, document in zip(
            batch.targets.flatten().tolist(), documents_BT.flatten().tolist(), strict=True
        ):
            seen.setdefault(document, []).append(target)
    seen.pop(-1, None)
    assert seen == {d: packed.document(d)[1:].tolist() for d in range(len(packed.uids))}


def test_bits_of_a_document_are_those_of_its_pieces_alone(tokens: Path, wide: Deepseek) -> None:
    """Each piece of a document in a sequence of its own, in float64."""
    found = bits_by_document(wide, tokens, 4)
    packed = HeldoutText.open(tokens).packed
    want = np.zeros(len(packed.uids))
    pieces = 0
    for row in range(packed.sequences):
        for document, span in packed.documents_and_spans(row):
            ids = torch.tensor(packed.document(document)[span.start : span.end + 1].astype(int))
            with torch.no_grad():
                log_p = wide(ids[None, :-1]).logits[0].log_softmax(-1)
            want[document] -= float(log_p.gather(1, ids[1:, None]).sum()) / math.log(2)
            pieces += 1
    assert pieces > len(want) + 2, "no document goes on in another sequence"
    np.testing.assert_allclose(found.bits_D, want, rtol=1e-9)


def test_bits_of_documents_add_up_to_the_total(
    tokens: Path, model: Deepseek, wide: Deepseek
) -> None:
    exactly = bits_by_document(wide, tokens, 4)
    assert math.fsum(exactly.bits_D) == pytest.approx(exactly.total, rel=1e-13)
    found = bits_by_document(model, tokens, 4)
    assert math.fsum(found.bits_D) == pytest.approx(found.total, rel=1e-6)
    assert found.total == total_bits(model, heldout_batches(tokens, 4))
    np.testing.assert_allclose(bits_by_document(model, tokens, 7).bits_D, found.bits_D, rtol=1e-5)


def test_bits_by_document_are_written_and_read(
    tokens: Path, model: Deepseek, tmp_path: Path
) -> None:
    import pyarrow.parquet as pq

    found = bits_by_document(model, tokens, 4)
    path = tmp_path / "heldout_bits.parquet"
    found.write(path)
    again = DocumentBits.read(path)
    assert again.uids == found.uids and again.total == found.total
    assert np.array_equal(again.bytes_D, found.bytes_D)
    assert np.array_equal(again.bits_D, found.bits_D)
    assert pq.read_table(path).column_names == ["uid", "bytes", "bits"]
    path.write_bytes(path.read_bytes()[:-9])
    for broken in (path, tmp_path / "none"):
        with pytest.raises(BadInput, match=r"cannot be read"):
            DocumentBits.read(broken)
    pq.write_table(pq.read_table(tokens / "heldout" / "heldout.parquet"), path)
    with pytest.raises(BadInput, match=r"cannot be read"):
        DocumentBits.read(path)


def test_columns_without_their_total_are_refused(tmp_path: Path) -> None:
    """As if another program had written the file again and left out what it does not know."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"uid": pa.array([b"0" * 16], pa.binary(16)), "bytes": [3], "bits": [4.0]}
    pq.write_table(pa.table(columns), tmp_path / "bits.parquet")
    with pytest.raises(BadInput, match=r"cannot be read"):
        DocumentBits.read(tmp_path / "bits.parquet")
