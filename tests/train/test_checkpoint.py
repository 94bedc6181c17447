"""Checkpoints: whole or passed over, two kept, and nothing in them but safetensors and JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from xushi.base.errors import Failed, XushiError
from xushi.train import checkpoint as module
from xushi.train.checkpoint import (
    FORMAT,
    MANIFEST,
    Checkpoint,
    CheckpointWriter,
    SavedCheckpoint,
    latest_checkpoint,
    save_checkpoint,
)

FILES = {MANIFEST, "model.safetensors", "optimizer.safetensors"}


def moment(step: int) -> Checkpoint:
    g = torch.Generator().manual_seed(step)
    model = {
        "a.weight": torch.randn(3, 4, generator=g),
        "b": torch.randn(2, generator=g).bfloat16(),
        "counts": torch.arange(step),
    }
    return Checkpoint(
        step,
        {"model": model, "optimizer": {"mean.a.weight": torch.randn(3, 4, generator=g)}},
        {"optimizer_steps": step, "nested": {"text": "虚实", "rate": 0.1}},
    )


def same(first: SavedCheckpoint | None, second: Checkpoint) -> bool:
    assert first is not None
    found = first.tensors
    return (
        first.step == second.step
        and first.state == second.state
        and found.keys() == second.tensors.keys()
        and all(
            found[group].keys() == tensors.keys()
            and all(
                torch.equal(found[group][name], tensor) and found[group][name].dtype == tensor.dtype
                for name, tensor in tensors.items()
            )
            for group, tensors in second.tensors.items()
        )
    )


def steps(directory: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in directory.iterdir())


def test_none_at_all(tmp_path) -> None:
    assert latest_checkpoint(tmp_path) is None and latest_checkpoint(tmp_path / "nowhere") is None


@settings(max_examples=15)
@given(step=st.integers(0, 10**9 - 1))
def test_round_trip(step: int, tmp_path_factory) -> None:
    directory = tmp_path_factory.mktemp("checkpoints")
    saved = moment(min(step, 50))
    saved = Checkpoint(step, saved.tensors, saved.state)
    save_checkpoint(directory, saved)
    assert same(latest_checkpoint(directory), saved)


def test_views_and_transposed_tensors_are_saved_as_they_are(tmp_path) -> None:
    whole = torch.arange(12.0).view(3, 4).requires_grad_()
    saved = Checkpoint(1, {"model": {"t": whole.T, "row": whole[1]}}, {})
    save_checkpoint(tmp_path, saved)
    assert same(latest_checkpoint(tmp_path), saved)


def test_two_are_kept_and_the_newest_is_read(tmp_path) -> None:
    for step in (5, 10, 15, 100, 1000):
        save_checkpoint(tmp_path, moment(step))
    assert steps(tmp_path) == [100, 1000] and same(latest_checkpoint(tmp_path), moment(1000))


def test_a_step_saved_again_replaces_the_first(tmp_path) -> None:
    save_checkpoint(tmp_path, moment(3))
    other = Checkpoint(3, moment(4).tensors, {})
    save_checkpoint(tmp_path, other)
    assert same(latest_checkpoint(tmp_path), other) and steps(tmp_path) == [3]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(raw)


# One bit in a tensor, a lost byte, a lost file, and every way of losing the manifest.
DAMAGE = {
    "a bit of the weights": lambda d: flip(d / "model.safetensors"),
    "a bit of the optimizer": lambda d: flip(d / "optimizer.safetensors"),
    "the last byte": lambda d: cut(d / "model.safetensors"),
    "a file": lambda d: (d / "optimizer.safetensors").unlink(),
    "the manifest": lambda d: (d / MANIFEST).unlink(),
    "an empty manifest": lambda d: (d / MANIFEST).write_bytes(b""),
    "half the manifest": lambda d: (d / MANIFEST).write_bytes((d / MANIFEST).read_bytes()[:40]),
    "a manifest of bytes": lambda d: (d / MANIFEST).write_bytes(b"\xff\xfe\x00"),
    "a manifest that is a list": lambda d: (d / MANIFEST).write_text("[]"),
    "a manifest without hashes": lambda d: (d / MANIFEST).write_text(
        json.dumps({"format": FORMAT})
    ),
    "a place in the manifest": lambda d: (d / MANIFEST).write_text(
        (d / MANIFEST)
        .read_text()
        .replace('"start": [\n            0', '"start": [\n            1', 1)
    ),
    "a number of the state": lambda d: (d / MANIFEST).write_text(
        (d / MANIFEST).read_text().replace('"rate": 0.1', '"rate": 0.2')
    ),
    "a manifest without a state": lambda d: (d / MANIFEST).write_text(
        json.dumps({"format": FORMAT, "files": {}, "step": 20})
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_newest_is_passed_over(kind: str, tmp_path, capsys) -> None:
    save_checkpoint(tmp_path, moment(10))
    save_checkpoint(tmp_path, moment(20))
    before = {file.name: file.read_bytes() for file in (tmp_path / "step-000000020").iterdir()}
    DAMAGE[kind](tmp_path / "step-000000020")
    assert before != {
        file.name: file.read_bytes() for file in (tmp_path / "step-000000020").iterdir()
    }
    assert same(latest_checkpoint(tmp_path), moment(10))
    said = capsys.readouterr()
    assert "step-000000020 is damaged" in said.out + said.err


@pytest.mark.parametrize("kind", DAMAGE)
def test_if_all_are_damaged_the_stage_must_start_over(kind: str, tmp_path) -> None:
    for step in (10, 20):
        save_checkpoint(tmp_path, moment(step))
    for path in tmp_path.iterdir():
        DAMAGE[kind](path)
    with pytest.raises(XushiError) as error:
        latest_checkpoint(tmp_path)
    assert str(tmp_path) in error.value.problem and str(tmp_path) in error.value.remedy
    assert error.value.exit_code == 1


def test_damaged_ones_do_not_crowd_out_what_is_saved_after_them(tmp_path) -> None:
    """Two damaged checkpoints stand above a whole one. Going on from that one, each new checkpoint
    must stay.
    """
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, moment(step), keep=3)
    for step in (20, 30):
        flip(tmp_path / f"step-{step:09d}" / "model.safetensors")
    assert same(latest_checkpoint(tmp_path), moment(10))
    for step in (12, 14, 16):
        save_checkpoint(tmp_path, moment(step))
        assert same(latest_checkpoint(tmp_path), moment(step))
    save_checkpoint(tmp_path, moment(20))
    assert same(latest_checkpoint(tmp_path), moment(20))
    save_checkpoint(tmp_path, moment(30))
    assert steps(tmp_path) == [20, 30]


@pytest.mark.parametrize(
    "manifest",
    [
        {"format": FORMAT + 1, "files": {}, "step": 1, "state": {}},
        {"format": FORMAT + 1, "hashes": "elsewhere"},
    ],
)
def test_a_newer_format_is_not_taken_for_damage(manifest: dict, tmp_path) -> None:
    """Going on from an older checkpoint would throw away what the newer version trained."""
    save_checkpoint(tmp_path, moment(10))
    save_checkpoint(tmp_path, moment(20))
    (tmp_path / "step-000000020" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(XushiError, match=f"format {FORMAT + 1}") as error:
        latest_checkpoint(tmp_path)
    assert error.value.exit_code == 2 and error.value.remedy


def test_no_file_is_anything_but_safetensors_or_json(tmp_path) -> None:
    save_checkpoint(tmp_path, moment(7))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in files} == FILES
    for path in files:
        raw = path.read_bytes()
        assert not raw.startswith((b"\x80", b"PK")), (
            "a pickle, or the archive that torch.save makes of pickles"
        )
        if path.suffix == ".json":
            json.loads(raw)
            continue
        header = int.from_bytes(raw[:8], "little")
        table = json.loads(raw[8 : 8 + header])
        ends = [entry["data_offsets"][1] for name, entry in table.items() if name != "__metadata__"]
        assert 8 + header + max(ends) == len(raw), "the file holds more than its tensors"
        with safe_open(path, framework="pt") as file:
            assert file.keys()


def test_a_kill_while_saving_leaves_the_one_before(tmp_path) -> None:
    """The process dies with some files written and no rename: nobody removes what lies there."""
    save_checkpoint(tmp_path, moment(10))
    aside = tmp_path / ".step-000000020.partial"
    aside.mkdir()
    (aside / "model.safetensors").write_bytes(b"\0" * 100)
    assert same(latest_checkpoint(tmp_path), moment(10))
    save_checkpoint(tmp_path, moment(20))  # the same step again, over the leftovers
    assert same(latest_checkpoint(tmp_path), moment(20)) and not aside.exists()


def test_a_kill_while_replacing_leaves_the_one_before(tmp_path) -> None:
    """A step saved again moves its first version aside before the new one takes the name."""
    save_checkpoint(tmp_path, moment(10))
    save_checkpoint(tmp_path, moment(20))
    (tmp_path / "step-000000020").rename(tmp_path / ".step-000000020.old")
    assert same(latest_checkpoint(tmp_path), moment(10))
    save_checkpoint(tmp_path, moment(20))
    assert same(latest_checkpoint(tmp_path), moment(20))


@pytest.mark.parametrize("dies_at", range(1, 9))
def test_an_error_at_any_moment_of_saving_leaves_the_one_before(
    dies_at: int, tmp_path, monkeypatch
) -> None:
    """Every flush to the disk in turn fails; what can be read afterwards is the old moment or the
    new, whole.
    """
    save_checkpoint(tmp_path, moment(10))
    flushed, real = [0], os.fsync

    def fsync(descriptor: int) -> None:
        flushed[0] += 1
        if flushed[0] == dies_at:
            raise OSError(5, "Input/output error")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    try:
        save_checkpoint(tmp_path, moment(20))
    except OSError:
        monkeypatch.undo()
    found = latest_checkpoint(tmp_path)
    assert found is not None and same(found, moment(found.step)) and found.step in (10, 20)
    assert flushed[0] >= min(dies_at, 6), "fewer flushes than files and directories"


def test_the_newest_are_kept_and_those_of_every_so_many_steps(tmp_path) -> None:
    for step in range(10, 81, 10):
        save_checkpoint(tmp_path, moment(step), keep=1, keep_every=30)
    assert steps(tmp_path) == [30, 60, 80]


def test_what_others_put_there_is_neither_read_nor_removed(tmp_path, capsys) -> None:
    """Only directories named as ours are checkpoints: a copy or a note of the user's is neither
    taken for the newest, nor counted, nor removed.
    """
    for step in (10, 20):
        save_checkpoint(tmp_path, moment(step))
    others = ["step-000000010.bak", "step-mine", "step-", "step-0000000010", "step-00000001"]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / "step-999999999").write_text("a file")
    (tmp_path / ".step-000000005.partial.mine").mkdir()
    others += ["step-999999999", ".step-000000005.partial.mine"]
    assert same(latest_checkpoint(tmp_path), moment(20))
    assert same(latest_checkpoint(tmp_path, up_to=15), moment(10))
    save_checkpoint(tmp_path, moment(30))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"step-000000020", "step-000000030", *others}
    assert not capsys.readouterr().err  # nor taken for damaged, nor tried to be removed


def test_what_killed_writers_left_is_removed_with_the_next_checkpoint(tmp_path) -> None:
    """Of whatever step: no later one need have the same number."""
    for name in (".step-000000007.partial", ".step-000000008.old"):
        (tmp_path / name / "inner").mkdir(parents=True)
    save_checkpoint(tmp_path, moment(10))
    assert steps(tmp_path) == [10]


def test_an_old_one_that_cannot_be_removed_is_told(tmp_path, monkeypatch, capsys) -> None:
    """The checkpoint just saved is whole: the save has not failed."""
    for step in (10, 20):
        save_checkpoint(tmp_path, moment(step))
    real = module.shutil.rmtree

    def rmtree(path: Path, **options) -> None:
        if path.name == "step-000000010":
            raise PermissionError(1, "Operation not permitted", str(path))
        real(path, **options)

    monkeypatch.setattr(module.shutil, "rmtree", rmtree)
    with CheckpointWriter(tmp_path) as writer:
        writer.save(moment(30))
        writer.save(moment(40))
    assert steps(tmp_path) == [10, 30, 40] and same(latest_checkpoint(tmp_path), moment(40))
    said = capsys.readouterr().err
    assert said.count("step-000000010 is not needed any more and cannot be removed") == 2


def test_the_newest_up_to_a_step(tmp_path) -> None:
    for step in (10, 20):
        save_checkpoint(tmp_path, moment(step))
    assert (
        same(latest_checkpoint(tmp_path, up_to=19), moment(10))
        and same(latest_checkpoint(tmp_path, up_to=20), moment(20))
        and latest_checkpoint(tmp_path, up_to=9) is None
    )


def test_a_writer_saves_what_the_tensors_were(tmp_path) -> None:
    """Training changes them while they are written."""
    changing = moment(10)
    with CheckpointWriter(tmp_path) as writer:
        writer.save(changing)
        for tensors in changing.tensors.values():
            for tensor in tensors.values():
                tensor.zero_()
        writer.save(moment(20))
    assert same(latest_checkpoint(tmp_path), moment(20)) and same(
        latest_checkpoint(tmp_path, 10), moment(10)
    )


def failing(monkeypatch: pytest.MonkeyPatch, *which: int) -> None:
    """Writing the `which`th checkpoints meets a full disk."""
    real, written = module.save_checkpoint, [0]

    def save(*arguments) -> None:
        written[0] += 1
        if written[0] in which:
            raise Failed("no space left", "free some")
        real(*arguments)

    monkeypatch.setattr(module, "save_checkpoint", save)


def test_a_full_disk_in_between_stops_nothing(tmp_path, monkeypatch, capsys) -> None:
    failing(monkeypatch, 2)
    with CheckpointWriter(tmp_path) as writer:
        for step in (10, 20, 30):
            writer.save(moment(step))
    assert steps(tmp_path) == [10, 30]
    said = capsys.readouterr().err
    assert (
        "no space left\nfree some\ntraining goes on; the next checkpoint is tried at step 30"
        in said
    )


@pytest.mark.parametrize("leaves", [None, KeyboardInterrupt])
def test_the_last_one_that_cannot_be_written_is_an_error(leaves, tmp_path, monkeypatch) -> None:
    failing(monkeypatch, 2)
    with pytest.raises(XushiError, match="no space left"), CheckpointWriter(tmp_path) as writer:
        for step in (10, 20):
            writer.save(moment(step))
        if leaves:
            raise leaves
    assert steps(tmp_path) == [10]


def test_an_error_on_its_way_is_not_hidden_by_one_of_saving(tmp_path, monkeypatch, capsys) -> None:
    """It is raised, and that of saving is told."""
    failing(monkeypatch, 1)
    with pytest.raises(ZeroDivisionError), CheckpointWriter(tmp_path) as writer:
        writer.save(moment(10))
        raise ZeroDivisionError
    assert "the last checkpoint was not written: no space left\n" in capsys.readouterr().err


def test_a_full_disk_while_training_loses_neither_the_run_nor_the_last_checkpoint(tmp_path) -> None:
    """A process of its own, whose files may not grow beyond a few bytes from one moment to another."""
    script = f"""
import resource, signal, sys, torch
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent.parent.parent)!r})
from tests.train.test_checkpoint import moment
from xushi.train.checkpoint import CheckpointWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with CheckpointWriter(Path({str(tmp_path)!r})) as writer:
    writer.save(moment(10))
    writer._wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, resource.RLIM_INFINITY))
    writer.save(moment(20))
    writer._wait()
    print(sorted(path.name for path in Path({str(tmp_path)!r}).iterdir()), flush=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    writer.save(moment(30))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['step-000000010']" and "training goes on" in done.stderr
    assert steps(tmp_path) == [10, 30] and same(latest_checkpoint(tmp_path), moment(30))
