"""The ledger's file: what it keeps, and the files that it refuses."""

import math
import os
import sqlite3
from pathlib import Path

import pytest

from xushi.base.errors import BadInput, Failed
from xushi.ladder import Ledger
from xushi.ladder.account import account
from xushi.ladder.idea import Idea
from xushi.ladder.ledger import FILE, FORMAT, number_of
from xushi.ladder.stream import lord_level

IDEA = Idea(
    question="?", baseline="a {seed}", variant="b {seed}", metric="loss", smallest_effect=0.1
)


def decision(**keys: object) -> dict[str, object]:
    standing = {"verdict": "better", "promoted": True, "difference": 0.5, "low": 0.1, "high": 0.9}
    return standing | {"pairs": 4} | keys


@pytest.fixture
def ledger(tmp_path):
    opened = Ledger(tmp_path / "a" / "ladder")
    yield opened
    opened.close()


def test_what_was_written_is_there_when_it_is_opened_again(ledger):
    entry = ledger.register("h", "name", IDEA, {"f": "1"})
    ledger.start("j", ["a", "1"], 7, "then")
    ledger.use(1, 0, "judge", "baseline", 1, "j")
    ledger.end("j", 2.5, {"loss": 1.5}, None)
    ledger.decide(1, 0, decision())
    again = Ledger(ledger.directory)
    assert again.entry("h") == entry
    assert again.entry("g") is None
    assert again.entries() == [entry]
    ((rung, purpose, arm, seed, job),) = again.uses(1)
    assert (rung, purpose, arm, seed) == (0, "judge", "baseline", 1)
    assert (job.command, job.status, job.seconds) == (["a", "1"], "done", 2.5)
    assert job.printed == {"loss": 1.5}
    assert again.decisions() == [(1, 0, decision())]
    again.close()


def test_levels_follow_the_stream(ledger):
    assert ledger.register("1", "a", IDEA, {}).level == lord_level(1, [])
    assert ledger.register("2", "b", IDEA, {}).level == lord_level(2, [])
    ledger.decide(1, 0, decision())
    third = ledger.register("3", "c", IDEA, {})
    assert (third.number, third.level) == (3, lord_level(3, [1]))
    ledger.decide(2, 0, decision(promoted=False))
    assert ledger.promoted() == [1]
    assert ledger.entries()[1].level == lord_level(2, [])  # fixed when it was registered


def test_a_decision_that_stands_is_not_written_twice(ledger):
    ledger.register("1", "a", IDEA, {})
    for _ in range(2):
        ledger.decide(1, 0, decision())
    ledger.decide(1, 0, decision(pairs=6))
    ledger.decide(1, 1, decision())
    assert [each["pairs"] for *_, each in ledger.decisions()] == [4, 6, 4]


def test_a_run_that_was_stopped_is_neither_running_nor_done(ledger):
    ledger.start("j", ["a"], 7, "then")
    assert [job.hash for job in ledger.running()] == ["j"]
    ledger.forget_running("j")
    assert ledger.running() == []
    ledger.start("j", ["a"], 8, "now")
    assert ledger.running()[0].process == 8
    ledger.end("j", 1.0, None, "it failed")
    ledger.forget_running("j")
    job = ledger.job("j")
    assert job is not None
    assert (job.status, job.problem) == ("failed", "it failed")


def test_one_of_a_newer_format_is_refused_and_left_as_it_is(ledger, tmp_path):
    ledger.close()
    path = ledger.directory / FILE
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (FORMAT,)
        connection.execute(f"PRAGMA user_version={FORMAT + 1}")
        connection.execute("DROP TABLE uses")
    connection.close()
    with pytest.raises(BadInput, match=f"newer xushi .format {FORMAT + 1}, this one has {FORMAT}"):
        Ledger(ledger.directory)
    with sqlite3.connect(path) as connection:
        tables = connection.execute("SELECT name FROM sqlite_master WHERE name='uses'").fetchall()
    connection.close()
    assert tables == []


def test_a_damaged_file_is_a_sentence(tmp_path):
    (tmp_path / FILE).write_bytes(b"not a database, and longer than a header" * 50)
    with pytest.raises(Failed, match="cannot be used: file is not a database"):
        Ledger(tmp_path)


def test_a_directory_that_cannot_be_made_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "ladder"):
        with pytest.raises(BadInput, match="cannot be written"):
            Ledger(place)


