"""Every kind of source, and every error that a source can have."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from xushi.base.errors import XushiError
from xushi.data import SourceConfig
from xushi.data.left_out import LeftOut
from xushi.data.sources import SourceDocuments, read_source


def read(kind: str = "text", **keys: Any) -> SourceDocuments:
    return read_source(SourceConfig(name="s", kind=kind, **keys))  # type: ignore[arg-type]


def write(directory: Path, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def paths(found: SourceDocuments) -> list[str]:
    return [document.meta["path"] for document in found.documents]


def install(site: Path, name: str, files: dict[str, str | bytes], version: str = "1.0") -> None:
    write(site, files)
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    record = [*reversed(files), f"{info}/METADATA", f"{info}/RECORD", "../bin/tool.py"]
    record.append(str(site.parent / "elsewhere.py"))
    write(
        site,
        {
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
            f"{info}/RECORD": "".join(f"{path},,\n" for path in record),
        },
    )


def test_directory_takes_text_files_and_counts_the_rest(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "b.md": "b",
            "a/z.txt": "z\r\n",
            "a.unknown": "text",
            "code.py": "x",
            ".hidden": "h",
            ".git/config": "c",
            "a/.x": "h",
            "image.png": b"\x89PNG\0\0",
            "latin.bin": b"caf\xe9 au lait",
            "long.log": "a" + "é" * 40000,
        },
    )
    os.symlink(tmp_path / "nowhere", tmp_path / "broken.txt")
    found = read(glob=str(tmp_path))
    assert paths(found) == ["a.unknown", "a/z.txt", "b.md", "code.py", "long.log"]
    assert found.documents[1].text == "z\r\n"
    assert found.files == 5
    assert [(each.reason, each.count, each.examples) for each in found.left_out] == [
        ("hidden", 3, [".git", ".hidden"]),
        ("special", 1, ["broken.txt"]),
        ("binary", 1, ["image.png"]),
        ("not_utf8", 1, ["latin.bin"]),
    ]


def test_globs_and_home_and_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"notes/a.md": "1", "notes/deep/er/b.md": "2", "notes/c.txt": "3"})
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert paths(read(glob="~/notes/**/*.md")) == ["a.md", "deep/er/b.md"]
    assert paths(read(glob="notes/**")) == ["a.md", "c.txt", "deep/er/b.md"]
    assert paths(read(glob="*/*.txt")) == ["notes/c.txt"]
    assert paths(read(glob="notes/a.md")) == ["a.md"]
    assert paths(read(glob="~/notes", exclude=["*.txt", "deep/*"])) == ["a.md"]
    # The uids do not depend on the directory in which the notes are.
    absolute, relative = read(glob=str(tmp_path / "notes" / "*.md")), read(glob="notes/*.md")
    assert [d.uid for d in absolute.documents] == [d.uid for d in relative.documents]


def test_a_name_that_looks_like_a_pattern_is_a_name(tmp_path: Path) -> None:
    write(tmp_path, {"old [1]/a.md": "1"})
    assert paths(read(glob=str(tmp_path / "old [1]"))) == ["a.md"]


def test_linked_file_is_read_once(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "1"})
    os.symlink(tmp_path / "a.txt", tmp_path / "b.txt")
    assert paths(read(glob=str(tmp_path / "*.txt"))) == ["a.txt"]


def test_glob_that_matches_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(XushiError, match=r"source s: no file matches '.*\.txt'"):
        read(glob=str(tmp_path / "*.txt"))
    with pytest.raises(XushiError, match="no file matches"):
        read(glob=str(tmp_path / "missing"))


def test_source_without_text(tmp_path: Path) -> None:
    write(tmp_path, {"image.png": b"\x89PNG\0"})
    with pytest.raises(
        XushiError, match=r"source s has no text; left out: 1 binary file \(image\.png\)"
    ):
        read(glob=str(tmp_path))


def test_not_utf8_names_file_and_line(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": b"fine\nfine\ncaf\xe9\n"})
    with pytest.raises(XushiError, match=r"a\.txt is not UTF-8 \(byte 13, line 3\)"):
        read(glob=str(tmp_path / "a.txt"))


def test_one_file_that_is_not_utf8_among_others_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": b"caf\xe9", "b.txt": "b", "c.md": "汉字".encode("gbk")})
    for glob in (tmp_path, tmp_path / "*", tmp_path / "**" / "*"):
        found = read(glob=str(glob))
        assert paths(found) == ["b.txt"] and found.files == 1
        assert found.left_out == [LeftOut(reason="not_utf8", count=2, examples=["a.txt", "c.md"])]
    (tmp_path / "b.txt").unlink()
    with pytest.raises(XushiError, match=r"no text; left out: 2 files that are not UTF-8"):
        read(glob=str(tmp_path))


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="needs a file that cannot be read even by root"
)
def test_unreadable_file(tmp_path: Path) -> None:
    os.symlink("/proc/self/mem", tmp_path / "a.txt")
    with pytest.raises(XushiError, match=r"a\.txt cannot be read"):
        read(glob=str(tmp_path / "*.txt"))


def test_jsonl(tmp_path: Path) -> None:
    lines = [
        json.dumps({"body": "one\u2028two"}, ensure_ascii=False),
        "",
        json.dumps({"body": "", "id": 3}),
    ]
    write(tmp_path, {"a.jsonl": "\r\n".join(lines), "b.txt": "no"})
    found = read("jsonl", glob=str(tmp_path), field="body")
    assert [(d.text, d.meta) for d in found.documents] == [
        ("one\u2028two", {"path": "a.jsonl", "line": 1}),
        ("", {"path": "a.jsonl", "line": 3}),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', r"a\.jsonl, line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ("1" * 5000, "line 2 is not JSON"),
        ('{"txt": "a"}', "line 2 has no text under 'text'"),
        ('{"text": 3}', "line 2 has no text under 'text'"),
        ('["text"]', "line 2 has no text under 'text'"),
        ('{"text": "\\ud800"}', "line 2 has a lone surrogate"),
    ],
)
def test_bad_jsonl(tmp_path: Path, line: str, message: str) -> None:
    write(tmp_path, {"a.jsonl": '{"text": "fine"}\n' + line + "\n"})
    with pytest.raises(XushiError, match=message):
        read("jsonl", glob=str(tmp_path / "a.jsonl"))


def test_jsonl_that_is_not_utf8(tmp_path: Path) -> None:
    write(tmp_path, {"a.jsonl": b'{"text": "fine"}\n{"text": "\xff"}\n'})
    with pytest.raises(XushiError, match=r"a\.jsonl is not UTF-8 \(byte 27, line 2\)"):
        read("jsonl", glob=str(tmp_path / "a.jsonl"))


def test_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1, 2], "body": ["天地", "b"]}), tmp_path / "a.parquet")
    found = read("parquet", glob=str(tmp_path / "*.parquet"), field="body")
    assert [(d.text, d.meta["row"], d.lang) for d in found.documents] == [
        ("天地", 1, "zh"),
        ("b", 2, "und"),
    ]
    with pytest.raises(XushiError, match=r"a\.parquet has no column 'text' \(it has id, body\)"):
        read("parquet", glob=str(tmp_path))
    with pytest.raises(XushiError, match="row 1 of column 'id' is not text"):
        read("parquet", glob=str(tmp_path), field="id")


def test_bad_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "null.parquet")
    with pytest.raises(XushiError, match="row 2 of column 'text' is not text"):
        read("parquet", glob=str(tmp_path))
    write(tmp_path, {"null.parquet": "not parquet at all"})
    with pytest.raises(XushiError, match=r"null\.parquet cannot be read as Parquet"):
        read("parquet", glob=str(tmp_path))


def test_packages(site: Path) -> None:
    install(
        site,
        "Two-Words",
        {"words/__init__.py": "w = 1", "words/tests/test_w.py": "t", "words/data.json": "{}"},
    )
    install(site, "alpha", {"zebra/z.py": "z = 1", "alpha.py": "天 = 1"})
    found = read("packages", packages=["two_words", "alpha"], exclude=["*/tests/*"])
    assert [(d.meta["path"], d.meta["package"]) for d in found.documents] == [
        ("alpha.py", "alpha"),
        ("words/__init__.py", "two-words"),
        ("zebra/z.py", "alpha"),
    ]
    assert {d.lang for d in found.documents} == {"python"}
    assert found.files == 3
    assert found.left_out == [
        LeftOut(reason="excluded", count=1, examples=["words/tests/test_w.py"])
    ]


def test_bad_packages(site: Path) -> None:
    with pytest.raises(
        XushiError, match="'no-such-package' is not installed\npip install no-such-package"
    ):
        read("packages", packages=["no-such-package"])
    install(site, "only-data", {"only/data.json": "{}"})
    with pytest.raises(XushiError, match="'only-data' has no Python source"):
        read("packages", packages=["only-data"])
    install(site, "broken", {"broken.py": b"\xff"})
    with pytest.raises(XushiError, match=r"no text; left out: 1 file that is not UTF-8"):
        read("packages", packages=["broken"])
    (site / "broken.py").unlink()
    with pytest.raises(XushiError, match=r"broken\.py was listed and is not there"):
        read("packages", packages=["broken"])
    with pytest.raises(XushiError, match="has no text"):
        read("packages", packages=["broken"], exclude=["*"])
