"""What the commands on ideas print for programs, and the pages that they leave."""

import json
import shlex
import sys
from pathlib import Path

import pytest

from xushi.base.errors import Failed
from xushi.cli.ideas import tried, try_ideas

PYTHON = shlex.quote(sys.executable)
PROGRAM = "import json, sys; print(json.dumps({'loss': float(sys.argv[1]) + float(sys.argv[2])}))"


def write_idea(path: Path, variant: str) -> Path:
    path.write_text(
        'question = "?"\nmetric = "loss"\nsmallest_effect = 0.5\npairs = 2\n'
        f'baseline = "{PYTHON} train.py {{seed}} 0"\nvariant = "{variant}"\n'
    )
    return path


def test_an_idea_that_fails_takes_no_result_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text(PROGRAM)
    good = write_idea(Path("good.toml"), f"{PYTHON} train.py {{seed}} 1")
    bad = write_idea(Path("bad.toml"), f"{PYTHON} train.py {{seed}} one")
    with pytest.raises(Failed, match="exit code 1"):
        try_ideas([good, bad], ledger=Path("notes"), workers=1, as_json=True)
    printed = capsys.readouterr()
    (line,) = printed.out.splitlines()
    assert json.loads(line)["name"] == "good"
    assert "page: notes/good-1.html" in printed.err
    kept = json.loads(Path("notes/good-1.json").read_text(encoding="utf-8"))
    assert kept["command"] == "xushi try good.toml --ledger notes"
    assert kept["result"]["verdict"] == json.loads(line)["verdict"]
    page = Path("notes/index.html").read_text(encoding="utf-8")
    assert "good-1.html" in page
    Path("notes/index.json").unlink()
    tried(ledger=Path("notes"), as_json=True)
    shown = json.loads(capsys.readouterr().out)
    assert shown == json.loads(Path("notes/index.json").read_text(encoding="utf-8"))
    assert [each["name"] for each in shown["ideas"]] == ["good", "bad"]
