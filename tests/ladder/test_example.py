"""The program that the shipped ideas train."""

import json
import subprocess
import sys

import pytest

from ..miniature import ROOT


def val_loss(*options: str) -> float:
    done = subprocess.run(
        [sys.executable, "examples/train_tiny.py", "--steps", "5", *options],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(json.loads(done.stdout.splitlines()[-1])["val_loss"])


@pytest.mark.slow
def test_the_options_decide_the_loss() -> None:
    """To the last digit, and each option that the ideas change does something."""
    first = val_loss("--seed", "1")
    assert val_loss("--seed", "1") == first
    others = [
        val_loss("--seed", "2"),
        *(val_loss("--seed", "1", "--optimizer", name) for name in ("muon", "sgd")),
        val_loss("--seed", "1", "--learning-rate", "0.08"),
        val_loss("--seed", "1", "--epsilon", "0.1"),
    ]
    assert len({first, *others}) == 6
