"""Somebody's own folder: it is trained on, changes, is renamed, holds the run itself, and goes on.

Each command is a process of its own, as a user starts it; a kill is SIGKILL.
"""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ..miniature import MINIATURE, XUSHI, read_results, xushi_here

SETTINGS = ("--recipe", str(MINIATURE), "--set", "evaluate.xz_primed=false")
STEPS = ("--set", "pretrain.steps=12", "--set", "pretrain.checkpoint_every=3")


@dataclass
class User:
    """Somebody with a folder of notes, in a directory of their own."""

    home: Path
    environment: dict[str, str]

    @property
    def notes(self) -> Path:
        return self.home / "notes"

    @property
    def run(self) -> Path:
        return self.home / "runs" / "text"

    def start(self, *words: str, folder: Path | None = None) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*XUSHI, *words],
            cwd=folder or self.home,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def train(self, *words: str, folder: Path | None = None, code: int = 0) -> str:
        """What `xushi train` prints."""
        process = self.start("train", *words, *SETTINGS, *STEPS, folder=folder)
        said, _ = process.communicate(timeout=200)
        assert process.returncode == code and "Traceback" not in said, said
        return said

    def killed_in(self, stage: str, *words: str) -> None:
        """Start to train and kill it when a checkpoint of `stage` lies on the disk."""
        process = self.start("train", *words, *SETTINGS, *STEPS)
        until = time.monotonic() + 120
        while not list(self.run.glob(f"checkpoints/{stage}/step-*")):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (self.run / "results.json").exists()

    def text_read(self) -> str:
        """The hash of the text that the finished run was made from."""
        return str(read_results(self.run)["data.sha256"])


@pytest.fixture
def user(tmp_path: Path) -> User:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    user = User(tmp_path / "home", environment)
    draw = random.Random(0)
    for number in range(30):
        words = ("".join(draw.choices("abcdefghij", k=5)) for _ in range(300))
        path = user.notes / f"{number:02}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"note {number}\n" + " ".join(words), encoding="utf-8")
    return user


@pytest.mark.slow
def test_a_note_gains_a_line_while_the_run_is_interrupted(user: User) -> None:
    user.killed_in("pretrain", "notes")
    with open(user.notes / "00.md", "a") as note:
        note.write("\none more line")
    (user.notes / "new.md").write_text("words " * 2000)  # enough for a larger vocabulary
    said = user.train("notes")
    assert "1 changed (00.md), 1 new (new.md)" in said
    assert "goes on with what it has read" in said and "pretrain: started" in said
    first = user.text_read()
    # The run is finished: the same command reads what changed, and everything is made again.
    said = user.train("notes")
    assert "1 changed (00.md), 1 new (new.md)" in said and "goes on" not in said
    assert "done before" not in said
    assert user.text_read() != first
    alone = read_results(user.run)
    assert user.train("notes").count("done before") == 5  # and then there is nothing to do
    said = user.train("notes", "--out", "elsewhere")
    again = read_results(user.home / "elsewhere")
    for key in ("data.sha256", "tokenizer.sha256", "pretrain.loss", "evaluate.bits_per_byte"):
        assert again[key] == alone[key], key


@pytest.mark.slow
def test_update_reads_again_what_an_interrupted_run_has_read(user: User) -> None:
    user.killed_in("pretrain", "notes")
    (user.notes / "new.md").write_text("words " * 200)
    said = user.train("notes", "--update")
    assert "pretrain: started" in said and "tokenizer: started" in said
    assert read_results(user.run)["data.files"] == 31
    steps = sorted(path.name for path in (user.run / "checkpoints" / "pretrain").glob("step-*"))
    assert steps[-1] == "step-000000012"
    # Fewer steps leave nothing of the old ones.
    process = user.start("train", "notes", *SETTINGS, "--set", "pretrain.steps=2", "--update")
    said = process.communicate(timeout=200)[0]
    assert process.returncode == 0, said
    steps = sorted(path.name for path in (user.run / "checkpoints" / "pretrain").glob("step-*"))
    assert steps == ["step-000000002"] and read_results(user.run)["pretrain.steps"] == 2


@pytest.mark.slow
def test_a_renamed_folder_goes_on_under_either_name(user: User) -> None:
    user.killed_in("pretrain", "notes")
    user.notes.rename(user.home / "texts")
    said = user.train("notes")
    assert "no file matches" in said and "what was read before is used" in said
    text = user.text_read()
    said = user.train("texts")  # the same text under another name
    assert said.count("done before") == 5 and user.text_read() == text
    assert "texts" in (user.run / "recipe.toml").read_text()
    # Another text is another run.
    (user.home / "texts" / "new.md").write_text("new")
    (user.home / "texts").rename(user.home / "other")
    assert "made by another recipe or text" in user.train("other", code=2)
    assert user.text_read() == text


