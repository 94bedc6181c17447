"""Ideas tried with real processes: verdicts, what runs again and what does not, refusals, kills."""

import dataclasses
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from xushi.base.errors import BadInput, Failed, XushiError
from xushi.base.locks import exclusive
from xushi.ladder import Ledger, Result, try_idea
from xushi.ladder.account import account
from xushi.ladder.ledger import FILE
from xushi.ladder.trial import ALPHA, CONFIRMING_SEEDS, combined, overall_p, planned_looks
from xushi.ladder.verdict import RunVariance, look_at_pairs

from .conftest import PYTHON

ROOT = Path(__file__).parent.parent.parent


def try_here(path: Path) -> Result:
    return try_idea(path, path.parent / "ladder", 2, path.parent)


def refused(path: Path) -> XushiError:
    with pytest.raises(XushiError) as caught:
        try_here(path)
    assert len(str(caught.value).splitlines()) == 2
    return caught.value


def metrics(place: Path, entry: int, purpose: str) -> dict[str, list[float]]:
    ledger = Ledger(place / "ladder")
    found: dict[str, list[float]] = {"baseline": [], "variant": []}
    for _, what, arm, _, job in ledger.uses(entry):
        if what == purpose and job.printed:
            found[arm].append(job.printed["loss"])
    ledger.close()
    return found


def test_a_gain_is_better_and_confirmed_on_fresh_seeds(place, write_idea, runs):
    result = try_here(write_idea())
    assert (result.verdict, result.entry, result.rungs) == ("better", 1, 1)
    assert result.low < 0.5 < result.high
    judged, confirmed = (metrics(place, 1, purpose) for purpose in ("judge", "confirm"))
    assert (len(judged["baseline"]), len(confirmed["baseline"])) == (result.pairs, 4) == (2, 4)
    gains = [b - v for b, v in zip(*judged.values(), strict=True)]
    assert result.difference == pytest.approx(sum(gains) / len(gains), rel=1e-12)
    # The p-value by its parts: of the looks, and by Fisher of the confirmation.
    looks, known = planned_looks(4), RunVariance()  # the first idea knows nothing of others
    seen = [
        look_at_pairs(judged["baseline"][:n], judged["variant"][:n], known, ALPHA).p_gain
        for n in looks
        if n <= result.pairs
    ]
    again = look_at_pairs(confirmed["baseline"], confirmed["variant"], known, ALPHA)
    assert result.p == pytest.approx(combined(overall_p(seen, looks), again.p_gain), rel=1e-12)
    assert result.promoted == (again.p_gain <= ALPHA and result.p <= result.level)
    seeds = [int(line.split()[1]) for line in runs()]
    # Two arms, and the first seed of the baseline once more.
    assert sorted(seed for seed in seeds if seed < CONFIRMING_SEEDS) == sorted(
        [*range(1, result.pairs + 1)] * 2 + [1]
    )
    assert len(seeds) == 2 * (result.pairs + 4) + 1


def test_the_same_idea_twice_runs_nothing_and_says_the_same(place, write_idea, runs):
    first = try_here(write_idea())
    before = runs()
    assert try_here(write_idea()) == first
    assert runs() == before
    ledger = Ledger(place / "ladder")
    assert len(ledger.entries()) == len(ledger.decisions()) == 1
    ledger.close()


def test_runs_that_two_ideas_share_are_paid_for_once(place, write_idea, runs):
    """The baseline's; also where the second variant names a file of its own."""
    (place / "part.py").write_text("")
    first = try_here(write_idea("first", pairs=2, smallest_effect=9))
    second = write_idea(
        "second",
        variant=f"{PYTHON} train.py --seed {{seed}} --gain 0.25 --part part.py",
        pairs=2,
        smallest_effect=9,
    )
    result = try_here(second)
    assert (first.verdict, result.verdict) == ("none", "none")
    assert len(runs()) == 5 + 2
    ledger = Ledger(place / "ladder")
    found = account(ledger)
    ledger.close()
    assert found.lines[0].own_seconds == found.lines[0].seconds
    assert 0 < found.lines[1].own_seconds < found.lines[1].seconds
    assert found.seconds == pytest.approx(sum(line.own_seconds for line in found.lines))


def test_a_changed_question_is_a_new_entry_and_runs_nothing(write_idea, runs, capsys):
    first = try_here(write_idea(smallest_effect=9))
    before = runs()
    second = try_here(write_idea(smallest_effect=8))
    assert (first.entry, second.entry) == (1, 2)
    assert second.level < first.level
    assert runs() == before
    assert "it is not the question that entry 1 asked" in capsys.readouterr().err


def test_a_changed_file_is_a_new_entry_and_runs_again(place, write_idea, runs):
    path = write_idea(smallest_effect=9, pairs=2)
    assert try_here(path).entry == 1
    (place / "train.py").write_text((place / "train.py").read_text() + "# changed\n")
    assert try_here(path).entry == 2
    assert len(runs()) == 2 * 5


