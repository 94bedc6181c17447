"""Locks between processes: one holder or many, and a removed lock file is no lock."""

from pathlib import Path

import pytest

from xushi.base import locks


def test_one_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locks.exclusive(path) as held:
        assert held
        with locks.exclusive(path) as again:
            assert not again
    with locks.exclusive(path) as held:
        assert held


def test_many_share(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locks.shared(path) as held:
        assert not held and not path.exists()
    path.touch()
    with locks.shared(path) as one, locks.shared(path) as other, locks.exclusive(path) as alone:
        assert one and other and not alone


def test_a_removed_lock_file_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the holder removes the file while another process waits for it."""
    path = tmp_path / "lock"
    lock = locks.fcntl.flock

    def late(descriptor: int, kind: int) -> None:
        path.unlink()
        path.touch()
        lock(descriptor, kind)

    path.touch()
    monkeypatch.setattr(locks.fcntl, "flock", late)
    with locks.exclusive(path) as held:
        assert not held
    with locks.shared(path) as held:
        assert not held
