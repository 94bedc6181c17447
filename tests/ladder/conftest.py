"""A directory with a program that takes a seed and prints a loss, and ideas about it."""

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xushi.ladder import jobs

# Losses are around 2, with a spread of .06 over seeds that both arms share, and one of .006 of
# their own. Each run leaves a line in runs.txt: its arguments and its process.
PROGRAM = """
import json, os, sys, time
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
seed = int(options["--seed"])
gain = float(options.get("--gain", 0))
with open("runs.txt", "a") as file:
    file.write(" ".join(sys.argv[1:]) + f" process {os.getpid()}\\n")
time.sleep(float(options.get("--sleep", 0)))
noise = lambda key: (key * 7919 % 1009 / 1009 - 0.5) / 5
print("step 1, loss 9.9")
print(json.dumps({"loss": 2 + noise(seed) + noise(seed * 31 + int(1000 * gain)) / 10 - gain}))
"""
PYTHON = f"{shlex.quote(sys.executable)} -S -E"

WriteIdea = Callable[..., Path]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with train.py in it."""
    monkeypatch.setattr(jobs, "_SECONDS_BETWEEN_LOOKS", 0.01)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(PROGRAM)
    return tmp_path


@pytest.fixture
def write_idea(place: Path) -> WriteIdea:
    """Write NAME.toml: a gain of .5 where nothing else is said."""

    def write(name: str = "idea", program: str = "", **keys: Any) -> Path:
        table: dict[str, Any] = {
            "question": "Is it better?",
            "baseline": f"{PYTHON} train.py --seed {{seed}}",
            "variant": f"{PYTHON} train.py --seed {{seed}} --gain 0.5",
            "metric": "loss",
            "smallest_effect": 0.01,
            "pairs": 4,
        }
        if program:  # of its own, for both arms: it sees `seed` and `arm`
            (place / f"{name}.py").write_text(
                "import json, sys\nseed, arm = int(sys.argv[1]), sys.argv[2]\n" + program
            )
            for arm in ("baseline", "variant"):
                table[arm] = f"{PYTHON} {name}.py {{seed}} {arm}"
        table |= keys
        path = place / f"{name}.toml"
        path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items()))
        return path

    return write


@pytest.fixture
def runs(place: Path) -> Callable[[], list[str]]:
    """The arguments of all runs of train.py so far."""

    def read() -> list[str]:
        path = place / "runs.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.partition(" process ")[0] for line in lines]

    return read
