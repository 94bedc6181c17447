"""A step of a run again: its bytes, from the sources themselves, and its loss to the bit."""

import importlib.metadata
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from xushi.base.errors import XushiError
from xushi.base.files import sha256_file, sha256_json
from xushi.base.tracking import Tracking
from xushi.run import replay, replay_sentences

from .conftest import Chain, xushi_here


def test_a_step_is_computed_again_to_the_bit(chain: Chain) -> None:
    """From the last checkpoint before it, and from the beginning where there is none."""
    for step, begins in ((200, 180), (3, 0)):
        result = replay(chain.directory, step)
        assert result["loss"] == result["loss_logged"] and result["trained_from_step"] == begins
        assert result["batch_hash"] == result["batch_hash_logged"] and result["tokens"] == 1024


def test_the_spans_are_the_bytes_of_the_sources(chain: Chain) -> None:
    result = replay(chain.directory, 120, compute_loss=False)
    assert result["cursor"] == 119 * 16 and result["items"] == 16 and "loss" not in result
    assert {span["sequence"] for span in result["spans"]} == set(range(119 * 16, 120 * 16))
    read = 0
    for step in range(1, 30):
        for span in replay(chain.directory, step, compute_loss=False)["spans"]:
            if span["source"] != "python":
                continue
            package = importlib.metadata.distribution(span["meta"]["package"])
            file = Path(str(package.locate_file(span["meta"]["path"]))).read_bytes()
            start = span["meta"].get("bytes", [0])[0]
            found = file[start + span["first_byte"] : start + span["end_byte"]].decode(
                "utf-8", "replace"
            )
            assert found == span["text"]
            read += 1
    assert read > 10


def test_fine_tuning_shows_its_demonstrations(chain: Chain) -> None:
    result = replay(chain.directory, 2, "sft")
    assert result["loss"] == result["loss_logged"] and result["cursor"] == 64
    json.dumps(result)  # what --json prints
    assert [span["meta"]["task"] for span in result["spans"]] == list(range(64, 128))
    assert all(span["text"].startswith("user: ") for span in result["spans"])


def test_the_command(chain: Chain) -> None:
    done = xushi_here("replay", chain.directory, "--step", "2")
    assert done.returncode == 0 and "as logged; trained again from step 0" in done.stdout, (
        done.stderr
    )
    assert "NOT" not in done.stdout


@pytest.mark.parametrize(
    "step, stage, problem, remedy",
    [
        (201, "pretrain", "has no step 201 of stage pretrain", "give one from 1 to 200"),
        (0, "pretrain", "has no step 0", "from 1 to 200"),
        (25, "rl", "has no step 25 of stage rl", "from 1 to 24"),
        (1, "evaluate", "stage 'evaluate' has no steps to replay", "pretrain, sft, rl, control"),
    ],
)
def test_what_is_not_there_is_said(
    step: int, stage: str, problem: str, remedy: str, chain: Chain, tmp_path: Path
) -> None:
    with pytest.raises(XushiError) as error:
        replay(chain.directory, step, stage)
    assert (
        problem in error.value.problem
        and remedy in error.value.remedy
        and error.value.exit_code == 2
    )
    with pytest.raises(XushiError, match="is not a run directory"):
        replay(tmp_path, step, stage)
    assert not list(tmp_path.iterdir())


def test_a_step_of_rl_samples_the_same_answers_again(chain: Chain) -> None:
    """Steps 23 and 24 come after the checkpoint of step 20: what they saw follows from its weights."""
    result = replay(chain.directory, 22, "rl")
    assert result["loss"] == result["loss_logged"] and result["trained_from_step"] == 20
    assert result["batch_hash"] == result["batch_hash_logged"]
    assert [span["meta"]["task"] for span in result["spans"]] == list(range(21 * 16, 22 * 16))
    shown = replay_sentences(replay(chain.directory, 22, "rl", compute_loss=False))
    assert "it was sampled" in shown and "NOT" not in shown


@pytest.mark.slow
def test_changed_data_is_noticed(chain: Chain, tmp_path: Path) -> None:
    """The store is made to say what was not trained on, which is what changed data looks like."""
    copy = tmp_path / "run"
    shutil.copytree(chain.directory, copy)
    store = Tracking(copy / "tracking.sqlite")
    record = store.batches("pretrain", 2)[-1]
    store.batch("pretrain", 2, record.cursor + 16, 16, record.hash, "")
    store.close()
    shown = replay_sentences(replay(copy, 2, compute_loss=False))
    assert "NOT as logged" in shown
    with pytest.raises(XushiError, match="its hash differs"):
        replay(copy, 2)


@pytest.mark.slow
def test_other_weights_are_noticed(chain: Chain, tmp_path: Path) -> None:
    """A loss that is not the logged one is said to differ: the checkpoint before step 200 is
    another one here.
    """
    copy = tmp_path / "run"
    shutil.copytree(chain.directory, copy)
    directory = copy / "checkpoints" / "pretrain" / "step-000000180"
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.01
    save_file(tensors, directory / "model.safetensors")
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["files"]["model.safetensors"]["sha256"] = sha256_file(directory / "model.safetensors")
    manifest["sha256"] = sha256_json(
        {key: value for key, value in manifest.items() if key != "sha256"}
    )
    (directory / "manifest.json").write_text(json.dumps(manifest))
    assert "NOT as logged" in replay_sentences(replay(copy, 200))