@pytest.mark.slow
def test_a_run_does_not_read_itself(user: User) -> None:
    told = "left out: 1 run directory of xushi (runs/text)"
    assert told in user.train(".", folder=user.notes)  # it lies there while it runs
    run = user.notes / "runs" / "text"
    text = read_results(run)["data.sha256"]
    assert user.train(".", folder=user.notes).count("done before") == 5
    (run / "stages" / "data.json").unlink()  # read again, with the whole run in the folder
    assert told in user.train(".", "--update", folder=user.notes)
    results = read_results(run)
    assert results["data.sha256"] == text and results["data.left_out.runs"] == 1


@pytest.fixture
def mixed(user: User) -> Iterator[User]:
    """Notes beside everything else that lies in a folder."""
    files: dict[bytes, bytes] = {
        b"papers/%d.pdf" % number: b"%PDF-1.4\n\0" + bytes(50) for number in range(5)
    } | {
        b"gbk.txt": "汉字".encode("gbk") * 99,
        b"latin.txt": b"caf\xe9 " * 99,
        b"\xd6\xd0\xce\xc4.md": b"its name is GBK " * 20,
        "诗词/一.txt".encode(): "床前明月光，疑是地上霜。\n".encode() * 20,
        b"line\nbreak.md": b"a line break in its name " * 20,
        b"table.csv": b"a,b\n1,2\n",
        b"page.html": b"<p>text</p>",
        b"old.txt.gz": b"\x1f\x8b",
        b"empty.md": b"",
        b"picture": b"\x89PNG\0",
        b".secret/key.md": b"hidden",
    }
    for name, data in files.items():
        path = os.path.join(os.fsencode(user.notes), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)
    for name in ("l1", "l2"):
        (user.notes / name).symlink_to(user.notes)
    (user.notes / "gone.md").symlink_to("nowhere")
    yield user


LEFT_OUT = {
    "hidden": 1,
    "special": 1,
    "tables": 2,
    "packed": 1,
    "formatted": 5,
    "binary": 1,
    "not_utf8": 2,
    "empty": 1,
}


@pytest.mark.slow
def test_a_mixed_folder_is_trained_on_in_any_locale(mixed: User) -> None:
    mixed.environment |= {"LC_ALL": "C"}
    said = mixed.train("notes")
    assert "left out: 5 PDF and office documents (such as papers/0.pdf and papers/1.pdf)" in said
    assert "left out: 2 files that are not UTF-8 (gbk.txt and latin.txt)" in said
    results = read_results(mixed.run)
    told = {key: value for key, value in results.items() if key.startswith("data.left_out.")}
    assert {key.split(".")[2]: value for key, value in told.items() if value} == LEFT_OUT
    assert results["data.files"] == 30 + 4  # the empty one is read, and no document
    report = (mixed.run / "report.html").read_text(encoding="utf-8")
    assert "5 PDF and office documents" in report
    again = mixed.train("notes/**/*.md", r"notes/*.txt", "--out", "patterns")
    assert "broken link" in again
    assert read_results(mixed.home / "patterns")["data.files"] == 30 + 3  # an empty one, too


# Plans


def plan(user: User, *words: str | Path) -> str:
    done = xushi_here("train", *words, *SETTINGS, *STEPS, "--dry-run", "--out", user.run)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_plan_begins_with_one_sentence(mixed: User) -> None:
    first = plan(mixed, mixed.notes).splitlines()[0]
    assert first.startswith("It takes about ") and " of memory" in first
    assert "leaves out 1 hidden file or directory" in first
    assert "5 PDF and office documents" in first and first.endswith(".")
    assert not mixed.run.exists()


def test_a_plan_for_programs(mixed: User) -> None:
    told: dict[str, Any] = json.loads(plan(mixed, mixed.notes, "--json"))
    stages = ("data", "tokenizer", "pretrain", "evaluate", "export")
    assert all(told[f"seconds.{stage}"] > 0 for stage in stages)
    assert told["seconds.total"] == pytest.approx(sum(told[f"seconds.{s}"] for s in stages))
    assert told["memory.whole_bytes"] > told["memory.training_bytes"]
    assert {k: told[f"data.left_out.{k}"] for k in LEFT_OUT} == LEFT_OUT
