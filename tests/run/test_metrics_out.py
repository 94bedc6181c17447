"""Metrics on other programs' pages: read back by those programs; of the larger ones by the slow
tests alone.
"""

import json
import math
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from xushi.base.errors import XushiError
from xushi.base.tracking import Tracking
from xushi.run import export_metrics


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A run whose third step was done twice and whose fourth has a loss that is not a number."""
    store = Tracking(tmp_path / "some-run" / "tracking.sqlite")
    for step, loss in ((1, 4.0), (2, 3.5), (3, 3.4), (3, 3.25), (4, math.nan)):
        store.metrics("pretrain", step, {"loss": loss, "router.1.dead_experts": 0.0})
    store.metrics("sft", 1, {"loss": 1.5})
    store.close()
    return tmp_path / "some-run"


def test_steps_come_in_the_order_of_writing_and_from_where_one_was(directory: Path) -> None:
    store = Tracking(directory / "tracking.sqlite")
    steps = list(store.steps_after(0))
    assert [(stage, step) for _, stage, step, _ in steps] == [
        ("pretrain", 1),
        ("pretrain", 2),
        ("pretrain", 3),
        ("pretrain", 4),
        ("sft", 1),
    ]
    assert steps[2][3]["loss"] == 3.25 and math.isnan(steps[3][3]["loss"])
    assert list(store.steps_after(steps[3][0])) == steps[4:]
    store.close()


def test_tensorboard_reads_them(directory: Path) -> None:
    loading = import_module("tensorboard.backend.event_processing.event_accumulator")
    assert export_metrics(directory, "tensorboard") == 9
    found = loading.EventAccumulator(str(directory / "tensorboard" / "some-run-pretrain")).Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")][:3] == [
        (1, 4.0),
        (2, 3.5),
        (3, 3.25),
    ]
    assert math.isnan(found.Scalars("loss")[3].value)
    other = loading.EventAccumulator(str(directory / "tensorboard" / "some-run-sft")).Reload()
    assert [(event.step, event.value) for event in other.Scalars("loss")] == [(1, 1.5)]


@pytest.mark.slow
def test_wandb_writes_them_offline(directory: Path) -> None:
    assert export_metrics(directory, "wandb") == 9
    files = list((directory / "wandb").rglob("*.wandb"))
    assert len(files) == 1 and b"router.1.dead_experts" in files[0].read_bytes()


@pytest.mark.slow
def test_trackio_reads_them(directory: Path) -> None:
    """In a process of its own: the package looks for its place when it is imported."""
    read = (
        f"import sys; from pathlib import Path; from xushi.run import export_metrics; "
        f"export_metrics(Path({str(directory)!r}), 'trackio'); import trackio, json; "
        "run = trackio.Api().runs('xushi'); "
        "print(json.dumps(sorted(r.name for r in run)))"
    )
    done = subprocess.run([sys.executable, "-c", read], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == ["some-run-pretrain", "some-run-sft"]


def test_what_cannot_be_is_refused(directory: Path, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(XushiError, match="cannot be exported to 'excel'"):
        export_metrics(directory, "excel")
    (tmp_path / "file").write_text("kept")
    with pytest.raises(XushiError, match="cannot be written"):
        export_metrics(directory, "tensorboard", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"
    with pytest.raises(XushiError, match="is not a run directory"):
        export_metrics(tmp_path / "none", "tensorboard")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(XushiError, match="wandb is not installed") as error:
        export_metrics(directory, "wandb")
    assert error.value.remedy == "pip install 'xushi[wandb]'" and not (directory / "wandb").exists()
