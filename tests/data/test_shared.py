"""What runs share: the same key exactly where the same files would be made."""

import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from xushi.base.artifacts import Artifacts
from xushi.base.errors import Failed
from xushi.base.files import sha256_file
from xushi.data import (
    DataConfig,
    ExtraSource,
    SourceConfig,
    build_corpus,
    corpus_key,
    make_document,
    obtain_corpus,
    obtain_tokenizer,
    obtain_tokens,
    shared,
    tokenizer_key,
    tokens_key,
)
from xushi.tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artifacts:
    monkeypatch.setenv("XUSHI_CACHE", str(tmp_path / "cache"))
    return Artifacts()


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    directory = tmp_path / "texts"
    for number in range(40):
        path = directory / f"{number % 3}" / f"{number:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text {number}\n" + "the tree then the tree\n" * (number % 7 + 3))
    return directory


def config(directory: Path, source: dict[str, object] | None = None, **keys: object) -> DataConfig:
    table = {"name": "notes", "kind": "text", "glob": str(directory), **(source or {})}
    return DataConfig(sources=[SourceConfig(**table)], **{"sequence_length": 16, **keys})


def extra(text: str = "worked", weight: float = 1.0) -> dict[str, ExtraSource]:
    return {"transcripts": ExtraSource([make_document("transcripts", text, {"path": "0"})], weight)}


def hashes(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): sha256_file(path)
        for path in directory.rglob("*")
        if path.is_file()
    }


def rename(texts: Path) -> None:
    (texts / "1" / "01.txt").rename(texts / "1" / "renamed.txt")


CHANGES: dict[str, Callable[[Path], object]] = {
    "a byte": lambda d: (d / "0" / "00.txt").write_text("other text\n" * 5),
    "a name": rename,
    "a file more": lambda d: (d / "new.txt").write_text("new"),
    "a file less": lambda d: (d / "2" / "02.txt").unlink(),
    "a hidden file": lambda d: (d / ".hidden").touch(),  # counted in the summary's notes
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_read_is_in_the_key(change: str, texts: Path) -> None:
    before = corpus_key(config(texts), {})
    CHANGES[change](texts)
    assert corpus_key(config(texts), {}) != before


@pytest.mark.parametrize(
    "changed",
    [
        lambda d: corpus_key(config(d, salt="other"), {}),
        lambda d: corpus_key(config(d, heldout=0.05), {}),
        lambda d: corpus_key(config(d, {"weight": 2.0}), {}),
        lambda d: corpus_key(config(d, {"name": "other"}), {}),
        lambda d: corpus_key(config(d, {"exclude": ["*1.txt"]}), {}),
        lambda d: corpus_key(config(d), extra()),
        lambda d: corpus_key(config(d / "1"), {}),
    ],
)
def test_what_is_set_is_in_the_key(changed: Callable[[Path], str], texts: Path) -> None:
    assert changed(texts) != corpus_key(config(texts), {})


def test_extra_documents_are_in_the_key(texts: Path) -> None:
    keys = {
        corpus_key(config(texts), given)
        for given in (extra(), extra("other"), extra(weight=2.0), {"more": extra()["transcripts"]})
    }
    assert len(keys) == 4 and corpus_key(config(texts), extra()) in keys


def test_the_code_is_in_the_key(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = corpus_key(config(texts), {})
    code = shared._code("data")
    assert {"data/corpus.py", "data/shared.py", "xushi"} <= code.keys()
    monkeypatch.setattr(shared, "_code", lambda *_: code | {"data/corpus.py": "another hash"})
    assert corpus_key(config(texts), {}) != before


def test_the_same_text_elsewhere_is_the_same_corpus(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Key and files, to the byte: what is shared must not depend on which run made it."""
    moved = tmp_path / "somewhere" / "else"
    shutil.copytree(texts, moved)
    os.utime(moved / "0" / "00.txt", (1, 1))
    monkeypatch.chdir(moved.parent)
    here = [config(texts), config(moved), config(Path("else"), sequence_length=32)]
    assert len({corpus_key(each, extra()) for each in here}) == 1
    for number, each in enumerate(here):
        build_corpus(each, extra(), tmp_path / f"corpus{number}")
    first, *others = (hashes(tmp_path / f"corpus{number}") for number in range(3))
    assert len(first) == 5 and others == [first, first]


def test_packages_are_known_by_what_they_hold(site: Path) -> None:
    def install(text: str) -> None:
        (info := site / "pack-1.dist-info").mkdir(exist_ok=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pack\nVersion: 1\n")
        (info / "RECORD").write_text("pack.py,,\n")
        (site / "pack.py").write_text(text)

    source = SourceConfig(name="python", kind="packages", packages=["pack"])
    packages = DataConfig(sources=[source], sequence_length=16)
    install("x = 1\n")
    before = corpus_key(packages, {})
    assert corpus_key(packages, {}) == before
    install("x = 2\n")
    assert corpus_key(packages, {}) != before


def test_a_second_run_takes_all_three(texts: Path, tmp_path: Path) -> None:
    def run(name: str, length: int = 16, size: int = 270) -> list[bool]:
        corpus = tmp_path / name / "data" / "corpus"
        made = [obtain_corpus(config(texts, sequence_length=length), extra(), corpus)]
        made.append(obtain_tokenizer(corpus, size, tmp_path / name / "tokenizer"))
        tokenizer = Tokenizer.load(tmp_path / name / "tokenizer")
        tokens = tmp_path / name / "data" / "tokens"
        return [*made, obtain_tokens(corpus, tokenizer, length, tokens)]

    assert run("one") == [True, True, True] and run("two") == [False, False, False]
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    assert run("longer", length=32) == [False, False, True]
    assert run("larger", size=271) == [False, True, True]
    (texts / "0" / "00.txt").write_text("changed")
    assert run("changed") == [True, True, True]


def test_keys_of_tokenizer_and_tokens(texts: Path, tmp_path: Path) -> None:
    build_corpus(config(texts), {}, corpus := tmp_path / "corpus")
    key = tokenizer_key(corpus, 280)
    assert len({key, tokenizer_key(corpus, 281), tokenizer_key(corpus, 280, tools=True)}) == 3
    tokenizers = [Tokenizer.train(["the tree the tree"] * 9, size) for size in (263, 265)]
    keys = {tokens_key(corpus, each, length) for each in tokenizers for length in (16, 32)}
    assert len(keys) == 4
    build_corpus(config(texts, {"weight": 2.0}), {}, other := tmp_path / "other")
    assert tokenizer_key(other, 280) == key  # it trains on the same texts
    assert tokens_key(other, tokenizers[0], 16) not in keys  # and the manifest names weights


def test_text_that_changes_while_it_is_read_is_not_kept(
    texts: Path, tmp_path: Path, cache: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = shared.build_corpus

    def changing(*arguments: object) -> None:
        (texts / "0" / "00.txt").write_text("changed in the middle")
        build(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(shared, "build_corpus", changing)
    with pytest.raises(Failed, match="changed while it was read"):
        obtain_corpus(config(texts), {}, tmp_path / "corpus")
    assert cache.entries() == [] and not (tmp_path / "corpus").exists()


def test_a_large_text_is_hashed_without_being_held(tmp_path: Path) -> None:
    (tmp_path / "large.txt").write_bytes(b"0123456789abcde\n" * (1 << 20))  # 16 MiB
    shared._code("data")
    tracemalloc.start()
    corpus_key(config(tmp_path / "large.txt"), {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20
