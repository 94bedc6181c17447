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
from xushi.base.errors import XushiError


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


def test_write_json(tmp_path):
    files.write_json(tmp_path / "a.json", {"b": "虚", "a": 1})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "a": 1,\n  "b": "虚"\n}\n'
