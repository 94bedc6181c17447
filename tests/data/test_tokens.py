"""Token files: their contents, and that damage is detected."""

from pathlib import Path

import numpy as np
import pytest

from xushi.base.errors import XushiError
from xushi.data import (
    DataConfig,
    SourceConfig,
    TokenDataset,
    build_corpus,
    load_manifest,
    read_documents,
    tokenize_corpus,
)
from xushi.data import tokens as module
from xushi.data.tokens import open_source
from xushi.tokenizer import Tokenizer


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for i in range(40):
        (tmp_path / "in" / f"{i:02}.txt").write_text(
            f"the tree {i} <think>天地\n" * (i + 1), encoding="utf-8"
        )
    config = DataConfig(
        sources=[SourceConfig(name="notes", kind="text", glob=str(tmp_path / "in"), weight=2.0)],
        sequence_length=16,
    )
    build_corpus(config, {}, tmp_path / "corpus")
    return tmp_path / "corpus"


@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_files_hold_every_document(
    corpus: Path, tokenizer: Tokenizer, tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK_CHARACTERS", chunk)
    manifest = tokenize_corpus(corpus, tokenizer, tmp_path / "tokens", 16)
    assert manifest == load_manifest(tmp_path / "tokens")
    assert manifest.dtype == "uint16" and manifest.tokenizer == tokenizer.hash
    assert [(s.name, s.weight) for s in manifest.train] == [("notes", 2.0)]
    for side, source in (("train", manifest.train[0]), ("heldout", manifest.heldout)):
        packed = open_source(tmp_path / "tokens" / side, manifest, source)
        documents = list(read_documents(corpus, side))
        assert packed.uids == [document.uid for document in documents]
        for i, document in enumerate(documents):
            assert packed.document(i).tolist() == [
                tokenizer.bos_id,
                *tokenizer.encode(document.text),
                tokenizer.eos_id,
            ]


def test_large_vocabularies_take_four_bytes(
    corpus: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tokenize_corpus(corpus, tokenizer, tmp_path / "small", 16)
    monkeypatch.setattr(tokenizer, "vocab_size", 70_000)
    monkeypatch.setattr(tokenizer, "byte_lengths", np.ones(70_000, dtype=np.int64))
    large = tokenize_corpus(corpus, tokenizer, tmp_path / "large", 16)
    assert large.dtype == "uint32" and small.train == large.train
    one, other = (
        open_source(tmp_path / d / "train", m, m.train[0])
        for d, m in (("small", small), ("large", large))
    )
    assert np.array_equal(one.tokens, other.tokens)


def test_missing_and_damaged_files(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(XushiError, match=r"manifest\.json does not exist"):
        TokenDataset.open(tmp_path, 0)
    directory = tmp_path / "tokens"
    for name, message in (
        ("train/notes.bin", r"size of .*notes\.bin differs"),
        ("train/notes.parquet", "tokens of notes in .* cannot be read"),
        ("byte_lengths.npy", r"byte_lengths\.npy cannot be read"),
        ("manifest.json", r"manifest\.json cannot be read"),
    ):
        tokenize_corpus(corpus, tokenizer, directory, 16)
        path = directory / name
        path.write_bytes(path.read_bytes()[:-3])
        with pytest.raises(XushiError, match=message):
            TokenDataset.open(directory, 0)
        path.unlink()
        with pytest.raises(XushiError):
            TokenDataset.open(directory, 0)
