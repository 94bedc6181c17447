"""Runs of commands, with real processes: failures, deadlines, what is left behind and what is not."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from xushi.base.errors import BadInput, Failed, XushiError
from xushi.ladder import jobs
from xushi.ladder.idea import ARM
from xushi.ladder.jobs import Job, Runner, make_job
from xushi.ladder.ledger import JobRecord, Ledger

PROGRAM = [sys.executable, "-S", "-E", "-c"]


@pytest.fixture
def ledger(place: Path) -> Iterator[Ledger]:
    opened = Ledger(place / "ladder")
    yield opened
    opened.close()


def job(program: str, *arguments: str, deadline: float = 60, title: str = "a run") -> Job:
    return make_job([*PROGRAM, program, *arguments], {}, deadline, title, 0)


def run(ledger: Ledger, *asked: Job, workers: int = 2) -> list[JobRecord]:
    heard: list[JobRecord] = []
    with Runner(ledger, workers, ledger.directory.parent) as runner:
        runner.run(asked, lambda _, record: heard.append(record))
    return heard


def refused(ledger: Ledger, *asked: Job) -> XushiError:
    with pytest.raises(XushiError) as caught:
        run(ledger, *asked)
    return caught.value


def is_alive(process: int) -> bool:
    """A zombie is not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, what: str) -> None:
    limit = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit, what
        time.sleep(0.01)


def test_what_is_printed_is_kept_and_its_last_line_read(ledger):
    (record,) = run(ledger, job('print(\'{"a": 1}\\nnoise\\n{"b": 2.5, "c": "x"}\\n\\n\')'))
    assert (record.status, record.printed, record.problem) == ("done", {"b": 2.5, "c": "x"}, None)
    assert record.seconds is not None
    assert record.seconds > 0
    with Runner(ledger, 1, Path()) as runner:
        place = runner.output(record.hash)
    assert (place / "stdout.txt").read_text() == '{"a": 1}\nnoise\n{"b": 2.5, "c": "x"}\n\n\n'
    assert (place / "stderr.txt").read_text() == ""


def test_a_long_output_is_read_at_its_end(ledger):
    (record,) = run(ledger, job("print('x' * 3_000_000); print('{\"b\": 1}')"))
    assert record.printed == {"b": 1}


def test_what_is_done_is_not_run_again_and_what_failed_is(ledger, place):
    count = "open('count', 'a').write('x'); print('{}')"
    run(ledger, job(count))
    assert run(ledger, job(count)) == []
    assert (place / "count").read_text() == "x"
    fails = "import os; open('tries', 'a').write('x'); os.stat('there'); print('{}')"
    refused(ledger, job(fails))
    (place / "there").touch()
    (record,) = run(ledger, job(fails))
    assert (record.status, record.problem) == ("done", None)
    assert (place / "tries").read_text() == "xx"


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        ("raise SystemExit('no such file: data.bin')", "exit code 1: no such file: data.bin"),
        ("import os; os.kill(os.getpid(), 9)", "it was ended by signal 9"),
        ("print('{\"loss\": 1}'); raise SystemExit(3)", "exit code 3"),
        ("print('loss 1.5')", "the last line that it printed is not a JSON object"),
        ("print('{\"loss\": 1}'); print('bye')", "not a JSON object"),
        ("print('[1, 2]')", "not a JSON object"),
        ("print('{\"loss\": ' * 100_000)", "not a JSON object"),
        ("pass", "not a JSON object"),
    ],
)
def test_a_run_that_fails_is_a_sentence(ledger, program, problem):
    error = refused(ledger, job(program, title="variant, seed 3"))
    assert isinstance(error, Failed)
    assert error.problem.startswith("variant, seed 3: ")
    assert problem in error.problem
    assert "stderr.txt" in error.remedy
    record = ledger.job(job(program).hash)
    assert record is not None
    assert (record.status, record.printed) == ("failed", None)


def test_a_command_that_cannot_be_started(ledger):
    error = refused(ledger, make_job(["no-such-program"], {}, 60, "a run", 0))
    assert isinstance(error, BadInput)
    assert "no-such-program cannot be started" in error.problem


