"""The recipe's data table: wrong values are refused, and the message names the key."""

from pathlib import Path
from typing import Any

import pytest

from xushi.base.config import parse
from xushi.base.errors import XushiError
from xushi.data import DataConfig, SourceConfig
from xushi.data.config import text_source

NOTES = {"name": "notes", "kind": "text", "glob": "~/notes"}


def test_defaults() -> None:
    config = parse(DataConfig, {"sources": [NOTES], "sequence_length": 128}, "recipe")
    assert config.heldout == 0.065 and config.salt == "xushi"
    assert (
        config.sources[0].weight == 1.0
        and config.sources[0].field == "text"
        and config.sources[0].exclude == []
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "text", "packages": ["a"]}, "needs glob"),
        ({"glob": None}, "needs glob"),
        ({"kind": "packages"}, "needs packages"),
        ({"kind": "packages", "glob": None}, "needs packages"),
        (
            {"kind": "packages", "glob": None, "packages": ["A_b", "a-B"]},
            "names one distribution twice",
        ),
        ({"weight": 0.0}, "weight: must be at least 1e-06"),
        ({"weight": -1.0}, "weight: must be at least 1e-06"),
        ({"weight": float("inf")}, "weight: must be a finite number"),
        ({"weight": 1e308}, r"weight: must be at most 1e\+06"),
        ({"name": "a/b"}, "a source's name may have only"),
        ({"kind": "csv"}, "kind"),
        ({"globs": "x"}, "unknown key globs"),
    ],
)
def test_bad_source(change: dict[str, Any], message: str) -> None:
    with pytest.raises(XushiError, match=message):
        parse(SourceConfig, {**NOTES, **change}, "recipe")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": []}, "sources: must hold 1 or more entries"),
        ({"sources": [NOTES, NOTES]}, "two sources have the name 'notes'"),
        ({"sequence_length": 1}, "sequence_length: must be at least 2"),
        ({"heldout": 0.04}, r"heldout: must be at least 0\.05"),
        ({"heldout": 0.09}, r"heldout: must be at most 0\.08"),
    ],
)
def test_bad_data(change: dict[str, Any], message: str) -> None:
    with pytest.raises(XushiError, match=message):
        parse(DataConfig, {"sources": [NOTES], "sequence_length": 8, **change}, "recipe")


def test_the_paths_of_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    source = text_source(["~/a b", "notes/../*.md", "x\udcff"], ["b\udcff*"])
    assert source.globs == ["/home/me/a b", f"{tmp_path}/*.md", rf"{tmp_path}/x\xff"]
    assert source.exclude == [r"b\xff*"]
    for paths, exclude in ((["\udcff" * 1500], []), (["a"], ["b" * 5000])):
        with pytest.raises(XushiError, match="is too long a name"):
            text_source(paths, exclude)
    for paths in ([""], ["a", " "]):
        with pytest.raises(XushiError, match="a PATH is empty"):
            text_source(paths)
