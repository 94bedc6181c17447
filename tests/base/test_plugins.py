import errno
import os
import sys
from pathlib import Path

import pytest

from xushi.base.errors import BadInput
from xushi.base.plugins import code_of, is_file_spec, load_class


class Shape:
    pass


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "shapes.py").write_text(
        "import sys\nfrom dataclasses import dataclass\n"
        "Shape = sys.modules['__shape__'].Shape\n"
        "@dataclass\nclass Square(Shape):\n    side: int = 2\n"
        "class Loose:\n    pass\n"
        "number = 3\n"
    )
    sys.modules["__shape__"] = sys.modules[__name__]
    yield tmp_path
    del sys.modules["__shape__"]


def test_loads_a_class_and_runs_its_file_once(folder):
    square = load_class("shapes.py:Square", Shape, folder)
    assert square().side == 2
    assert load_class(f"{folder}/shapes.py:Square", Shape, folder / "elsewhere") is square


def test_a_changed_file_is_loaded_anew(folder):
    square = load_class("shapes.py:Square", Shape, folder)
    file = folder / "shapes.py"
    file.write_text(file.read_text().replace("= 2", "= 5"))
    assert load_class("shapes.py:Square", Shape, folder)().side == 5
    assert square().side == 2
    assert code_of(square) != code_of(load_class("shapes.py:Square", Shape, folder))
    assert code_of(Shape) == ""


@pytest.mark.parametrize("writes_bytecode", [True, False])
def test_a_file_changed_at_the_same_size_and_time_is_loaded_anew(
    folder, monkeypatch, writes_bytecode
):
    monkeypatch.setattr(sys, "dont_write_bytecode", not writes_bytecode)
    load_class("shapes.py:Square", Shape, folder)
    file = folder / "shapes.py"
    before = file.stat()
    file.write_text(file.read_text().replace("= 2", "= 7"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load_class("shapes.py:Square", Shape, folder)().side == 7
    assert not (folder / "__pycache__").exists()


def test_a_file_that_cannot_be_read_is_told(folder, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(BadInput, match=r"shapes\.py cannot be read: Permission denied"):
        load_class("shapes.py:Square", Shape, folder)


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("shapes:Square", "does not name a class of a file"),
        ("shapes.py", "does not name a class of a file"),
        ("absent.py:Square", "does not exist"),
        ("shapes.py:Circle", "defines no class Circle"),
        ("shapes.py:number", "defines no class number"),
        ("shapes.py:Loose", "is not a subclass of Shape"),
    ],
)
def test_what_cannot_be_loaded_is_told(folder, spec, problem):
    with pytest.raises(BadInput, match=problem):
        load_class(spec, Shape, folder)


def test_a_file_that_fails_is_told_each_time(folder):
    (folder / "broken.py").write_text("1 / 0\n")
    for _ in range(2):
        with pytest.raises(BadInput, match=r"broken\.py failed: ZeroDivisionError"):
            load_class("broken.py:Square", Shape, folder)


def test_the_form_of_a_spec():
    assert is_file_spec("a/b.py:C") and not is_file_spec("digit_sum") and not is_file_spec("a.py")