def test_a_read_only_directory_is_a_sentence(tmp_path):
    """In a process that is not root, who may write anywhere."""
    (tmp_path / "there").mkdir()
    tmp_path.chmod(0o755)
    (tmp_path / "there").chmod(0o555)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.chdir(tmp_path / "there")  # a directory above may be closed to others
            if os.geteuid() == 0:
                os.setuid(65534)
            codes = []
            for name in (".", "deeper"):
                try:
                    Ledger(Path(name))
                except (Failed, BadInput):
                    codes.append(0)
            code = 0 if codes == [0, 0] else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_write_that_fails_is_a_sentence(ledger):
    ledger._connection.execute("PRAGMA query_only=1")
    with pytest.raises(Failed, match="cannot be used: attempt to write a readonly database"):
        ledger.register("1", "a", IDEA, {})
    ledger._connection.execute("PRAGMA query_only=0")
    size = ledger._connection.execute("PRAGMA page_count").fetchone()[0]
    ledger._connection.execute(f"PRAGMA max_page_count={size}")  # as on a full disk
    with pytest.raises(Failed, match="database or disk is full"):
        ledger.register("1", "a" * 100_000, IDEA, {})
    ledger._connection.execute("PRAGMA max_page_count=100000")
    assert ledger.register("1", "a", IDEA, {}).number == 1


@pytest.mark.parametrize(
    ("value", "number"),
    [(1.5, 1.5), (3, 3.0), ("1.5", None), (True, None), (None, None), ([1], None),
     (10**400, math.inf), (-(10**400), -math.inf)],
)  # fmt: skip
def test_numbers_among_what_a_run_printed(value, number):
    assert number_of({"loss": value}, "loss") == number


def test_nothing_was_printed():
    assert number_of(None, "loss") is None
    assert number_of({}, "loss") is None


def run(ledger: Ledger, entry: int, arm: str, seed: int, loss: object, job: str = "") -> None:
    job = job or f"{entry} {arm} {seed}"
    ledger.start(job, ["x"], 1, "")
    ledger.end(job, 10.0, {"loss": loss}, None)
    ledger.use(entry, 0, "judge", arm, seed, job)


def test_the_run_variance_is_pooled_over_variants_of_the_same_baseline(ledger):
    """By hand: variants 1, 3 (a squared deviation of 2) and 1, 2, 6 (of 14): 16 on 3 degrees."""
    for number, losses in enumerate(([1, 3], [1, 2, 6], [50, 90], ["x", 7]), start=1):
        idea = IDEA.model_copy(update={"variant": f"v{number} {{seed}}"})
        ledger.register(str(number), "a", idea, {})
        for seed, loss in enumerate(losses):
            run(ledger, number, "variant", seed, loss)
            run(ledger, number, "baseline", seed, 1000 * seed)
    ledger.decide(3, 0, decision(verdict="worse", promoted=False))
    (known,) = ledger.register("5", "a", IDEA, {}).known
    assert known.degrees == 3
    assert known.value == pytest.approx(16 / 3, rel=1e-12)
    for change in ({"metric": "other"}, {"baseline": "z {seed}"}, {"sizes": [1]}):
        other = IDEA.model_copy(update=change)
        assert ledger.register(str(change), "a", other, {}).known[0].degrees == 0


def test_the_account_adds_up(ledger):
    for number in (1, 2):
        ledger.register(str(number), f"idea {number}", IDEA, {})
    run(ledger, 1, "baseline", 1, 1.0, "shared")
    run(ledger, 1, "variant", 1, 1.0)
    run(ledger, 2, "baseline", 1, 1.0, "shared")
    run(ledger, 2, "variant", 1, 1.0)
    ledger.decide(1, 0, decision(verdict="none", promoted=False))
    ledger.decide(1, 0, decision())
    found = account(ledger)
    assert [(line.seconds, line.own_seconds) for line in found.lines] == [(20, 20), (20, 10)]
    assert found.seconds == 30
    assert found.lines[0].result == decision()
    assert found.lines[1].result is None
    table = found.table().splitlines()
    assert " ".join(table[1].split()) == "1 idea 1 better, promoted 0.5 0.1 to 0.9 4 20"
    assert " ".join(table[2].split()) == "2 idea 2 open 10"
    assert table[3] == "30 seconds of runs in all"
    assert [line["entry"] for line in found.as_json()["ideas"]] == [1, 2]
