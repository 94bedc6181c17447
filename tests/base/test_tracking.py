"""The tracking store: what is read is what was last written, decisions are taken once, damage is
told.
"""

import contextlib
import json
import math
import sqlite3
import threading

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from xushi.base import tracking as module
from xushi.base.errors import XushiError
from xushi.base.tracking import Tracking


@pytest.fixture
def tracking(tmp_path):
    store = Tracking(tmp_path / "run" / "tracking.sqlite")
    yield store
    store.close()


def test_metrics_come_back_in_step_order_and_the_last_writing_counts(tracking):
    for step, value in ((2, 1.0), (0, 3.0), (1, 2.0), (2, 0.5)):
        tracking.metrics("train", step, {"loss": value, "rate": 1.0})
    tracking.metrics("sft", 0, {"loss": 9.0})
    assert tracking.series("train", "loss") == [(0, 3.0), (1, 2.0), (2, 0.5)]
    assert tracking.names("train") == ["loss", "rate"] and tracking.series("train", "other") == []


def test_values_that_are_not_finite_survive(tracking):
    tracking.metrics("train", 0, {"nan": math.nan, "inf": math.inf})
    assert math.isnan(tracking.series("train", "nan")[0][1]) and tracking.series(
        "train", "inf"
    ) == [(0, math.inf)]


def test_decisions_are_taken_once(tracking):
    assert tracking.decide("train", "threads", 2) == 2
    assert tracking.decide("train", "threads", 4) == 2
    assert tracking.decide("sft", "threads", [1, "a"]) == [1, "a"]


def test_events_keep_their_order_and_details(tracking):
    tracking.event("data", "begun", text="虚实", count=3)
    tracking.event("train", "begun")
    tracking.event("data", "done", seconds=1.5)
    assert [(e["stage"], e["name"]) for e in tracking.events()] == [
        ("data", "begun"),
        ("train", "begun"),
        ("data", "done"),
    ]
    assert tracking.events("data", "begun")[0]["details"] == {"text": "虚实", "count": 3}
    assert [e["stage"] for e in tracking.events(name="begun")] == ["data", "train"]


def test_everything_survives_the_process_that_wrote_it(tmp_path):
    path = tmp_path / "tracking.sqlite"
    first = Tracking(path)
    first.metrics("train", 0, {"loss": 1.0})
    first.decide("train", "threads", 2)
    second = Tracking(path)  # while the first is open, as a report beside a run
    assert (
        second.series("train", "loss") == [(0, 1.0)] and second.decide("train", "threads", 8) == 2
    )
    first.close()
    second.close()


