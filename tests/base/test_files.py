"""Files are complete or absent, even when a write fails or the process is killed."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xushi.base import files
from xushi.base.errors import BadInput, XushiError


def test_write_atomic_replaces_and_makes_directories(tmp_path):
    path = tmp_path / "a" / "b.txt"
    files.write_atomic(path, "old 虚实")
    files.write_atomic(path, b"new")
    assert path.read_bytes() == b"new" and [p.name for p in path.parent.iterdir()] == ["b.txt"]


def test_a_failed_write_leaves_the_old_content_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    files.write_atomic(path, "old")
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: (_ for _ in ()).throw(full))
    with pytest.raises(XushiError, match="no space left") as error:
        files.write_atomic(path, "new")
    assert error.value.exit_code == 1 and str(path) in error.value.problem
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "no space"),
        (errno.EDQUOT, "no space"),
        (errno.EROFS, "cannot be written"),
        (errno.EACCES, "cannot be written"),
        (errno.ENOTDIR, "cannot be written: Not a directory"),
        (errno.ENAMETOOLONG, "cannot be written: File name too long"),
    ],
)
def test_disk_errors_are_told(tmp_path, number, words):
    with pytest.raises(XushiError, match=words), files.disk_errors(tmp_path):
        raise OSError(number, os.strerror(number))


def test_other_errors_pass(tmp_path):
    with pytest.raises(OSError, match="strange"), files.disk_errors(tmp_path):
        raise OSError(errno.EIO, "strange")


def test_directory_in_place(tmp_path):
    place = tmp_path / "made"
    for content in ("one", "two"):
        with files.directory_in_place(place) as aside:
            (aside / "inner").mkdir()
            (aside / "inner" / content).write_text(content)
            assert not (place / "inner" / content).exists()
        assert [p.name for p in (place / "inner").iterdir()] == [content]
    assert [p.name for p in tmp_path.iterdir()] == ["made"]


def test_a_failed_directory_leaves_the_old_one(tmp_path):
    place = tmp_path / "made"
    with files.directory_in_place(place) as aside:
        (aside / "old").touch()
    with pytest.raises(ZeroDivisionError), files.directory_in_place(place) as aside:
        (aside / "new").touch()
        raise ZeroDivisionError
    assert [p.name for p in place.iterdir()] == ["old"] and [
        p.name for p in tmp_path.iterdir()
    ] == ["made"]


def test_an_old_directory_that_a_kill_moved_away_comes_back(tmp_path):
    """The kill falls between the two renames; the next attempt fails, and nothing is lost."""
    place = tmp_path / "made"
    (tmp_path / ".made.old").mkdir()
    (tmp_path / ".made.old" / "old").touch()
    (tmp_path / ".made.partial").mkdir()
    with pytest.raises(ZeroDivisionError), files.directory_in_place(place):
        raise ZeroDivisionError
    assert [p.name for p in place.iterdir()] == ["old"]
    assert [p.name for p in tmp_path.iterdir()] == ["made"]


def test_paths_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    for path in (
        tmp_path / "file" / "inner",
        tmp_path / ("a" * 300),
        tmp_path / "file" / "x" / "y",
    ):
        with pytest.raises(BadInput, match="cannot be written"):
            files.write_atomic(path, "")
        with pytest.raises(BadInput, match="cannot be written"), files.directory_in_place(path):
            pass
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.fixture
def flushed(monkeypatch):
    """The paths flushed since, in order."""
    paths = []
    flush = files.fsync_path
    monkeypatch.setattr(files, "fsync_path", lambda path: (paths.append(path), flush(path)))
    return paths


def test_a_directory_is_flushed_with_all_that_is_in_it_and_above_it(tmp_path, flushed):
    place = tmp_path / "a" / "b" / "made"
    with files.directory_in_place(place) as aside:
        (aside / "inner" / "deep").mkdir(parents=True)
        (aside / "inner" / "deep" / "file").touch()
    inside = {aside / "inner" / "deep" / "file", aside / "inner" / "deep", aside / "inner", aside}
    assert inside <= set(flushed)  # before the rename: afterwards these paths do not exist
    assert flushed[:2] == [tmp_path, tmp_path / "a"]  # the entries of a and of a/b
    assert flushed[-1] == place.parent


def test_parents_of_a_file_are_flushed(tmp_path, flushed):
    files.write_atomic(tmp_path / "a" / "b" / "file", "")
    assert flushed == [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]


def test_what_a_killed_directory_left_is_removed(tmp_path):
    place = tmp_path / "made"
    for leftover in (".made.partial", ".made.old"):
        (tmp_path / leftover / "inner").mkdir(parents=True)
    with files.directory_in_place(place) as aside:
        assert aside == files.aside_of(place) and not list(aside.iterdir())
    assert [p.name for p in tmp_path.iterdir()] == ["made"]


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    """Only files that are named as ours, old enough, and of a process that is gone."""
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    path, minutes_ago = tmp_path / "a[1].txt", time.time() - 120
    ours = [f".a[1].txt.{gone.pid}.partial", f".a[1].txt.{2**70}.partial"]
    others = [
        f".a[1].txt.{os.getpid()}.partial.mine", f".a[1].txt.{os.getppid()}.partial",
        ".a[1].txt.mine.partial", f".a1.txt.{gone.pid}.partial", f"a[1].txt.{gone.pid}.partial",
    ]  # fmt: skip
    for name in ours + others:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (minutes_ago, minutes_ago))
    files.write_atomic(path, "")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*others, path.name])
    (tmp_path / ours[0]).touch()  # it may be a living writer's on another machine
    files.write_atomic(path, "")
    assert (tmp_path / ours[0]).exists()


def test_a_killed_writer_leaves_one_of_its_contents(tmp_path):
    path = tmp_path / "a.txt"
    script = (
        "import sys, pathlib; from xushi.base.files import write_atomic\n"
        "for i in range(10**6): write_atomic(pathlib.Path(sys.argv[1]), str(i % 10) * 100_000)\n"
    )
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", script, str(path)])
        deadline = time.monotonic() + 30
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        content = path.read_text()
        assert len(content) == 100_000 and len(set(content)) == 1


@given(st.binary(max_size=300))
def test_sha256_file(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("hash") / "file"
    path.write_bytes(content)
    assert files.sha256_file(path) == hashlib.sha256(content).hexdigest()


def test_sha256_json_does_not_depend_on_order():
    assert files.sha256_json({"a": 1, "b": [1, 2]}) == files.sha256_json({"b": [1, 2], "a": 1})
    assert files.sha256_json({"a": 1}) != files.sha256_json({"a": 1.5})


@pytest.mark.parametrize(("content", "words"), [
    (None, "does not exist"), (b"{", "cannot be read"), (b"\xff{}", "cannot be read"),
    (b"", "cannot be read"), (b"[]", "not a JSON object"), (b"[" * 100_000, "cannot be read"),
    (b'{"a": ' + b"9" * 5000 + b"}", "cannot be read"),
])  # fmt: skip
def test_json_that_cannot_be_read(tmp_path, content, words):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(XushiError, match=words) as error:
        files.read_json(path, "make it again")
    assert str(path) in error.value.problem and error.value.remedy == "make it again"
    with pytest.raises(XushiError, match="cannot be read"):
        files.read_json(tmp_path, "")


def test_write_json(tmp_path):
    files.write_json(tmp_path / "a.json", {"b": "虚", "a": 1})
    assert files.read_json(tmp_path / "a.json", "") == {"a": 1, "b": "虚"}
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "a": 1,\n  "b": "虚"\n}\n'
