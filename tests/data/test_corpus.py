"""A corpus on disk: decisions, hashes, held-out bytes, and what is left after a failure."""

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from xushi.base.errors import XushiError
from xushi.data import (
    DataConfig,
    ExtraSource,
    SourceConfig,
    build_corpus,
    corpus,
    first_training_texts,
    heldout_bytes,
    load_summary,
    make_document,
    read_documents,
    training_texts,
)


def write(directory: Path, count: int = 60) -> None:
    generator = random.Random(1)
    for i in range(count):
        path = directory / f"{i % 3}" / f"{i:03}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            f"file {i}\n" + "some words 天地\n" * generator.randint(1, 20), encoding="utf-8"
        )


def config(directory: Path, **keys: Any) -> DataConfig:
    source = SourceConfig(name="notes", kind="text", glob=str(directory))
    return DataConfig(sources=[source], sequence_length=16, **keys)


def test_what_is_written(tmp_path: Path) -> None:
    write(tmp_path / "in")
    (tmp_path / "in" / "empty.txt").touch()
    (tmp_path / "in" / "1" / "twin.txt").write_bytes(
        (tmp_path / "in" / "0" / "000.txt").read_bytes()
    )
    summary = build_corpus(config(tmp_path / "in"), {}, tmp_path / "corpus")
    assert summary == load_summary(tmp_path / "corpus")
    assert (summary.files, summary.documents, summary.rule) == (62, 60, "groups")
    assert [(each.reason, each.count, each.examples) for each in summary.sources[0].left_out] == [
        ("empty", 1, ["empty.txt"]),
        ("duplicates", 1, ["1/twin.txt"]),
    ]
    train, heldout = (
        list(read_documents(tmp_path / "corpus", name)) for name in ("train", "heldout")
    )
    assert len(train) + len(heldout) == 60 and len(heldout) == summary.heldout_documents
    assert [d.text for d in train] == list(training_texts(tmp_path / "corpus"))
    assert heldout_bytes(tmp_path / "corpus") == "".join(d.text for d in heldout).encode()
    assert summary.heldout_bytes == len(heldout_bytes(tmp_path / "corpus"))
    assert summary.heldout_groups == [f"notes/{d.meta['path']}" for d in heldout]
    for documents in (train, heldout):
        assert [d.meta["path"] for d in documents] == sorted(d.meta["path"] for d in documents)

    rows = pq.read_table(tmp_path / "corpus" / "decisions.parquet").to_pylist()
    last = {row["uid"]: row for row in rows}
    assert set(rows[0]) == {"uid", "step", "version", "score", "kept", "reason"}
    assert {uid for uid, row in last.items() if row["kept"]} == {d.uid for d in train}
    held = {uid for uid, row in last.items() if row["step"] == "holdout" and not row["kept"]}
    assert held == {d.uid for d in heldout}
    (twin,) = [row for row in rows if row["step"] == "exact_duplicates" and not row["kept"]]
    (kept,) = [d for d in train + heldout if d.meta["path"] == "0/000.txt"]
    assert twin["reason"] == f"same text as {kept.uid.hex()}"


