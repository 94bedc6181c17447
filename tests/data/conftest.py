"""Corpora on disk that the tests of this room share."""

from pathlib import Path

import pytest

from xushi.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The bytes and a few merges, so that tokens of one and of several bytes both occur."""
    return Tokenizer.train(["the tree the then 天地天地 return self\n    return self\n" * 20], 285)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place from which distributions are found, to be filled with `install`."""
    directory = tmp_path / "site"
    directory.mkdir()
    monkeypatch.syspath_prepend(str(directory))
    return directory