def test_a_file_whose_name_has_a_rungs_key_in_it_counts(place, write_idea, runs):
    command = f"{PYTHON} train.py --seed {{seed}} --config=c-{{size}}.txt - --gain"
    commands = {"baseline": f"{command} 0", "variant": f"{command} 0.5"}
    path = write_idea(**commands, sizes=["small", "large"], smallest_effect=9, pairs=2)
    (place / "c-large.txt").write_text("1")
    assert try_here(path).entry == 1
    (place / "c-large.txt").write_text("2")
    assert try_here(path).entry == 2


def test_a_file_under_reads_counts_and_a_pattern_without_files_is_refused(place, write_idea):
    path = write_idea(reads=["lib/*.py"], smallest_effect=9, pairs=2)
    assert "matches no file" in refused(path).problem
    (place / "lib").mkdir()
    (place / "lib" / "a.py").write_text("")
    assert try_here(path).entry == 1
    (place / "lib" / "b.py").write_text("")
    assert try_here(path).entry == 2


def test_the_next_rung_is_paid_for_where_the_last_was_better(write_idea, runs):
    command = f"{PYTHON} train.py --seed {{seed}} --size {{size}}"
    keys = {"baseline": command, "sizes": [1, 2]}
    better = write_idea("better", variant=f"{command} --gain 0.5", **keys)
    result = try_here(better)
    assert (result.verdict, result.rungs) == ("better", 2)
    confirming = [line for line in runs() if str(CONFIRMING_SEEDS)[:6] in line]
    assert confirming
    assert all("--size 2" in line for line in confirming)
    before = len(runs())
    worse = write_idea("worse", variant=f"{command} --gain -0.5", **keys)
    result = try_here(worse)
    assert (result.verdict, result.rungs, result.promoted) == ("worse", 1, False)
    assert not any("--size 2" in line for line in runs()[before:])


def test_higher_is_better_turns_the_metric(write_idea):
    result = try_here(write_idea(higher_is_better=True))
    assert result.verdict == "worse"
    assert result.difference == pytest.approx(-0.5, abs=0.02)


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        ("print(json.dumps({'acc': seed, 'b': 1}))", "printed no number loss"),
        ('print(\'{"loss": "1.5"}\')', "printed no number loss"),
        ("print('{\"loss\": true}')", "printed no number loss"),
        ("print('{\"loss\": NaN}')", "loss is nan: the run diverged"),
        ("print('{\"loss\": -Infinity}')", "loss is -inf: the run diverged"),
        ("print('{\"loss\": 1' + '0' * 400 + '}')", "loss is inf: the run diverged"),
        ("print('{\"loss\": %d}' % (arm == 'variant'))", "the seed does nothing"),
        ("print('{\"loss\": %d}' % seed)", "both arms have the same loss"),
        ("print('loss 1')", "is not a JSON object"),
    ],
)
def test_runs_that_say_nothing_are_refused(write_idea, program, problem):
    path = write_idea("first", program, pairs=2)
    assert problem in refused(path).problem
    assert problem in refused(path).problem  # and no second time something else


@pytest.mark.parametrize("moving", ["baseline", "variant"])
def test_one_arm_that_is_the_same_for_four_seeds(moving, write_idea):
    """Two that agree may be rounding, and the other arm's spread is known."""
    program = f"print(json.dumps({{'loss': seed * (arm == {moving!r})}}))"
    assert try_here(write_idea("two", program, pairs=2)).verdict == "unsettled"
    error = refused(write_idea("four", program, pairs=4))
    still = "variant" if moving == "baseline" else "baseline"
    assert f"seeds 1, 2, 3, 4 in {still}: the seed does nothing" in error.problem


def test_what_another_variant_printed_is_no_run_variance(write_idea, place):
    """A number is taken of it only where it is one, and finite."""
    baseline = f"{PYTHON} train.py --seed {{seed}}"
    for name, value in (("text", "'x'"), ("huge", "10**400"), ("nan", "float('nan')")):
        (place / f"{name}.py").write_text(f"import json; print(json.dumps({{'loss': {value}}}))")
        variant = f"{PYTHON} {name}.py {{seed}}"
        refused(write_idea(name, baseline=baseline, variant=variant, pairs=2))
    assert try_here(write_idea("later", pairs=2, smallest_effect=9)).verdict == "none"
    ledger = Ledger(place / "ladder")
    assert ledger.entries()[-1].known[0].degrees == 0
    ledger.close()


def test_a_run_that_diverges_while_confirming_is_a_sentence(write_idea):
    program = (
        "noise = seed * 7919 % 1009 / 10090\n"
        "loss = 2 + noise + (0 if arm == 'baseline' else seed % 3 / 1000 - 1)\n"
        f"print(json.dumps({{'loss': float('nan') if seed > {CONFIRMING_SEEDS} else loss}}))"
    )
    error = refused(write_idea("late", program))
    assert isinstance(error, Failed)
    assert f"seed {CONFIRMING_SEEDS + 1001}: loss is nan" in error.problem or (
        f"seed {CONFIRMING_SEEDS + 1000}: loss is nan" in error.problem
    )