def test_no_shell_reads_the_words(ledger, place):
    program = "import json, sys; print(json.dumps({'words': sys.argv[1:]}))"
    (record,) = run(ledger, job(program, "$HOME", "a b; touch c", "*"))
    assert record.printed == {"words": ["$HOME", "a b; touch c", "*"]}
    assert not (place / "c").exists()


def test_a_run_has_one_thread_no_input_and_a_group_of_its_own(ledger, monkeypatch):
    program = (
        "import json, os, sys; print(json.dumps({'threads': os.environ['OMP_NUM_THREADS'], "
        "'blas': os.environ['OPENBLAS_NUM_THREADS'], "
        "'input': sys.stdin.read(), 'group': os.getpgid(0) == os.getpid()}))"
    )
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "3")
    (record,) = run(ledger, job(program))
    assert record.printed == {"threads": "1", "blas": "3", "input": "", "group": True}


def test_all_that_decides_a_result_is_in_its_hash(monkeypatch):
    def hash(word: str = "a", files: str = "f", repeat: int = 0) -> str:
        return make_job(["x", word], {"train.py": files}, 60, "title", repeat).hash

    before = hash()
    assert before == hash()
    assert make_job(["x", "a"], {"train.py": "f"}, 5, "other", 0).hash == before
    others = [hash("b"), hash(files="g"), hash(repeat=1)]
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    others.append(hash())
    monkeypatch.delenv("OMP_NUM_THREADS")
    here = jobs._machine()
    monkeypatch.setattr(jobs, "_machine", lambda: dataclasses.replace(here, cpu="another"))
    others.append(hash())
    assert len({before, *others}) == 6


def test_the_forms_of_the_ops_decide_an_arms_result(monkeypatch):
    """Those of a recipe's arm; a command may have nothing to do with them."""
    here = jobs._machine()

    def hashes() -> list[str]:
        return [make_job([word, "a"], {}, 60, "title", 0).hash for word in (ARM, "python")]

    before = hashes()
    for other in (
        dataclasses.replace(here, features=here.features ^ {"amx_bf16"}),
        dataclasses.replace(here, compilers=() if here.compilers else ("c++",)),
    ):
        monkeypatch.setattr(jobs, "_machine", lambda other=other: other)
        assert hashes()[0] != before[0] and hashes()[1] == before[1]
    monkeypatch.setattr(jobs, "_machine", lambda: here)
    monkeypatch.setenv("XUSHI_OPS", "reference")
    assert hashes()[0] != before[0] and hashes()[1] == before[1]


CHILD = """
import os, signal, sys, time
if os.fork() == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
open("processes", "a").write(f"{os.getpid()}\\n")
time.sleep(300)
"""


