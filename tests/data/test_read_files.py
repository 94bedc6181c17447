"""Whether files are as they were read: by size and times, or else by their bytes."""

import os
import shutil
import time
from pathlib import Path

import pytest

from xushi.base.errors import BadInput
from xushi.data import DataConfig, SourceConfig, read_files
from xushi.data.read_files import ReadFiles, difference, look_at


def config(directory: Path, *more: Path) -> DataConfig:
    sources = [
        SourceConfig(name=f"s{number}", kind="text", glob=str(place))
        for number, place in enumerate((directory, *more))
    ]
    return DataConfig(sources=sources, sequence_length=16)


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    directory = tmp_path / "notes"
    directory.mkdir()
    for name in "abc":
        (directory / f"{name}.md").write_text(f"text {name}")
    return directory


def settled(files: ReadFiles) -> ReadFiles:
    """As if the files had been read long after they were written."""
    return files.model_copy(update={"read_at": time.time_ns() + 10**12})


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files whose bytes are read."""
    names: list[str] = []
    own = read_files.sha256_file

    def sha256_file(path: Path) -> str:
        names.append(path.name)
        return own(path)

    monkeypatch.setattr(read_files, "sha256_file", sha256_file)
    return names


def test_what_did_not_change_is_not_read_again(notes: Path, hashed: list[str]) -> None:
    before = settled(look_at(config(notes)))
    assert hashed == ["a.md", "b.md", "c.md"]
    hashed.clear()
    assert difference(before, look_at(config(notes), before)) == "" and hashed == []
    (notes / "b.md").touch()
    assert difference(before, look_at(config(notes), before)) == "" and hashed == ["b.md"]


def test_a_file_that_was_just_written_is_read_again(notes: Path, hashed: list[str]) -> None:
    """It may be written a second time within one tick of the clock."""
    before = look_at(config(notes))
    hashed.clear()
    look_at(config(notes), before)
    assert hashed == ["a.md", "b.md", "c.md"]


def test_equal_size_and_time_do_not_hide_other_bytes(notes: Path) -> None:
    status = (notes / "a.md").stat()
    before = settled(look_at(config(notes)))
    (notes / "a.md").write_text("texT a")
    os.utime(notes / "a.md", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (notes / "a.md").stat().st_mtime_ns == status.st_mtime_ns
    assert difference(before, look_at(config(notes), before)) == "1 changed (a.md)"


def test_what_changed_is_said(notes: Path) -> None:
    before = look_at(config(notes))
    (notes / "a.md").write_text("other")
    (notes / "b.md").write_text("other too")
    (notes / "c.md").rename(notes / "d.md")
    now = look_at(config(notes), before)
    assert difference(before, now) == "2 changed (a.md, …), 1 new (d.md), 1 gone (c.md)"
    (notes / "a.md").rename(notes / "0.md")  # the first of them still
    assert difference(now, look_at(config(notes), now)) == "1 new (0.md), 1 gone (a.md)"


def test_neither_place_nor_time_is_a_change(notes: Path, tmp_path: Path) -> None:
    before = look_at(config(notes))
    shutil.copytree(notes, tmp_path / "copy")
    os.utime(tmp_path / "copy" / "a.md", (1, 1))
    notes.rename(tmp_path / "moved")
    (tmp_path / "copy" / "left_out.pdf").write_bytes(b"%PDF")
    for place in ("copy", "moved"):
        assert difference(before, look_at(config(tmp_path / place), before)) == ""


def test_files_of_several_sources_are_told_apart(
    notes: Path, tmp_path: Path, hashed: list[str]
) -> None:
    shutil.copytree(notes, other := tmp_path / "other")
    before = settled(look_at(config(notes, other)))
    (other / "a.md").write_text("other")
    hashed.clear()
    now = look_at(config(notes, other), before)
    assert hashed == ["a.md"]
    assert difference(before, now) == "1 changed (s1/a.md)"
    assert difference(before, look_at(config(other, notes), before)) == "1 changed (s0/a.md)"


def test_it_is_written_and_read(notes: Path, tmp_path: Path) -> None:
    (notes / "x.pdf").touch()
    files = look_at(config(notes))
    files.write(tmp_path / "files.json")
    assert ReadFiles.read(tmp_path / "files.json") == files
    assert files.sources[0].left_out[0].reason == "formatted"
    (tmp_path / "files.json").write_text("{}")
    with pytest.raises(BadInput, match=r"files\.json"):
        ReadFiles.read(tmp_path / "files.json")