def test_a_seed_that_does_not_decide_everything_is_told(write_idea, capsys):
    program = "import os\nprint(json.dumps({'loss': seed / 1e3 + os.getpid() % 997 + (arm > 'c')}))"
    try_here(write_idea("noisy", program, pairs=2))
    assert "seed 1 twice gives" in capsys.readouterr().err
    try_here(write_idea("steady", pairs=2))
    assert "twice gives" not in capsys.readouterr().err


def test_a_lock_held_by_another(place, write_idea):
    (place / "ladder").mkdir()
    with exclusive(place / "ladder" / "lock") as held:
        assert held
        error = refused(write_idea())
    assert isinstance(error, BadInput)
    assert "another xushi try is using the ledger" in error.problem
    assert not (place / "runs.txt").exists()
    assert try_here(write_idea()).entry == 1


def test_a_failure_keeps_what_was_done(place, write_idea, runs):
    program = (
        "import os\n"
        "open('runs.txt', 'a').write(f'{arm} {seed}\\n')\n"
        "if (arm, seed) == ('variant', 2): os.stat('data.bin')\n"
        "print(json.dumps({'loss': seed + (arm > 'c') * seed / 9}))"
    )
    path = write_idea("fails", program, pairs=2)
    assert "variant, seed 2: it ended with exit code 1" in refused(path).problem
    (place / "data.bin").touch()
    result = try_here(path)
    assert result.entry == 1
    counts = {line: runs().count(line) for line in runs()}
    assert counts["variant 2"] == 2
    assert counts["variant 1"] == 1


def dump(directory: Path) -> dict[str, Any]:
    """All that a ledger holds, but for times and the order in which runs at once ended."""
    connection = sqlite3.connect(directory / FILE)

    def rows(statement: str) -> list[Any]:
        return connection.execute(statement).fetchall()

    found = {
        "entries": rows("SELECT number, hash, name, idea, files, level, known FROM entries"),
        "jobs": rows("SELECT hash, command, status, printed, problem FROM jobs ORDER BY hash"),
        "uses": rows("SELECT * FROM uses ORDER BY entry, rung, purpose, arm, seed"),
        "decisions": [
            {key: value for key, value in json.loads(decision).items() if key != "seconds"}
            for (decision,) in rows("SELECT decision FROM decisions")
        ],
    }
    connection.close()
    return found


@pytest.mark.slow
def test_killed_at_ten_random_moments_the_ledger_is_the_same(place, write_idea, tmp_path, runs):
    """Each kill falls in a run, or between two, after a further run was begun."""
    commands = {
        arm: f"{PYTHON} train.py --seed {{seed}} --sleep 0.15 --gain {gain}"
        for arm, gain in (("baseline", 0), ("variant", 0.02))
    }
    path = write_idea(**commands, pairs=8, smallest_effect=0.001)
    wanted = dataclasses.replace(try_idea(path, place / "alone", 2, place), seconds=0)
    (place / "runs.txt").unlink()
    code = "from xushi.cli import main; main()"
    command = [sys.executable, "-c", code, "try", str(path), "--ledger", "killed", "--workers", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    chance = random.Random(40)
    for _ in range(10):
        begun = len(runs())
        process = subprocess.Popen(
            command, cwd=place, env=environment, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while len(runs()) == begun and process.poll() is None:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.25))
        process.send_signal(signal.SIGKILL)
        process.wait()
    result = try_idea(path, place / "killed", 2, place)
    assert dataclasses.replace(result, seconds=0) == wanted
    assert dump(place / "killed") == dump(place / "alone")
    assert len(runs()) > len(dump(place / "alone")["jobs"])  # the kills did cost runs
    for line in (place / "runs.txt").read_text().splitlines():
        status = Path(f"/proc/{line.split()[-1]}/cmdline")
        assert not status.exists() or b"train.py" not in status.read_bytes()


def test_a_stop_by_the_keyboard_leaves_no_process(place, write_idea):
    commands = {
        arm: f"{PYTHON} train.py --seed {{seed}} --sleep 300 --gain {gain}"
        for arm, gain in (("baseline", 0), ("variant", 0.02))
    }
    path = write_idea(**commands)
    process = subprocess.Popen(
        [sys.executable, "-c", "from xushi.cli import main; main()", "try", str(path)],
        cwd=place, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE,
    )  # fmt: skip
    limit = time.monotonic() + 60
    begun = place / "runs.txt"
    while not begun.exists() or len(begun.read_text().splitlines()) < 2:
        assert time.monotonic() < limit
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in said
    for line in begun.read_text().splitlines():
        assert not Path(f"/proc/{line.split()[-1]}").exists()
    ledger = Ledger(place / "ladder")
    assert ledger.running() == []
    ledger.close()
