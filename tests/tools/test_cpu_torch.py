"""Which PyTorch make installs: decided in a shell with a pip, a uname and an nvidia-smi of our own."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PIN = next(
    line.removeprefix("torch==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line.startswith("torch==")
)
INDEX = "https://download.pytorch.org/whl/cpu"

# Notes its arguments. Asked for torch's version, it tells what is installed; a dry run collects what
# it is told to, and notes whether it was let go on to its downloads.
PYTHON = """#!/usr/bin/env bash
if [ "$1" = -c ]; then [ -n "$INSTALLED" ] || exit 1; echo "$INSTALLED"; exit; fi
echo "$@" >> "$CALLS"
case "$*" in *--dry-run*)
  echo "Collecting torch==2"
  echo "  Downloading torch.metadata"
  for name in $COLLECTED; do echo "Collecting $name (from torch)"; done
  sleep 0.3
  for number in {1..20000}; do echo "Downloading $number" || exit 1; done
  echo downloaded >> "$CALLS"
;; *) exit "$REFUSES" ;; esac
"""


def calls(
    place: Path,
    collected: str,
    system: str = "Linux",
    gpu: bool = False,
    installed: str = "",
    refuses: int = 0,
) -> tuple[list[str], str]:
    """The calls of pip, and what was said."""
    programs = {
        "python": PYTHON,
        "uname": f"#!/bin/sh\necho {system}\n",
        "nvidia-smi": f"#!/bin/sh\nexit {0 if gpu else 9}\n",
    }
    for name, text in programs.items():
        (place / name).write_text(text)
        (place / name).chmod(0o755)
    noted = place / "calls"
    noted.write_text("")
    done = subprocess.run(
        [ROOT / "tools" / "cpu_torch.sh", place / "python"],
        cwd=ROOT,
        env={
            "PATH": f"{place}:{os.environ['PATH']}",
            "CALLS": str(noted),
            "COLLECTED": collected,
            "INSTALLED": installed,
            "REFUSES": str(refuses),
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return noted.read_text().splitlines(), done.stdout + done.stderr


CUDA = "filelock nvidia-cublas sympy"


def test_without_a_gpu_and_with_cuda_to_come_the_cpu_build_is_taken(tmp_path: Path) -> None:
    (asked, installed), said = calls(tmp_path, CUDA)
    assert "--dry-run" in asked and f"torch=={PIN} -c constraints.txt" in asked
    assert INDEX not in asked
    assert f"--no-deps --index-url {INDEX} torch=={PIN}" in installed
    assert "--dry-run" not in installed and "extra-index" not in installed
    assert INDEX in said


def test_where_no_cuda_comes_nothing_changes(tmp_path: Path) -> None:
    asked, said = calls(tmp_path, "filelock sympy")
    assert [call for call in asked if call != "downloaded"] == asked[:1]
    assert "--dry-run" in asked[0] and said == ""


@pytest.mark.parametrize(
    "case", [{"gpu": True}, {"system": "Darwin"}, {"installed": PIN}], ids=lambda case: str(case)
)
def test_pip_is_not_asked_where_the_answer_is_known(
    tmp_path: Path, case: dict[str, object]
) -> None:
    assert calls(tmp_path, CUDA, **case) == ([], "")  # type: ignore[arg-type]


def test_another_torch_than_the_pinned_one_is_replaced(tmp_path: Path) -> None:
    assert len(calls(tmp_path, CUDA, installed="2.0.0")[0]) == 2


def test_an_index_that_cannot_be_reached_is_said_and_is_no_end(tmp_path: Path) -> None:
    made, said = calls(tmp_path, CUDA, refuses=1)
    assert len(made) == 2 and "the build with CUDA comes instead" in said


def test_make_asks_before_it_installs() -> None:
    recipe = (ROOT / "Makefile").read_text().partition("define install")[2].partition("endef")[0]
    before, _, after = recipe.partition("tools/cpu_torch.sh $(RUN)")
    assert "pip install" not in before and "pip install" in after
