"""What a user's own text asks of the program: lines of any length, near-copies, many files."""

import random
import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers

from xushi.base.files import sha256_json
from xushi.base.tracking import Tracking
from xushi.data import DataConfig, SourceConfig, load_summary
from xushi.report import words
from xushi.report.charts import Axes, Series, line_chart
from xushi.report.page import page_of
from xushi.report.read import Run
from xushi.report.style import STYLE
from xushi.run.place import RunPlace
from xushi.run.stages.data import Data
from xushi.tokenizer import Tokenizer
from xushi.tokenizer import tokenizer as tokenizer_module

UNBROKEN = {
    "han": "".join(map(chr, range(0x4E00, 0x4E00 + 400))),
    "dna": "ACGT",
    "cyrillic": "абвгдежзиклмн",
    "rulers": "=-#*",
    "minified": "abcdefg.(){};=,",
    "digits": "0123456789",
    "nothing": "\0\x01",
    "spaces": " ",
}


def unbroken(kind: str, length: int) -> str:
    return "".join(random.Random(3).choices(UNBROKEN[kind], k=length))


@pytest.mark.parametrize("kind", UNBROKEN)
def test_the_trainer_sees_short_pre_tokens_of_short_texts(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its time grows with the square of a pre-token, and its memory with the longest text."""
    texts: list[str] = []
    pre_tokens: list[int] = []
    train = tokenizers.Tokenizer.train_from_iterator

    def watched(self: tokenizers.Tokenizer, given: Iterable[str], trainer: Any) -> None:
        texts.extend(given)
        for text in texts:
            found = self.pre_tokenizer.pre_tokenize_str(text)
            pre_tokens.extend(end - start for _, (start, end) in found)
        train(self, texts, trainer=trainer)

    monkeypatch.setattr(tokenizers.Tokenizer, "train_from_iterator", watched)
    monkeypatch.setattr(tokenizer_module, "_CHUNK_CHARACTERS", 3000)
    text = unbroken(kind, 20_000)
    tokenizer = Tokenizer.train([text], 263)
    assert "".join(texts) == text
    assert max(map(len, texts)) <= 6000
    assert max(pre_tokens) <= 256
    # What is saved has no such blocks, since other programs know the pre-tokenizer by its name.
    assert "256" not in tokenizer._backend.to_str().split('"model"')[0]


@pytest.mark.parametrize("kind", UNBROKEN)
def test_the_library_is_never_given_a_long_text(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of twenty chunks, which is one pre-token for all kinds but digits and minified code."""
    tokenizer = Tokenizer.train([unbroken(each, 2000) for each in UNBROKEN], 400)
    text = unbroken(kind, 60_000) + "\nand on"
    whole = tokenizer._backend.encode(text, add_special_tokens=False).ids
    given = _Watched(tokenizer._backend)
    monkeypatch.setattr(tokenizer_module, "_CHUNK_CHARACTERS", 3000)
    monkeypatch.setattr(tokenizer, "_backend", given)
    assert tokenizer.encode(text) == whole
    if kind != "spaces":  # a run of white space is read whole: its end decides where it is cut
        assert max(given.lengths) <= 6000
    assert sum(given.lengths) <= 3 * len(text)


class _Watched:
    """A backend that notes the length of each text that it encodes."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self.lengths: list[int] = []

    def encode(self, text: str, add_special_tokens: bool) -> tokenizers.Encoding:
        self.lengths.append(len(text))
        return self._backend.encode(text, add_special_tokens=add_special_tokens)

    def encode_batch_fast(
        self, texts: list[str], add_special_tokens: bool
    ) -> list[tokenizers.Encoding]:
        self.lengths.extend(map(len, texts))
        return self._backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)


WORDS = [
    "model",
    "data",
    "train",
    "token",
    "layer",
    "expert",
    "head",
    "cache",
    "batch",
    "step",
    "loss",
    "rate",
]


def write_notes(directory: Path, count: int) -> None:
    """Notes with a text of their own each."""
    directory.mkdir()
    for number in range(count):
        text = "\n".join(
            " ".join(random.Random(f"{number}/{line}").choices(WORDS, k=9)) for line in range(12)
        )
        (directory / f"{number:05}.txt").write_text(text + "\n", encoding="utf-8")


def data_stage(notes: Path, run: Path) -> dict[str, Any]:
    """The results of the data stage on `notes`."""
    config = DataConfig(
        sequence_length=64, sources=[SourceConfig(name="notes", kind="text", glob=str(notes))]
    )
    stage = Data(SimpleNamespace(data=config, environment=None))  # type: ignore[arg-type]
    return stage.run(RunPlace(run, Tracking(None))).flat()


def headline(results: dict[str, Any]) -> str:
    measured = {"evaluate.bits_per_byte": 1.0, "evaluate.bits_per_byte_xz": 2.0}
    return words.headline(Run(Path(), results | measured, {}, "", None))


COPIES = {
    "line feed": lambda text: text + "\n",
    "carriage returns": lambda text: text.replace("\n", "\r\n"),
    "byte order mark": lambda text: "\ufeff" + text,
    "indented": lambda text: text.replace("\n", "\n    "),
}


@pytest.mark.parametrize("kind", COPIES)
def test_near_copies_across_the_hold_out_are_measured_and_told(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = tmp_path / "notes"
    write_notes(notes, 60)
    alone = data_stage(notes, tmp_path / "alone")
    assert alone["data.heldout_overlap"] < 0.01
    assert headline(alone).endswith("on text it never saw.")
    assert capsys.readouterr().err == ""
    for path in list(notes.iterdir()):
        copy = COPIES[kind](path.read_text(encoding="utf-8"))
        (notes / f"copy of {path.name}").write_bytes(copy.encode())
    copied = data_stage(notes, tmp_path / "copied")
    assert copied["data.heldout_overlap"] > 0.5
    assert "of it stands in the training text too" in headline(copied)
    share = f"{copied['data.heldout_overlap']:.1%}"
    assert f"data: {share} of the held-out text stands in the training text" in (
        capsys.readouterr().err
    )


def test_what_is_held_out_is_counted_and_not_listed(tmp_path: Path) -> None:
    """Results and report stay short however many documents there are."""
    write_notes(tmp_path / "few", 300)
    results = data_stage(tmp_path / "few", tmp_path / "run")
    summary = load_summary(tmp_path / "run" / "data" / "corpus")
    groups = summary.heldout_groups
    assert results["data.heldout_groups"] == len(groups) > 12
    assert results["data.heldout_groups_named"] == ", ".join(groups[:12])
    assert results["data.heldout_groups_sha256"] == sha256_json(groups)
    assert all(len(str(value)) < 1000 for value in results.values())
    page = page_of(Run(tmp_path, results, {}, "", None))
    assert f"{len(groups)} groups are held out whole, such as {groups[0]}, " in page
    assert f"{groups[11]}." in page
    assert groups[12] not in page


def tick_extents(chart: str, container: int) -> list[tuple[float, float]]:
    """Left and right end of each label below a chart that is shown in a container so wide; text of
    7 pixels a character, and 46 pixels left of the plot.
    """
    right = re.search(r"--right:(\d+)px", chart)
    assert right is not None
    plot = container - 46 - int(right[1])
    extents = []
    for shown_from, anchor, place, text in re.findall(
        r'class="tick from(\d+)" text-anchor="(\w+)" x="([\d.]+)%" y="\d+">([^<]+)<', chart
    ):
        if int(shown_from) <= container:
            left = float(place) / 100 * plot
            left -= {"start": 0, "middle": 0.5, "end": 1}[anchor] * 7 * len(text)
            extents.append((left, left + 7 * len(text)))
    return extents


@pytest.mark.parametrize("name", ["", "next token", "xz -9 after the text"])
@pytest.mark.parametrize("end", [7, 99, 120, 1013, 5400, 98_765, 894_000, 4_510_000, 12_000_001])
def test_ticks_do_not_overlap_on_a_phone_or_a_screen(name: str, end: int) -> None:
    series = Series(name, [(0.004 * end, 1.0), (end, 2.0)])
    chart = line_chart([series], Axes("loss", "tokens", "nats"))
    counts = []
    for container in (280, 325, 420, 500, 640, 1000):
        extents = tick_extents(chart, container)
        assert extents, container
        for before, after in pairwise(extents):
            assert before[1] + 5 < after[0], (container, extents)
        counts.append(len(extents))
    assert counts == sorted(counts) and counts[-1] >= 3


def test_the_date_is_not_broken_and_has_a_line_of_its_own_on_a_phone() -> None:
    """At 40rem and less the name and the date of a run are below the mark and the button."""
    phone = STYLE.partition("@media (max-width:40rem)")[2].partition("@media print")[0]
    assert ".day{white-space:nowrap}" in STYLE
    assert "flex-wrap:wrap" in phone and ".kicker .run{order:1;flex-basis:100%}" in phone