def test_threads_may_write_together(tracking):
    def write(stage: str) -> None:
        for step in range(50):
            tracking.metrics(stage, step, {"loss": step})

    threads = [threading.Thread(target=write, args=(str(number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(tracking.series(str(number), "loss")) == 50 for number in range(4))


def test_a_damaged_store_is_told(tmp_path):
    path = tmp_path / "tracking.sqlite"
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(XushiError, match="cannot be used") as error:
        Tracking(path)
    assert error.value.exit_code == 1


def test_a_locked_store_is_told(tracking):
    other = sqlite3.connect(tracking.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    tracking._connection.execute("PRAGMA busy_timeout=50")
    with pytest.raises(XushiError, match="cannot be written"):
        tracking.event("train", "begun")
    other.execute("ROLLBACK")
    other.close()
    tracking.event("train", "begun")
    assert len(tracking.events()) == 1


def test_metrics_stand_in_lines_too(tmp_path) -> None:
    store = Tracking(tmp_path / "tracking.sqlite")
    assert not (tmp_path / "metrics.jsonl").exists()  # one who only reads writes nothing
    store.metrics("pretrain", 1, {"loss": 2.5, "bad": float("nan")})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"stage": "pretr')  # a kill
    Tracking(tmp_path / "tracking.sqlite").metrics("pretrain", 2, {"loss": 2.0})
    first, torn, second = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert (
        json.loads(first)["loss"] == 2.5
        and json.loads(first)["bad"] is None
        and torn == '{"stage": "pretr'
    )
    assert {key: value for key, value in json.loads(second).items() if key != "time"} == {
        "stage": "pretrain",
        "attempt": 0,
        "step": 2,
        "loss": 2.0,
    }


def test_without_a_place_nothing_is_kept() -> None:
    store = Tracking(None)
    store.metrics("pretrain", 1, {"loss": 2.5})
    store.event("pretrain", "started")
    assert store.decide("run", "threads", 3) == 3 and store.decide("run", "threads", 4) == 4
    assert not store.series("pretrain", "loss") and not store.events()


def test_a_new_attempt_hides_what_earlier_ones_wrote(tracking):
    """A recipe of 4 steps follows one of 10: nothing of the longer one may be read as the new
    one's.
    """
    for step in range(1, 11):
        tracking.metrics("pretrain", step, {"loss": 10.0, "old": 1.0})
        tracking.batch("pretrain", step, step - 1, 1, f"old {step}", "")
    tracking.decide("pretrain", "steps", 10)
    tracking.metrics("sft", 1, {"loss": 5.0})
    tracking.begin("pretrain", "key of the second recipe")
    assert tracking.series("pretrain", "loss") == [] and tracking.names("pretrain") == []
    assert tracking.decided("pretrain", "steps") is None and not tracking.batches("pretrain", 10)
    for step in range(1, 5):
        tracking.metrics("pretrain", step, {"loss": 1.0})
        tracking.batch("pretrain", step, step - 1, 1, f"new {step}", "")
    assert tracking.series("pretrain", "loss") == [(step, 1.0) for step in range(1, 5)]
    assert [record.hash for record in tracking.batches("pretrain", 4)][-1] == "new 4"
    assert not tracking.batches("pretrain", 10)
    assert tracking.decide("pretrain", "steps", 4) == 4
    assert tracking.series("sft", "loss") == [(1, 5.0)]  # other stages keep theirs


def test_another_process_sees_the_new_attempt(tracking):
    reader = Tracking(tracking.path)
    tracking.metrics("pretrain", 1, {"loss": 10.0})
    assert reader.series("pretrain", "loss") == [(1, 10.0)]
    tracking.begin("pretrain", "another key")
    assert reader.series("pretrain", "loss") == []
    reader.close()


@pytest.mark.parametrize("clock", [[100.0] * 20, [float(100 - n) for n in range(20)]])
def test_attempts_within_one_second_and_a_clock_set_back_keep_their_order(
    tracking, monkeypatch, clock
):
    """What comes later is later by its number, whatever the clock says."""
    times = iter(clock)
    monkeypatch.setattr(module.time, "time", lambda: next(times))
    for attempt in range(3):
        tracking.begin("pretrain", "the same key")
        tracking.event("pretrain", "started", attempt=attempt)
        assert tracking.series("pretrain", "loss") == []
        tracking.metrics("pretrain", 1, {"loss": float(attempt)})
    assert tracking.series("pretrain", "loss") == [(1, 2.0)]
    assert [event["details"]["attempt"] for event in tracking.events()] == [0, 1, 2]


def test_a_decision_of_zero_is_a_decision(tracking):
    assert tracking.decide("control", "steps", 0) == 0
    assert tracking.decide("control", "steps", 7) == 0


def test_a_store_damaged_inside_is_told(tmp_path):
    path = tmp_path / "tracking.sqlite"
    store = Tracking(path)
    for step in range(3000):
        store.metrics("pretrain", step, {"loss": 1.0})
    store._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    store.close()
    content = bytearray(path.read_bytes())
    content[8192:-4096] = b"\xff" * (len(content) - 12288)
    path.write_bytes(content)
    with pytest.raises(XushiError, match="cannot be used"):
        damaged = Tracking(path)
        damaged.series("pretrain", "loss")


@pytest.fixture(scope="module")
def whole_store(tmp_path_factory):
    """The bytes of a store with some of everything in it."""
    path = tmp_path_factory.mktemp("whole") / "tracking.sqlite"
    store = Tracking(path)
    store.begin("pretrain", "key")
    store.decide("run", "threads", 3)
    for step in range(1, 100):
        store.metrics("pretrain", step, {"loss": 1.0, "seconds": 0.1})
        store.batch("pretrain", step, step, 1, "ab" * 16, "")
        store.event("pretrain", "spike", step=step, text="a jump")
    store._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    store.close()
    return path.read_bytes()


@given(flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), min_size=1))
@example(flips=[(number / 40, 0) for number in range(40)])
def test_flipped_bits_anywhere_are_two_lines_at_most(whole_store, tmp_path_factory, flips):
    """A flip in free space changes nothing; any other that is noticed is told, whoever notices."""
    path = tmp_path_factory.mktemp("flipped") / "tracking.sqlite"
    content = bytearray(whole_store)
    for place, bit in flips:
        content[int(place * len(content))] ^= 1 << bit
    path.write_bytes(content)
    try:
        with contextlib.closing(Tracking(path)) as store:
            store.series("pretrain", "loss"), store.batches("pretrain", 90)
            store.events(), store.names("pretrain"), store.decided("run", "threads")
            list(store.steps_after(0))
            store.metrics("pretrain", 100, {"loss": 1.0})
            store.decide("run", "layout", 1)
            store.begin("pretrain", "another key")
    except XushiError as error:
        assert len(str(error).splitlines()) == 2 and str(path) in error.problem


@pytest.mark.parametrize(
    ("damage", "read"),
    [
        ("UPDATE decisions SET value='{'", lambda store: store.decided("run", "threads")),
        ("UPDATE events SET details='[1'", lambda store: store.events()),
        ("UPDATE events SET time='noon'", lambda store: store.events()),
        ("UPDATE metrics SET value='much'", lambda store: store.series("pretrain", "loss")),
        ("UPDATE metrics SET value='much'", lambda store: list(store.steps_after(0))),
        ("UPDATE metrics SET step='x'", lambda store: store.series("pretrain", "loss")),
        ("UPDATE batches SET cursor='x'", lambda store: store.batches("pretrain", 90)),
    ],
)
def test_a_row_that_cannot_be_is_told(whole_store, tmp_path, damage, read):
    """SQLite takes any value in any column, and has no checksum that would tell a flipped bit."""
    path = tmp_path / "tracking.sqlite"
    path.write_bytes(whole_store)
    with contextlib.closing(Tracking(path)) as store:
        read(store)
        store._connection.execute(damage)
        with pytest.raises(XushiError, match="cannot be used") as error:
            read(store)
    assert len(str(error.value).splitlines()) == 2


def test_a_message_of_several_lines_is_told_in_one(whole_store, tmp_path):
    """SQLite quotes the statement that it cannot read, which has lines."""
    path = tmp_path / "tracking.sqlite"
    path.write_bytes(whole_store.replace(b"CREATE TABLE batches (", b"CREATE TABLE batches `"))
    with pytest.raises(XushiError, match="malformed database schema") as error:
        Tracking(path)
    assert len(str(error.value).splitlines()) == 2


def test_the_records_of_a_step_lead_over_what_counted(tmp_path) -> None:
    """Steps 1 to 4; back to 2 with other data; killed in 5 and begun again from 4."""
    store = Tracking(tmp_path / "tracking.sqlite")
    for step, cursor in [(1, 0), (2, 1), (3, 2), (4, 3), (3, 4), (4, 5), (5, 6), (5, 6), (6, 7)]:
        store.batch("pretrain", step, cursor, 1, f"hash {cursor}", "")
    assert [record.cursor for record in store.batches("pretrain", 6)] == [0, 1, 4, 5, 6, 7]
    assert [record.cursor for record in store.batches("pretrain", 3)] == [0, 1, 4]
    assert not store.batches("pretrain", 7) and not store.batches("sft", 1)