def test_duplicates_are_found_across_sources(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b", 70)
    both = DataConfig(
        sources=[SourceConfig(name=n, kind="text", glob=str(tmp_path / n)) for n in "ab"],
        sequence_length=16,
    )
    summary = build_corpus(both, {}, tmp_path / "corpus")
    assert [s.documents for s in summary.sources] == [60, 10]
    assert [[each.count for each in s.left_out] for s in summary.sources] == [[], [60]]


def test_same_input_same_bytes_wherever_it_lies(tmp_path: Path) -> None:
    for place in ("one", "two"):
        write(tmp_path / place)
        build_corpus(config(tmp_path / place), {}, tmp_path / f"corpus-{place}")
    names = sorted(path.name for path in (tmp_path / "corpus-one").iterdir())
    assert names == [
        "decisions.parquet",
        "heldout-00000.parquet",
        "heldout.bin",
        "summary.json",
        "train-00000.parquet",
    ]
    for name in set(names) - {"summary.json"}:
        assert (tmp_path / "corpus-one" / name).read_bytes() == (
            tmp_path / "corpus-two" / name
        ).read_bytes(), name
    one, two = (load_summary(tmp_path / f"corpus-{place}") for place in ("one", "two"))
    assert one.sha256 == two.sha256


def test_hash_sees_paths_and_contents(tmp_path: Path) -> None:
    write(tmp_path / "in")
    hashes = [build_corpus(config(tmp_path / "in"), {}, tmp_path / "corpus").sha256]
    (tmp_path / "in" / "0" / "000.txt").rename(tmp_path / "in" / "0" / "0000.txt")
    hashes.append(build_corpus(config(tmp_path / "in"), {}, tmp_path / "corpus").sha256)
    with open(tmp_path / "in" / "0" / "0000.txt", "a") as file:
        file.write("x")
    hashes.append(build_corpus(config(tmp_path / "in"), {}, tmp_path / "corpus").sha256)
    assert len(set(hashes)) == 3
    # The hash is of the text only, so it does not depend on the salt.
    assert (
        build_corpus(config(tmp_path / "in", salt="other"), {}, tmp_path / "corpus").sha256
        == hashes[-1]
    )


def test_the_recipe_decides_how_much_is_held_out(tmp_path: Path) -> None:
    write(tmp_path / "in", 400)
    for fraction in (0.055, 0.075):
        summary = build_corpus(
            config(tmp_path / "in", heldout=fraction), {}, tmp_path / str(fraction)
        )
        assert summary.heldout_bytes / summary.bytes == pytest.approx(fraction, abs=0.004)


def test_run_directories_are_no_part_of_it(tmp_path: Path) -> None:
    """The run that it is made for may be the one beside the text."""
    write(tmp_path / "in")
    before = build_corpus(config(tmp_path / "in"), {}, tmp_path / "corpus")
    (tmp_path / "in" / "run").mkdir()
    for name in ("recipe.toml", "tracking.sqlite"):
        (tmp_path / "in" / "run" / name).touch()
    assert build_corpus(config(tmp_path / "in"), {}, tmp_path / "other") == before


def test_the_first_texts_have_so_many_characters_together(monkeypatch: pytest.MonkeyPatch) -> None:
    def texts(directory: Path) -> Iterator[str]:
        yield from ("天地", "abc")
        read.append("behind")
        yield "d"

    read: list[str] = []
    monkeypatch.setattr(corpus, "training_texts", texts)
    for size, wanted in ((1, ["天"]), (2, ["天地"]), (4, ["天地", "ab"]), (5, ["天地", "abc"])):
        assert list(first_training_texts(Path("corpus"), size)) == wanted and not read
    assert list(first_training_texts(Path("corpus"), 9)) == ["天地", "abc", "d"]


def test_hash_is_what_the_documentation_says(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("line\n" * 300)
    digest = hashlib.sha256()
    for part in (b"a.txt", b"line\n" * 300):
        digest.update(len(part).to_bytes(8, "little") + part)
    assert (
        build_corpus(config(tmp_path / "in"), {}, tmp_path / "corpus").sha256 == digest.hexdigest()
    )


def test_extra_documents_are_trained_on_and_never_held_out(tmp_path: Path) -> None:
    write(tmp_path / "in")
    alone = build_corpus(config(tmp_path / "in"), {}, tmp_path / "alone")
    transcripts = [
        make_document("digits", "1 + 1 = 2\n" * 50, {"path": f"train/{i}"}) for i in range(90)
    ]
    summary = build_corpus(
        config(tmp_path / "in"), {"digits": ExtraSource(transcripts, 0.5)}, tmp_path / "corpus"
    )
    assert (summary.bytes, summary.heldout_bytes, summary.sha256) == (
        alone.bytes,
        alone.heldout_bytes,
        alone.sha256,
    )
    assert summary.sources[1].documents == 90 and summary.sources[1].weight == 0.5
    assert list(read_documents(tmp_path / "corpus", "train"))[-90:] == transcripts
    with pytest.raises(
        XushiError, match="source notes has the same name as an environment's transcripts"
    ):
        build_corpus(
            config(tmp_path / "in"), {"notes": ExtraSource(transcripts)}, tmp_path / "corpus"
        )


def test_failure_leaves_the_old_corpus_and_nothing_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "in")
    build_corpus(config(tmp_path / "in"), {}, tmp_path / "out" / "corpus")
    before = (tmp_path / "out" / "corpus" / "summary.json").read_bytes()

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("xushi.data.corpus._write_decisions", full)
    with pytest.raises(XushiError, match="no space left"):
        build_corpus(config(tmp_path / "in"), {}, tmp_path / "out" / "corpus")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["corpus"]
    assert (tmp_path / "out" / "corpus" / "summary.json").read_bytes() == before


def test_missing_corpus(tmp_path: Path) -> None:
    with pytest.raises(XushiError, match=r"summary\.json does not exist"):
        load_summary(tmp_path)
    with pytest.raises(XushiError, match=r"heldout\.bin cannot be read"):
        heldout_bytes(tmp_path)
