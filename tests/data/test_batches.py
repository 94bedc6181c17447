"""Batches are functions of (seed, cursor), cover an epoch once, and lead back to their bytes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xushi.data import (
    DataConfig,
    ExtraSource,
    SourceConfig,
    TokenDataset,
    batch_hash,
    build_corpus,
    heldout_batches,
    heldout_bytes,
    joined_hash,
    make_document,
    read_documents,
    row_hashes,
    tokenize_corpus,
)
from xushi.tokenizer import Tokenizer

T = 16


def write_corpus(
    directory: Path, texts: list[str], tokenizer: Tokenizer, transcripts: int = 0
) -> None:
    (directory / "in").mkdir()
    for i, text in enumerate(texts):
        (directory / "in" / f"{i:03}.txt").write_bytes(text.encode())
    config = DataConfig(
        sources=[SourceConfig(name="notes", kind="text", glob=str(directory / "in"))],
        sequence_length=T,
    )
    extra = [
        make_document("digits", f"{i}+1=天{i + 1}", {"path": str(i)}) for i in range(transcripts)
    ]
    build_corpus(config, {"digits": ExtraSource(extra, 2.0)} if extra else {}, directory / "corpus")
    tokenize_corpus(directory / "corpus", tokenizer, directory / "tokens", T)


@pytest.fixture(scope="module")
def built(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("built")
    write_corpus(
        directory,
        [f"the tree {i} then 天地\n" * (i % 7 + 1) for i in range(40)],
        tokenizer,
        transcripts=30,
    )
    return directory


@settings(max_examples=10, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), max_size=8),
    seed=st.integers(0, 9),
)
def test_lineage_leads_back_to_bytes(
    tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory, texts: list[str], seed: int
) -> None:
    directory = tmp_path_factory.mktemp("lineage")
    write_corpus(
        directory,
        [*texts, *(f"the tree {i} 天地then\n" * 9 for i in range(9))],
        tokenizer,
        transcripts=3,
    )
    documents = {d.uid: d.text.encode() for d in read_documents(directory / "corpus", "train")}
    dataset = TokenDataset.open(directory / "tokens", seed)
    for cursor in range(12):
        batch = dataset.batch(cursor, 1)
        spans, byte_spans = dataset.spans(cursor), dataset.byte_spans(cursor)
        assert len(spans) == len(byte_spans) == int(batch.segments.max()) + 1
        for segment, ((uid, start, end), (same, first, last)) in enumerate(
            zip(spans, byte_spans, strict=True)
        ):
            tokens = batch.tokens[0][batch.segments[0] == segment].tolist()
            assert same == uid and len(tokens) == end - start
            assert (
                b"".join(tokenizer.token_bytes(token) for token in tokens)
                == documents[uid][first:last]
            )


def test_shapes_and_types(built: Path) -> None:
    dataset = TokenDataset.open(built / "tokens", 1)
    batch = dataset.batch(5, 3)
    for name in ("tokens", "targets", "positions", "segments"):
        tensor = getattr(batch, name)
        assert tensor.shape == (3, T) and tensor.dtype == torch.int64, name
    assert batch.loss_mask.shape == (3, T) and batch.loss_mask.dtype == torch.bool


@settings(max_examples=30, deadline=None)
@given(
    cursor=st.integers(0, 20_000),
    groups=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    seed=st.integers(0, 3),
)
def test_grouping_into_batches_changes_nothing(
    built: Path, cursor: int, groups: list[int], seed: int
) -> None:
    dataset = TokenDataset.open(built / "tokens", seed)
    whole = dataset.batch(cursor, sum(groups))
    parts = [
        TokenDataset.open(built / "tokens", seed).batch(cursor + sum(groups[:i]), n)
        for i, n in enumerate(groups)
    ]
    for name in ("tokens", "targets", "positions", "segments", "loss_mask"):
        assert torch.equal(
            getattr(whole, name), torch.cat([getattr(part, name) for part in parts])
        ), name
    again = dataset.batch(cursor, sum(groups))
    assert batch_hash(again) == batch_hash(whole)


def test_hash_sees_every_array(built: Path) -> None:
    dataset = TokenDataset.open(built / "tokens", 1)
    hashes = {batch_hash(dataset.batch(0, 2))}
    for name in ("tokens", "targets", "positions", "segments", "loss_mask"):
        batch = dataset.batch(0, 2)
        tensor = getattr(batch, name)
        tensor[1, 3] = ~tensor[1, 3] if name == "loss_mask" else tensor[1, 3] + 1
        hashes.add(batch_hash(batch))
    hashes.add(batch_hash(dataset.batch(0, 1)))
    hashes.add(batch_hash(TokenDataset.open(built / "tokens", 2).batch(3, 2)))
    assert len(hashes) == 8


def test_a_rows_hash_depends_on_that_row_only(built: Path) -> None:
    """Ranks hash their own rows, and the hash of the whole batch is made of those."""
    dataset = TokenDataset.open(built / "tokens", 1)
    alone = [row_hashes(dataset.batch(cursor, 1))[0] for cursor in range(4)]
    assert row_hashes(dataset.batch(0, 4)) == alone
    assert row_hashes(dataset.batch(1, 2)) == alone[1:3]
    assert len(set(alone)) == 4
    assert batch_hash(dataset.batch(0, 4)) == joined_hash(alone)


def test_one_source_is_covered_once_per_epoch(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_corpus(tmp_path, [f"tree {i} 天\n" * (i % 5 + 1) for i in range(50)], tokenizer)
    dataset = TokenDataset.open(tmp_path / "tokens", 4)
    documents = {
        d.uid: tokenizer.encode(d.text) for d in read_documents(tmp_path / "corpus", "train")
    }
    expected = sorted(
        (uid, place) for uid, ids in documents.items() for place in range(1, len(ids) + 2)
    )
    assert dataset.tokens_per_epoch == len(expected)
    sequences = -(-len(expected) // T)
    orders = []
    for epoch in range(2):
        spans = [
            span
            for c in range(epoch * sequences, (epoch + 1) * sequences)
            for span in dataset.spans(c)
        ]
        assert (
            sorted((uid, place + 1) for uid, start, end in spans for place in range(start, end))
            == expected
        )
        orders.append(spans)
    assert orders[0] != orders[1]


def test_weight_counts_in_the_epoch(built: Path) -> None:
    dataset = TokenDataset.open(built / "tokens", 4)
    targets = {s.name: s.tokens - s.documents for s in dataset.manifest.train}
    assert dataset.tokens_per_epoch == targets["notes"] + 2 * targets["digits"]
    seen = [dataset.source(cursor) for cursor in range(4096)]
    sequences = {name: -(-count // T) for name, count in targets.items()}
    share = 2 * sequences["digits"] / (2 * sequences["digits"] + sequences["notes"])
    assert seen.count("digits") == pytest.approx(4096 * share, abs=1)


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_heldout_is_the_heldout_stream(built: Path, tokenizer: Tokenizer, size: int) -> None:
    batches = list(heldout_batches(built / "tokens", size))
    targets = np.concatenate([batch.targets[batch.loss_mask].numpy() for batch in batches])
    assert b"".join(tokenizer.token_bytes(token) for token in targets) == heldout_bytes(
        built / "corpus"
    )
    assert (targets == tokenizer.eos_id).sum() == len(
        list(read_documents(built / "corpus", "heldout"))
    )
    assert all(batch.tokens.shape == (size, T) for batch in batches[:-1])
