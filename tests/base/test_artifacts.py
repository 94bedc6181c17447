"""Artifacts by content: made once, whole or missing, linked into runs, and never in a run's way."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from xushi.base import artifacts, files, locks
from xushi.base.artifacts import Artifacts, cache_directory, link_tree
from xushi.base.errors import Failed, XushiError
from xushi.base.files import disk_errors, sha256_json

ROOT = Path(__file__).parent.parent.parent
KEY = "corpus-" + sha256_json("one")
OTHER = "tokens-" + sha256_json("two")


class Maker:
    """Writes two files, and counts how often."""

    def __init__(self, text: str = "text") -> None:
        self.text, self.times = text, 0

    def __call__(self, directory: Path) -> None:
        self.times += 1
        assert list(directory.iterdir()) == []
        (directory / "inner").mkdir()
        (directory / "a.txt").write_text(self.text)
        (directory / "inner" / "b.txt").write_text(self.text * 2)


def content(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): path.read_text()
        for path in directory.rglob("*")
        if path.is_file()
    }


WHOLE = {"a.txt": "text", "inner/b.txt": "texttext"}


def never(directory: Path) -> None:
    raise AssertionError("it is in the cache")


@pytest.fixture
def cache(tmp_path: Path) -> Artifacts:
    return Artifacts(tmp_path / "cache")


def files_of(cache: Artifacts, key: str = KEY) -> Path:
    return cache._place() / key / "files"


def left(cache: Artifacts) -> list[str]:
    """Names in the cache that are no artifact and no lock of one."""
    place = cache._place()
    names = {path.name for path in place.iterdir()}
    return sorted(
        name
        for name in names
        if name.startswith(".") or not (place / name.removesuffix(".lock") / "files").is_dir()
    )


def test_runs_share_what_one_of_them_made(cache: Artifacts, tmp_path: Path) -> None:
    make = Maker()
    assert cache.obtain(KEY, make, tmp_path / "one" / "data")
    assert not cache.obtain(KEY, never, tmp_path / "two" / "data")
    assert make.times == 1
    for run in ("one", "two"):
        data = tmp_path / run / "data"
        assert content(data) == WHOLE and [p.name for p in data.parent.iterdir()] == ["data"]
        assert (data / "a.txt").samefile(files_of(cache) / "a.txt")
        assert not any(path.is_symlink() for path in data.rglob("*"))
    (tmp_path / "one").rename(tmp_path / "moved")
    shutil.rmtree(tmp_path / "cache")
    assert content(tmp_path / "moved" / "data") == WHOLE


def test_another_key_is_another_artifact(cache: Artifacts, tmp_path: Path) -> None:
    cache.obtain(KEY, Maker(), tmp_path / "data")
    assert cache.obtain(OTHER, Maker("other"), tmp_path / "data")
    assert content(tmp_path / "data")["a.txt"] == "other"
    with pytest.raises(AssertionError, match="is not KIND-HASH"):
        cache.obtain("../evil-" + "0" * 16, Maker(), tmp_path / "data")


def test_files_are_read_only_and_can_be_removed_and_replaced(
    cache: Artifacts, tmp_path: Path
) -> None:
    for _ in range(2):
        cache.obtain(KEY, Maker(), tmp_path / "data")
    assert all(
        path.stat().st_mode & 0o222 == 0
        for path in (tmp_path / "data").rglob("*")
        if path.is_file()
    )
    script = (
        "import os, shutil\n"
        "from pathlib import Path\n"
        "from xushi.base.artifacts import Artifacts\n"
        "os.geteuid() or os.setuid(65534)\n"  # root may remove anything
        "make = lambda d: ((d / 'x').mkdir(), (d / 'x' / 'f').write_text('f'))\n"
        f"cache, key = Artifacts(Path('cache')), {KEY!r}\n"
        "cache.obtain(key, make, Path('data'))\n"
        "cache.obtain(key, make, Path('data'))\n"
        "shutil.rmtree('data')\n"
        "assert [entry.key for entry in cache.empty()] == [key]\n"
        "cache.obtain(key, make, Path('data'))\n"
        "shutil.rmtree('cache')\n"
        "shutil.rmtree('data')\n"
    )
    own = tmp_path / "own"
    own.mkdir()
    if os.geteuid() == 0:
        os.chown(own, 65534, 65534)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=own, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert list(own.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP])
def test_copies_where_there_are_no_links(
    number: int, cache: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    cache.obtain(KEY, Maker(), tmp_path / "data")
    assert content(tmp_path / "data") == WHOLE
    assert not (tmp_path / "data" / "a.txt").samefile(files_of(cache) / "a.txt")
    (tmp_path / "data" / "a.txt").write_text("a copy is the run's own")
    assert not cache.obtain(KEY, never, tmp_path / "data")


def test_link_tree_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for directory, text in ((source, "text"), (target, "old")):
        directory.mkdir()
        Maker(text)(directory)
    link = os.link

    def fail(one: Path, other: Path) -> None:
        if one.name == "b.txt":
            raise OSError(errno.EIO, "broken")
        link(one, other)

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(OSError, match="broken"):
        link_tree(source, target)
    assert content(target)["a.txt"] == "old"
    monkeypatch.setattr(os, "link", link)
    link_tree(source, target)
    assert content(target) == WHOLE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def cut(path: Path) -> None:
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1])


def turn(path: Path) -> None:
    path.chmod(0o644)
    path.write_text(path.read_text().swapcase())


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: cut(d / "files" / "a.txt"), "a.txt has another size"),
        (lambda d: turn(d / "files" / "inner" / "b.txt"), "inner/b.txt has other bytes"),
        (lambda d: (d / "files" / "a.txt").unlink(), "does not hold the files"),
        (lambda d: (d / "files" / "more").touch(), "does not hold the files"),
        (lambda d: (d / "manifest.json").unlink(), "cannot be read"),
        (lambda d: (d / "manifest.json").write_text("[]"), "cannot be read"),
        (lambda d: (d / "manifest.json").write_text('{"files": 3}'), "cannot be read"),
        (lambda d: (d / "in-use").unlink(), "does not hold the files"),
    ],
)
def test_a_damaged_artifact_is_told_and_made_anew(
    damage: Callable[[Path], None],
    words: str,
    cache: Artifacts,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cache.obtain(KEY, Maker(), tmp_path / "data")
    damage(files_of(cache).parent)
    make = Maker()
    assert cache.obtain(KEY, make, tmp_path / "data") and make.times == 1
    assert content(tmp_path / "data") == WHOLE and left(cache) == []
    told = capsys.readouterr().err.split("\n")
    assert len(told) == 2 and words in told[0] and KEY in told[0]
    assert not cache.obtain(KEY, never, tmp_path / "data")


def test_a_maker_that_fails_leaves_nothing(cache: Artifacts, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    Maker("old")(tmp_path / "data")

    def fail(directory: Path) -> None:
        Maker()(directory)
        raise ValueError("not UTF-8")

    with pytest.raises(ValueError, match="not UTF-8"):
        cache.obtain(KEY, fail, tmp_path / "data")
    assert content(tmp_path / "data")["a.txt"] == "old"
    assert left(cache) == [f"{KEY}.lock"] and cache.entries() == []
    assert cache.obtain(KEY, Maker(), tmp_path / "data")


def test_an_artifact_is_flushed_before_it_has_its_name(
    cache: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[Path] = []
    flush = files.fsync_path

    def record(path: Path) -> None:
        flushed.append(path)
        flush(path)

    monkeypatch.setattr(files, "fsync_path", record)
    monkeypatch.setattr(artifacts, "fsync_path", record)
    cache.obtain(KEY, Maker(), tmp_path / "data")
    aside = files.aside_of(cache._place() / KEY)
    for name in ("files/a.txt", "files/inner/b.txt", "files/inner", "manifest.json", ""):
        assert aside / name in flushed
    assert cache._place() in flushed[flushed.index(aside) :]


# --- a cache that cannot be used ---


def told_once(capsys: pytest.CaptureFixture[str]) -> str:
    (line, end) = capsys.readouterr().err.split("\n")
    assert "the cache is not used" in line and "corpus" in line and end == ""
    return line


def test_a_cache_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    assert Artifacts(tmp_path / "file").obtain(KEY, Maker(), tmp_path / "data")
    assert content(tmp_path / "data") == WHOLE
    assert str(tmp_path / "file") in told_once(capsys)
    for name in ("XUSHI_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert Artifacts().obtain(KEY, Maker(), tmp_path / "again")
    assert "no home" in told_once(capsys)


@pytest.mark.parametrize("plain", [True, False])
def test_a_full_cache(
    plain: bool, cache: Artifacts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The maker meets the full disk itself, or base.files has turned it into words."""

    def make(directory: Path) -> None:
        if directory.is_relative_to(tmp_path / "cache"):
            full = OSError(errno.ENOSPC, "No space left on device")
            if plain:
                raise full
            with disk_errors(directory):
                raise full
        Maker()(directory)

    assert cache.obtain(KEY, make, tmp_path / "run" / "data")
    assert content(tmp_path / "run" / "data") == WHOLE
    assert "No space left" in told_once(capsys)
    assert left(cache) == [f"{KEY}.lock"]
    with pytest.raises(Failed, match="no space left"):  # the run's own disk is full, too
        cache.obtain(KEY, lambda d: make(tmp_path / "cache" / "x"), tmp_path / "run" / "data")


