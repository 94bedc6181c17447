"""The miniature recipe through the real command line; the fixture `chain` runs it once."""

import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from xushi.cli import main

ROOT = Path(__file__).parent.parent
MINIATURE = ROOT / "tests" / "miniature.toml"
XUSHI = [sys.executable, "-c", "from xushi.cli import main; main()"]


@dataclass
class Chain:
    directory: Path
    results: dict[str, Any]
    said: str


def xushi(*arguments: str | Path, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, from a directory that is not the checkout's business."""
    return subprocess.run(
        [*XUSHI, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "COLUMNS": "200"},
    )


def xushi_here(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command in this process, two seconds sooner, since torch is imported already: for what a
    process of its own would do just the same.
    """
    output, errors = StringIO(), StringIO()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as leaving:
        patch.setattr(sys, "argv", ["xushi", *map(str, arguments)])
        patch.setenv("COLUMNS", "200")
        with redirect_stdout(output), redirect_stderr(errors):
            main()
    code = leaving.value.code
    assert isinstance(code, int)
    return subprocess.CompletedProcess(arguments, code, output.getvalue(), errors.getvalue())


def read_results(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "results.json").read_text(encoding="utf-8"))


def run_miniature(directory: Path) -> Chain:
    """Run the miniature recipe in `directory`."""
    done = xushi("run", MINIATURE, "--out", directory)
    assert done.returncode == 0, done.stderr
    return Chain(directory, read_results(directory), done.stdout + done.stderr)
