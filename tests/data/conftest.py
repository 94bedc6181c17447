"""Fixtures of the tests of `xushi.data`."""

from pathlib import Path

import pytest

from xushi.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """All bytes and a few merges, so that there are tokens of one and of several bytes."""
    return Tokenizer.train(["the tree the then 天地天地 return self\n    return self\n" * 20], 285)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory on sys.path in which tests install distributions."""
    directory = tmp_path / "site"
    directory.mkdir()
    monkeypatch.syspath_prepend(str(directory))
    return directory