def test_a_cache_that_fills_up_at_the_end(
    cache: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, value: object) -> None:
        with disk_errors(path):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(artifacts, "write_json", full)
    assert cache.obtain(KEY, Maker(), tmp_path / "data")
    assert content(tmp_path / "data") == WHOLE and cache.entries() == []


@pytest.mark.parametrize("listed", [True, False])
def test_a_cache_removed_while_it_is_read(
    listed: bool, cache: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.obtain(KEY, Maker(), tmp_path / "data")
    walk = os.walk

    def gone(source: Path, **options: object) -> Iterator[tuple[str, list[str], list[str]]]:
        found = list(walk(source, **options)) if listed else []
        shutil.rmtree(tmp_path / "cache")
        yield from found or walk(source, **options)

    monkeypatch.setattr(os, "walk", gone)
    make = Maker()
    assert cache.obtain(KEY, make, tmp_path / "data") and make.times == 1
    assert content(tmp_path / "data") == WHOLE


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XUSHI_CACHE", "/fast")
    assert cache_directory() == Path("/fast")
    monkeypatch.setenv("XUSHI_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_directory() == Path("/caches/xushi")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_directory() == Path.home() / ".cache" / "xushi"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_directory() == Path.home() / "Library" / "Caches" / "xushi"


# --- listing and emptying ---


def test_entries_and_emptying(cache: Artifacts, tmp_path: Path) -> None:
    assert cache.entries() == [] == cache.empty()
    cache.obtain(KEY, Maker(), tmp_path / "data")
    cache.obtain(OTHER, Maker("longer"), tmp_path / "data")
    (kernels := tmp_path / "cache" / "kernels").mkdir()
    (kernels / "kernels-fp32-avx2-0123.so").write_bytes(b"x" * 100)
    (kernels / "kernels-fp32-avx2-0123.sha256").write_text("seal")
    days_ago = time.time() - 3 * 24 * 3600
    os.utime(files_of(cache).parent / "in-use", (days_ago, days_ago))
    os.utime(kernels / "kernels-fp32-avx2-0123.so", (days_ago - 9, days_ago - 9))
    entries = cache.entries()
    assert [(e.kind, e.key) for e in entries] == [
        ("tokens", OTHER), ("corpus", KEY), ("kernels", "kernels-fp32-avx2-0123"),
    ]  # fmt: skip
    assert entries[2].bytes == 100 and 18 <= entries[0].bytes < 1000
    assert cache.empty(older_than_days=4) == []
    assert [entry.kind for entry in cache.empty(older_than_days=2)] == ["corpus", "kernels"]
    assert not cache.obtain(OTHER, never, tmp_path / "data")
    assert [entry.key for entry in cache.empty()] == [OTHER]
    assert list(cache._place().iterdir()) == [] == list(kernels.iterdir())
    assert cache.obtain(KEY, Maker(), tmp_path / "data")


def test_the_last_use_is_when_a_run_took_it(cache: Artifacts, tmp_path: Path) -> None:
    cache.obtain(KEY, Maker(), tmp_path / "data")
    os.utime(files_of(cache).parent / "in-use", (1000, 1000))
    assert cache.entries()[0].used == 1000
    cache.obtain(KEY, never, tmp_path / "data")
    assert cache.entries()[0].used > time.time() - 60


def test_emptying_leaves_what_is_in_use(cache: Artifacts, tmp_path: Path) -> None:
    cache.obtain(KEY, Maker(), tmp_path / "data")
    with locks.shared(files_of(cache).parent / "in-use") as held:
        assert held and cache.empty() == []
        assert not cache.obtain(KEY, never, tmp_path / "data")
    assert [entry.key for entry in cache.empty()] == [KEY]


def test_an_artifact_is_read_where_it_lies(cache: Artifacts, tmp_path: Path) -> None:
    make = Maker()
    for _ in range(2):
        with cache.reading(KEY, make) as files:
            assert files.is_relative_to(tmp_path / "cache")
            assert content(files) == {"a.txt": "text", "inner/b.txt": "texttext"}
            assert cache.empty() == []  # it is in use
    assert len(cache.empty()) == 1 and make.times == 1
    (tmp_path / "file").touch()
    with Artifacts(tmp_path / "file").reading(KEY, make) as files:
        assert list(files.iterdir()) and make.times == 2
    assert not files.exists()
    with pytest.raises(ZeroDivisionError), cache.reading(KEY, make):
        raise ZeroDivisionError  # the reader's error is its own


def test_emptying_removes_what_has_lost_its_files(cache: Artifacts, tmp_path: Path) -> None:
    (cache._place() / KEY).mkdir(parents=True)
    assert [entry.key for entry in cache.empty()] == [KEY]


def test_a_cache_that_cannot_be_listed_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("there is no home directory")

    monkeypatch.setattr(artifacts, "cache_directory", nowhere)
    for act in (Artifacts().entries, Artifacts().empty):
        with pytest.raises(XushiError, match="no home") as error:
            act()
        assert "XUSHI_CACHE" in error.value.remedy and error.value.exit_code == 1


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from xushi.cli import main

    def said(*words: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["xushi", "cache", *words])
        with pytest.raises(SystemExit) as leaving:
            main()
        output = capsys.readouterr()
        assert leaving.value.code == (2 if output.err else 0)
        return (output.out + output.err).splitlines()

    monkeypatch.setenv("XUSHI_CACHE", str(tmp_path / "cache"))
    Artifacts().obtain(KEY, Maker(), tmp_path / "data")
    today = time.strftime("%Y-%m-%d")
    where, entry, total = said()
    assert where == str(tmp_path / "cache")
    assert entry.split()[0] == "corpus" and entry.split()[2:] == [today, KEY]
    assert total.split() == ["total", entry.split()[1]]
    assert said("--empty", "--older-than", "1")[0] == "removed 0 entries, 0 bytes"
    assert said("--empty") == [
        f"removed 1 entries, {entry.split()[1]} bytes", str(tmp_path / "cache"), "total" + "0".rjust(23)
    ]  # fmt: skip
    assert said("--older-than", "1")[0] == "error: --older-than goes with --empty"


# --- several processes ---

PROCESS = """
import sys
from pathlib import Path
from xushi.base import locks
from xushi.base.artifacts import Artifacts
locks.SECONDS_OF_SILENCE = 0.01
def make(directory):
    (directory / "a.txt").write_text("half")
    print("making", flush=True)
    assert sys.stdin.readline() == "go on\\n"
    (directory / "a.txt").write_text("whole")
root, key, target = sys.argv[1:]
print(Artifacts(Path(root)).obtain(key, make, Path(target)), flush=True)
"""


class Process:
    """A process of its own that obtains an artifact; its maker waits for the word to go on."""

    def __init__(self, cache: Artifacts, target: Path, key: str = KEY) -> None:
        command = [sys.executable, "-c", PROCESS, str(cache._root), key, str(target)]
        self.target = target
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdin and self.process.stdout and self.process.stderr
        self.stdin, self.stdout, self.stderr = (
            self.process.stdin,
            self.process.stdout,
            self.process.stderr,
        )

    def go_on(self) -> None:
        self.stdin.write("go on\n")
        self.stdin.flush()

    def made(self) -> bool:
        """Whether its maker ran, once it has ended."""
        said, errors = self.process.communicate(timeout=30)
        assert self.process.returncode == 0, errors
        assert content(self.target) == {"a.txt": "whole"}
        return said.split()[-1] == "True"


@pytest.fixture
def start(cache: Artifacts, tmp_path: Path) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def one(key: str = KEY) -> Process:
        started.append(Process(cache, tmp_path / f"run{len(started)}", key))
        return started[-1]

    yield one
    for each in started:
        each.process.kill()
        each.process.communicate()


def test_two_processes_at_once_make_it_once(start: Callable[..., Process]) -> None:
    first = start()
    assert first.stdout.readline() == "making\n"
    second = start()
    assert "another process makes the same corpus" in second.stderr.readline()
    first.go_on()
    assert first.made() and not second.made()


def test_a_killed_maker_leaves_nothing_that_counts(
    cache: Artifacts, start: Callable[..., Process], tmp_path: Path
) -> None:
    first = start()
    assert first.stdout.readline() == "making\n"
    second = start()
    assert "another process" in second.stderr.readline()
    first.process.send_signal(signal.SIGKILL)
    assert second.stdout.readline() == "making\n"  # it makes it from an empty directory
    second.go_on()
    assert second.made()
    assert not first.target.exists() and left(cache) == []


def test_what_a_killed_maker_left_is_removed_by_the_next_of_any_key(
    cache: Artifacts, start: Callable[..., Process], tmp_path: Path
) -> None:
    first = start()
    assert first.stdout.readline() == "making\n"
    cache.obtain(OTHER, Maker(), tmp_path / "data")
    assert left(cache) == [f".{KEY}.partial", f"{KEY}.lock"]  # it lives
    first.process.kill()
    first.process.wait()
    cache.obtain("tokens-" + "0" * 64, Maker(), tmp_path / "data")
    assert left(cache) == []


def test_emptying_leaves_what_is_being_made(
    cache: Artifacts, start: Callable[..., Process]
) -> None:
    first = start()
    assert first.stdout.readline() == "making\n"
    assert cache.empty() == [] and left(cache) == [f".{KEY}.partial", f"{KEY}.lock"]
    first.go_on()
    assert first.made() and [entry.key for entry in cache.entries()] == [KEY]


def test_emptying_leaves_what_is_made_anew(
    cache: Artifacts, start: Callable[..., Process], tmp_path: Path
) -> None:
    cache.obtain(KEY, Maker(), tmp_path / "data")
    cut(files_of(cache) / "a.txt")
    first = start()
    assert first.stdout.readline() == "making\n"
    assert cache.empty() == [] and [entry.key for entry in cache.entries()] == [KEY]
    first.go_on()
    assert first.made()


def test_what_another_process_has_removed_already(
    cache: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in (KEY, OTHER):
        cache.obtain(key, Maker(), tmp_path / "data")
    entries = cache.entries()
    monkeypatch.setattr(cache, "entries", lambda: entries)
    shutil.rmtree(files_of(cache).parent)
    assert [entry.key for entry in cache.empty()] == [OTHER]
    assert left(cache) == []


def test_many_processes_and_emptying_all_end_with_whole_files(
    cache: Artifacts, start: Callable[..., Process]
) -> None:
    running = [start() for _ in range(3)]
    for each in running:
        each.go_on()
    deadline = time.monotonic() + 30
    while any(each.process.poll() is None for each in running) and time.monotonic() < deadline:
        cache.empty()
    assert any([each.made() for each in running]) and left(cache) == []


def test_what_was_made_is_not_removed_before_it_is_taken(
    cache: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, make = artifacts.link_tree, artifacts._make

    def emptied_before_link(source: Path, target: Path) -> None:
        assert cache.empty() == []
        link(source, target)

    def emptied_after_make(*arguments: object) -> None:
        make(*arguments)  # type: ignore[arg-type]
        assert cache.empty() == []

    monkeypatch.setattr(artifacts, "link_tree", emptied_before_link)
    monkeypatch.setattr(artifacts, "_make", emptied_after_make)
    assert cache.obtain(KEY, Maker(), tmp_path / "data")
    assert not cache.obtain(KEY, never, tmp_path / "data")


def test_a_cache_that_loses_what_is_written(
    cache: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flush = artifacts.flush_tree

    def lose(directory: Path) -> None:
        flush(directory)
        cut(directory / "files" / "a.txt")

    monkeypatch.setattr(artifacts, "flush_tree", lose)
    assert cache.obtain(KEY, Maker(), tmp_path / "data")
    assert content(tmp_path / "data") == WHOLE
