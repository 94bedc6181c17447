"""Which files a source has: what is left out and why, links, runs, several paths, any name."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from xushi.base.errors import BadInput
from xushi.data import SourceConfig
from xushi.data import files as module
from xushi.data.files import find_files, is_run
from xushi.data.names import written


def found(*globs: object, kind: str = "text", **keys: object) -> list[str]:
    source = SourceConfig(name="s", kind=kind, glob=[str(each) for each in globs], **keys)  # type: ignore[arg-type]
    return [file.meta["path"] for file in find_files(source).files]


def left_out(
    *globs: object, kind: str = "text", **keys: object
) -> dict[str, tuple[int, list[str]]]:
    source = SourceConfig(name="s", kind=kind, glob=[str(each) for each in globs], **keys)  # type: ignore[arg-type]
    listed = find_files(source).left_out.listed()
    return {each.reason: (each.count, each.examples) for each in listed}


def write(root: Path, *names: str | bytes, data: bytes = b"text") -> None:
    for name in names:
        path = os.path.join(os.fsencode(root), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)


def make_run(directory: Path) -> None:
    write(directory, "report.txt", "export/base/card.txt")
    owner = {"format": 3, "recipe_hash": "0", "version": "0"}
    (directory / "run.json").write_text(json.dumps(owner))


# Runs


def test_a_run_is_never_text(tmp_path: Path) -> None:
    write(tmp_path, "a.md", "deep/b.md")
    make_run(tmp_path / "deep" / "mine")
    for glob in (tmp_path, tmp_path / "**" / "*", tmp_path / "**" / "*.*"):
        assert found(glob) == ["a.md", "deep/b.md"]
        assert left_out(glob)["runs"] == (1, ["deep/mine"])
    assert found(tmp_path / "*" / "*" / "*.txt") == []
    assert left_out(tmp_path / "*" / "*" / "*.txt")["runs"] == (1, ["deep/mine/report.txt"])


def test_a_directory_named_runs_is_somebodys_own(tmp_path: Path) -> None:
    """Also where runs lie in it, as that of `xushi train .`: only they are left out."""
    write(tmp_path, "a.md", "runs/monday.md")
    make_run(tmp_path / "runs" / "text")
    for glob in (tmp_path, tmp_path / "**" / "*.md"):
        assert found(glob) == ["a.md", "runs/monday.md"]
        assert left_out(glob)["runs"] == (1, ["runs/text"])
    assert found(tmp_path / "*" / "*.md") == ["runs/monday.md"]


def test_what_marks_a_run(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    write(tmp_path / "older", "recipe.toml", "tracking.sqlite")
    write(tmp_path / "half", "recipe.toml", "a.txt")
    (tmp_path / "jogging").mkdir()
    (tmp_path / "jogging" / "run.json").write_text('{"format": "gpx", "km": 5}')
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "run.json").write_text("[1]")
    names = ("run", "older", "half", "jogging", "list")
    assert [is_run(tmp_path / name) for name in names] == [True, True, False, False, False]


@pytest.mark.parametrize("inside", ["", "export/base", "report.txt", "*.txt", "**/*.txt"])
def test_a_path_in_a_run_is_refused(inside: str, tmp_path: Path) -> None:
    make_run(tmp_path / "mine")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    for place in ("mine", "link"):
        with pytest.raises(BadInput, match=r"is in the run directory .*mine, which is never text"):
            found(tmp_path / place / inside)


def test_a_link_into_a_run_is_not_followed(tmp_path: Path) -> None:
    write(tmp_path / "notes", "a.md")
    make_run(tmp_path / "mine")
    (tmp_path / "notes" / "card.txt").symlink_to(tmp_path / "mine" / "export" / "base" / "card.txt")
    (tmp_path / "notes" / "export").symlink_to(tmp_path / "mine" / "export")
    assert found(tmp_path / "notes") == ["a.md"]
    assert left_out(tmp_path / "notes")["runs"] == (2, ["card.txt", "export"])


def test_a_pattern_does_not_follow_a_link_into_a_run_either(tmp_path: Path) -> None:
    write(tmp_path / "notes", "a/b.txt")
    make_run(tmp_path / "mine")
    (tmp_path / "notes" / "export").symlink_to(tmp_path / "mine" / "export" / "base")
    for glob in ("*/*.txt", "**/*.txt"):
        assert found(tmp_path / "notes" / glob) == ["a/b.txt"]
        assert left_out(tmp_path / "notes" / glob)["runs"][0] == 1
    # Tables that lie in a run and are named there are no link into it.
    write(tmp_path / "mine" / "data", "train.parquet")
    assert found(tmp_path / "mine" / "*" / "*.parquet", kind="parquet") == ["data/train.parquet"]


def test_tables_in_a_run_can_be_named(tmp_path: Path) -> None:
    make_run(tmp_path / "mine")
    write(tmp_path / "mine" / "data", "train.parquet")
    assert found(tmp_path / "mine" / "data" / "*.parquet", kind="parquet") == ["train.parquet"]


# Links


def test_every_directory_is_entered_once(tmp_path: Path) -> None:
    write(tmp_path, "d/a.md", "d/deep/b.md")
    for name in ("l1", "l2", "deep/up"):
        (tmp_path / "d" / name).symlink_to(tmp_path / "d")
    for glob in (tmp_path / "d", tmp_path / "d" / "**" / "*.md", tmp_path / "d" / "**"):
        assert found(glob) == ["a.md", "deep/b.md"]
    (tmp_path / "d" / "deep" / "self").symlink_to("self")
    assert left_out(tmp_path / "d") == {"special": (1, ["deep/self"])}


def test_a_link_out_of_the_directory_is_followed_and_one_upwards_is_not(tmp_path: Path) -> None:
    write(tmp_path, "notes/a.md", "elsewhere/b.md", "secret.md")
    (tmp_path / "notes" / "0more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "notes" / "up").symlink_to("..")
    (tmp_path / "elsewhere" / "top").symlink_to("/")
    assert found(tmp_path / "notes") == ["0more/b.md", "a.md"]
    assert left_out(tmp_path / "notes") == {"special": (2, ["0more/top", "up"])}


def test_of_several_links_to_a_directory_the_first_names_its_files(tmp_path: Path) -> None:
    write(tmp_path, "notes/a.md", "elsewhere/b.md")
    for name in ("three", "one", "two"):
        (tmp_path / "notes" / name).symlink_to(tmp_path / "elsewhere")
    assert found(tmp_path / "notes") == ["a.md", "one/b.md"]


def test_a_file_has_its_own_name_and_not_a_links(tmp_path: Path) -> None:
    write(tmp_path, "z/real.md")
    (tmp_path / "a.md").symlink_to(tmp_path / "z" / "real.md")
    (tmp_path / "b").symlink_to(tmp_path / "z")
    write(tmp_path, "m/other.md")
    for name in ("n", "zz"):
        (tmp_path / name).symlink_to(tmp_path / "m")
    names = ["m/other.md", "z/real.md"]
    assert found(tmp_path) == names == found(tmp_path / "**" / "*.md")


# Kinds


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *((f"a.{suffix}", "tables") for suffix in ("jsonl", "json", "csv", "tsv", "html", "ipynb")),
        *((f"a.{suffix}", "packed") for suffix in ("gz", "txt.gz", "zip", "zst")),
        *((f"a.{suffix}", "formatted") for suffix in ("pdf", "PDF", "docx")),
        ("a.parquet", "tables"),
    ],
)
def test_structure_is_left_out_and_refused_by_name(name: str, reason: str, tmp_path: Path) -> None:
    write(tmp_path, name, "b.md")
    for glob in (tmp_path, tmp_path / "*"):
        assert found(glob) == ["b.md"] and left_out(glob) == {reason: (1, [name])}
    with pytest.raises(BadInput, match="is not read as text") as error:
        found(tmp_path / name)
    assert name in error.value.problem and error.value.remedy
    kind = Path(name).suffix.removeprefix(".")
    assert (f'kind = "{kind}"' in error.value.remedy) == (kind in ("jsonl", "parquet"))


def test_what_a_file_without_a_known_suffix_holds(tmp_path: Path) -> None:
    write(tmp_path, "README", "log.1", "empty")
    (tmp_path / "empty").write_bytes(b"")
    write(tmp_path, "cut", data=b"a" * 65535 + "é".encode())
    write(tmp_path, "gbk", data="汉字".encode("gbk"))
    write(tmp_path, "utf16", data="words".encode("utf-16"))
    write(tmp_path, "image", data=b"\x89PNG\0\0")
    assert found(tmp_path) == ["README", "cut", "empty", "log.1"]
    assert left_out(tmp_path) == {"binary": (1, ["image"]), "not_utf8": (2, ["gbk", "utf16"])}


def test_tables_take_their_own_kind(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", "b.ndjson", "c.txt")
    assert found(tmp_path, kind="jsonl") == ["a.jsonl", "b.ndjson"]
    assert left_out(tmp_path, kind="jsonl") == {"other_kind": (1, ["c.txt"])}
    assert found(tmp_path / "c.*", kind="jsonl") == ["c.txt"]  # a pattern says what it means


# Names and paths


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    write(tmp_path, b"\xd6\xd0/a.md", b"b\xff.md", "a\\b.md", "诗.md")
    names = [r"\xd6\xd0/a.md", r"a\\b.md", r"b\xff.md", "诗.md"]
    assert found(tmp_path) == found(tmp_path / "**") == names
    directory = written(os.fsdecode(os.fsencode(tmp_path) + b"/\xd6\xd0"))
    assert found(directory) == ["a.md"]
    assert found(tmp_path, exclude=[r"b\xff*", r"a\\b.md"]) == [r"\xd6\xd0/a.md", "诗.md"]


def test_several_paths_have_one_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "notes/a.md", "notes/.x", "more/notes/a.md", "book.txt")
    paths = [tmp_path / "notes", tmp_path / "more" / "**" / "*.md", tmp_path / "book.txt"]
    assert found(*paths) == ["book.txt", "more/notes/a.md", "notes/a.md"]
    assert left_out(*paths) == {"hidden": (1, ["notes/.x"])}
    monkeypatch.chdir(tmp_path / "notes")
    assert found(".", "../more", tmp_path / "book.txt") == found(*paths)
    # A file that two paths lead to is one file, and a hidden one is counted once.
    assert found(tmp_path, tmp_path / "notes") == found(tmp_path)
    assert left_out(tmp_path, tmp_path / "notes") == left_out(tmp_path)


def test_names_begin_at_the_directory_that_holds_all_also_above_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "here/sub/a.md", "o/c.md", "o/drafts/d.md")
    monkeypatch.chdir(tmp_path / "here")
    assert found("../o", "sub") == ["here/sub/a.md", "o/c.md", "o/drafts/d.md"]
    assert found("../o", "sub", exclude=["o/*"]) == ["here/sub/a.md"]
    assert found("../o") == ["c.md", "drafts/d.md"]


ORDERS = (1, -1)


@pytest.mark.parametrize("order", ORDERS)
def test_what_a_named_file_means_does_not_depend_on_the_order(order: int, tmp_path: Path) -> None:
    """It is read or refused, also where a directory has it under another path."""
    write(tmp_path / "n", "a.md", "x.pdf", ".d.md", ".deep/e.md", ".deep/.f.md", "rows.data")
    (tmp_path / "link").symlink_to(tmp_path / "n" / "x.pdf")
    for name in ("n/x.pdf", "link"):
        with pytest.raises(BadInput, match=r"x\.pdf is not read as text"):
            found(*[tmp_path / "n", tmp_path / name][::order])
    hidden = [tmp_path / "n", tmp_path / "n" / ".d.md", tmp_path / "n" / ".deep"][::order]
    assert found(*hidden) == [".d.md", ".deep/e.md", "a.md", "rows.data"]
    assert left_out(*hidden) == {"formatted": (1, ["x.pdf"]), "hidden": (1, [".deep/.f.md"])}
    for entry in ("rows.data", "*.data"):
        globs = [tmp_path / "n", tmp_path / "n" / entry][::order]
        assert found(*globs, kind="jsonl") == ["rows.data"]


@pytest.mark.parametrize("order", ORDERS)
def test_a_pattern_to_exclude_begins_at_any_entry_that_has_the_file(
    order: int, tmp_path: Path
) -> None:
    write(tmp_path, "n/sub/x.md", "n/sub/y.md", "m/a.md")
    globs = [tmp_path / "n", tmp_path / "n" / "sub", tmp_path / "m"][::order]
    for pattern in ("sub/x*", "x*", "n/sub/x*"):
        assert found(*globs, exclude=[pattern]) == ["m/a.md", "n/sub/y.md"]


def test_names_do_not_tell_where_a_directory_is(tmp_path: Path) -> None:
    write(tmp_path, "one/a/x.md", "one/b/y.md", "two/a/x.md", "two/b/y.md")
    one, two = ((tmp_path / name / "a", tmp_path / name / "b") for name in ("one", "two"))
    assert found(*one) == found(*two) == ["a/x.md", "b/y.md"]


def test_what_is_excluded(tmp_path: Path) -> None:
    write(tmp_path, "a.md", "drafts/b.md", "drafts/deep/c.md", "x/drafts/d.md", "p.pdf")
    for pattern in ("drafts", "drafts/*"):
        assert found(tmp_path, exclude=[pattern]) == ["a.md", "x/drafts/d.md"]
    assert left_out(tmp_path, exclude=["*.md", "*.pdf"]) == {
        "excluded": (5, ["a.md", "drafts/b.md"])
    }
    assert found(tmp_path, exclude=["*drafts"]) == ["a.md"]


@pytest.mark.parametrize(
    ("glob", "stream"), [(".", 2), ("*.txt", 2), ("**/*.txt", 2), (".", 1), ("*.txt", 1)]
)
def test_the_file_that_output_goes_to_is_not_text(glob: str, stream: int, tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "log.txt", "copy.txt")
    kept = os.dup(stream)
    try:
        with open(tmp_path / "log.txt") as log:
            os.dup2(log.fileno(), stream)
            names, counted = found(tmp_path / glob), left_out(tmp_path / glob)
    finally:
        os.dup2(kept, stream)
        os.close(kept)
    assert names == ["a.txt", "copy.txt"] and "log.txt" in found(tmp_path / glob)
    assert counted == {"special": (1, ["log.txt"])}


def test_patterns_to_exclude_that_match_nothing(tmp_path: Path) -> None:
    """What is left out anyway is matched, too: nobody mistyped that."""
    write(tmp_path, "notes/drafts/a.md", "notes/.git/config", "notes/b.md", "book.txt")
    good = ["drafts/", "notes/b*", ".git"]
    wrong = ["draft", "./drafts", str(tmp_path / "notes" / "drafts"), "c.md"]
    globs = [str(tmp_path / "notes"), str(tmp_path / "book.txt")]
    source = SourceConfig(name="s", kind="text", glob=globs, exclude=wrong + good)
    result = find_files(source)
    assert [file.meta["path"] for file in result.files] == ["book.txt"]
    assert result.unmatched == wrong
    packages = SourceConfig(name="s", kind="packages", packages=["pytest"], exclude=["x", "py*"])
    assert find_files(packages).unmatched == []  # they are for other versions, too


def test_what_may_not_be_read_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a.md", "closed/b.md", "secret", "secret.md")
    scandir, real_open = os.scandir, open

    def forbidden(path: object) -> None:
        if str(path).endswith(("closed", "secret", "secret.md")):
            raise PermissionError(13, "Permission denied", str(path))

    def scan(path: object) -> object:
        forbidden(path)
        return scandir(path)  # type: ignore[call-overload]

    def opened(path: object, *rest: object) -> object:
        forbidden(path)
        return real_open(path, *rest)  # type: ignore[call-overload]

    monkeypatch.setattr("os.scandir", scan)
    monkeypatch.setattr("builtins.open", opened)
    assert found(tmp_path) == ["a.md"]
    assert left_out(tmp_path) == {"unreadable": (3, ["closed", "secret"])}
    # What is named is no less unreadable.
    assert left_out(tmp_path, tmp_path / "closed") == left_out(tmp_path)


def test_a_pattern_to_exclude_means_the_same_beside_another_path(tmp_path: Path) -> None:
    """Names begin at what holds all paths; a pattern is tried from there and within each path."""
    write(tmp_path, "notes/drafts/secret.md", "notes/a.md", "book.txt")
    globs = [str(tmp_path / "notes"), str(tmp_path / "book.txt")]
    for pattern in ("drafts/*", "drafts", "drafts/", "notes/drafts"):
        source = SourceConfig(name="t", kind="text", glob=globs, exclude=[pattern])
        assert [file.meta["path"] for file in find_files(source).files] == [
            "book.txt",
            "notes/a.md",
        ]


def test_a_mistyped_pattern_is_told_beside_other_paths(tmp_path: Path) -> None:
    write(tmp_path, "o/a.md", "n/.git/config", "n/b.md")
    (tmp_path / "empty").mkdir()
    for wrong in ("n/**/*.mdd", "empty"):
        globs = [str(tmp_path / "o"), str(tmp_path / wrong)]
        with pytest.raises(BadInput, match="no file matches"):
            find_files(SourceConfig(name="t", kind="text", glob=globs))


def test_a_folder_that_disappears_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a.md", "gone/b.md")
    enter = module._enter

    def vanish(folder: Path, *rest: object) -> None:
        enter(folder, *rest)  # type: ignore[arg-type]
        shutil.rmtree(tmp_path / "gone", ignore_errors=True)

    monkeypatch.setattr(module, "_enter", vanish)
    with pytest.raises(BadInput, match="gone was listed and is not there any more"):
        found(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENOTDIR])
def test_a_file_that_is_gone_and_one_whose_folder_is_a_file_now(number: int) -> None:
    error = module.unreadable(Path("deep/a.md"), OSError(number, os.strerror(number)))
    assert error.problem == "deep/a.md was listed and is not there any more"
    other = module.unreadable(Path("a.md"), OSError(errno.EIO, os.strerror(errno.EIO)))
    assert other.problem == "a.md cannot be read: Input/output error"


def test_a_file_that_is_named_stays_so_beside_its_directory(tmp_path: Path) -> None:
    write(tmp_path, "a.md", "b.md")
    for order in (1, -1):
        globs = [str(tmp_path), str(tmp_path / "b.md")][::order]
        files = find_files(SourceConfig(name="t", kind="text", glob=globs)).files
        assert [(file.meta["path"], file.named) for file in files] == [
            ("a.md", False),
            ("b.md", True),
        ]


@pytest.mark.parametrize(
    ("number", "problem", "remedy"),
    [
        (errno.ENOENT, "was listed and is not there any more", "run the same command again"),
        (errno.EACCES, "cannot be read: Permission denied", "check its permissions"),
        (errno.EIO, "cannot be read: Input/output error", "check the disk"),
    ],
)
def test_what_the_system_does_not_let_us_read(number: int, problem: str, remedy: str) -> None:
    """A folder that is excluded is entered all the same: to exclude it would be no remedy."""
    error = module.unreadable("a", OSError(number, os.strerror(number)))
    assert problem in error.problem and error.remedy.startswith(remedy)