def processes(place: Path) -> list[int]:
    path = place / "processes"
    return [int(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def late(place, monkeypatch):
    """A million seconds pass once two processes are there."""
    monkeypatch.setattr(jobs, "SECONDS_TO_STOP", 0.1)
    clock = SimpleNamespace(
        sleep=time.sleep, monotonic=lambda: time.monotonic() + 1e6 * (len(processes(place)) == 2)
    )
    monkeypatch.setattr(jobs, "time", clock)


def test_a_deadline_ends_a_run_and_what_it_started(ledger, place, late):
    error = refused(ledger, job(CHILD, deadline=9e5))
    assert "it was stopped after its deadline of 900000 s" in error.problem
    assert len(processes(place)) == 2
    for process in processes(place):
        wait_until(lambda process=process: not is_alive(process), "a process lives on")


def test_a_deadline_ends_a_run_that_does_not_want_to_stop(ledger, place, late):
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)" + CHILD
    refused(ledger, job(stubborn, deadline=9e5))
    for process in processes(place):
        wait_until(lambda process=process: not is_alive(process), "a process lives on")


def test_what_a_run_leaves_behind_is_ended(ledger, place):
    leaves = "import os, time\nif os.fork() == 0:\n    time.sleep(300)\nprint('{}')"
    leaves = leaves.replace(
        "    time", "    open('processes', 'w').write(str(os.getpid()))\n    time"
    )
    leaves += "\nwhile not os.path.exists('processes'): time.sleep(.01)"
    run(ledger, job(leaves))
    (process,) = processes(place)
    wait_until(lambda: not is_alive(process), "a process lives on")


def test_a_failure_stops_its_neighbours_which_are_run_later(ledger, place):
    fails = "import os, time\nwhile not os.path.exists('processes'): time.sleep(.01)\nraise SystemExit(1)"
    neighbour = job(CHILD)
    refused(ledger, job(fails), neighbour)
    for process in processes(place):
        wait_until(lambda process=process: not is_alive(process), "a process lives on")
    record = ledger.job(neighbour.hash)
    assert record is not None
    assert record.status == "stopped"
    assert ledger.running() == []


def test_no_more_runs_at_once_than_workers(ledger, place):
    program = (
        "import json, os, sys, time; name = 'at-' + sys.argv[1]; open(name, 'w').close(); "
        "time.sleep(.05); at = len([n for n in os.listdir('.') if n.startswith('at-')]); "
        "os.unlink(name); print(json.dumps({'at': at}))"
    )
    records = run(ledger, *(job(program, str(number)) for number in range(6)), workers=2)
    assert len(records) == 6
    assert max(record.printed["at"] for record in records if record.printed) <= 2
    alone = run(ledger, *(job(program, str(number)) for number in range(6, 9)), workers=1)
    assert [record.printed for record in alone] == [{"at": 1}] * 3


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([*PROGRAM, "import time; time.sleep(300)"], start_new_session=True)
    yield process
    process.kill()
    process.wait()


def test_an_orphan_is_ended_and_its_run_done_again(ledger, place, stranger):
    asked = job("print('{\"a\": 1}')")
    mark = f"{jobs._started(stranger.pid)}, {ledger.directory.resolve()}"
    ledger.start(asked.hash, asked.command, stranger.pid, mark)
    (record,) = run(ledger, asked)
    assert stranger.wait(20) == -signal.SIGKILL
    assert (record.status, record.printed) == ("done", {"a": 1})


@pytest.mark.parametrize("differs", ["start", "ledger"])
def test_another_process_with_an_orphans_number_is_left_alone(differs, ledger, stranger):
    """So is a run that belongs to the ledger of which this one is a copy."""
    started, directory = jobs._started(stranger.pid), ledger.directory.resolve()
    mark = f"12345, {directory}" if differs == "start" else f"{started}, {directory}-original"
    asked = job("print('{}')")
    ledger.start(asked.hash, asked.command, stranger.pid, mark)
    run(ledger, asked)
    assert stranger.poll() is None
    assert ledger.running() == []


def test_a_lost_process_writes_into_no_later_output(ledger, place):
    """A run between whose start and its note the program was killed is known to nobody: the next
    run has a file of its own.
    """
    asked = job("print('{\"a\": 1}')")
    with Runner(ledger, 1, place) as runner:
        output = runner.output(asked.hash)
        output.mkdir(parents=True)
        with open(output / "stdout.txt", "w", buffering=1) as lost:
            lost.write("before")
            runner.run([asked], lambda *_: None)
            lost.write("after")
    assert (output / "stdout.txt").read_text() == '{"a": 1}\n'


def test_a_file_that_changes_meanwhile_voids_the_run(ledger, place):
    (place / "data").write_text("old")
    files = {"data": jobs.sha256_file(place / "data")}
    command = [*PROGRAM, "open('data', 'w').write('new'); print('{}')"]
    error = refused(ledger, make_job(command, files, 60, "a run", 0))
    assert "data changed while the idea was tried" in error.problem
    os.unlink(place / "data")
    assert (
        "data changed"
        in refused(ledger, make_job([*command[:-1], "print('{}')"], files, 60, "", 0)).problem
    )


def test_the_start_of_a_process_tells_it_from_others(stranger):
    started = jobs._started(stranger.pid)
    assert re.fullmatch(r"\d+", started)
    assert started != jobs._started(1)
    assert jobs._started(2**22 + 1) == ""
