"""Training spread over processes is the training of one: gradients, losses, router biases, checkpoints, in every layout
of two and four processes and for every kind of model.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from xushi.base.errors import XushiError
from xushi.train import Layout, LayoutConfig, TrainingState, check_layout, latest_checkpoint
from xushi.train.checkpoint import SavedCheckpoint
from xushi.train.layout import Box

from .layouts import CONFIG, MODELS, STEPS, THIRD, Choices, gradients, losses, model_of, resumed

ROOT = Path(__file__).parent.parent.parent
LAYOUTS = [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]


def start(place: Path, processes: int) -> list[subprocess.Popen[str]]:
    """As many processes of tests.train.layouts, with the environment that torchrun gives."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
              "OMP_NUM_THREADS": "1"}
    return [subprocess.Popen([sys.executable, "-m", "tests.train.layouts", str(place)], cwd=ROOT, text=True,
                             stderr=subprocess.PIPE, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(processes)]


def together(place: Path, processes: int, task: dict[str, Any]) -> list[dict[str, Any]]:
    """What each of so many processes found for a task."""
    torch.save(task, place / "task.pt")
    started = start(place, processes)
    said = [process.communicate(timeout=300)[1] for process in started]
    assert all(process.returncode == 0 for process in started), "\n".join(text[-2000:] for text in said)
    return [torch.load(place / f"found-{rank}.pt", weights_only=True) for rank in range(processes)]


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    """What one process finds, and the choices that it made."""
    torch.set_num_threads(1)
    found = {}
    for kind in MODELS:
        state = TrainingState.begin(model_of(kind), CONFIG)
        choices = Choices(state.model, Layout())
        figures = losses(state, choices)
        found[kind] = {"gradients": gradients(model_of(kind), Layout()), "figures": figures,
                       "choices": choices.seen[:STEPS], "biases": {
                           key: router.e_score_correction_bias for key, router in state.model.routers().items()
                           if router.e_score_correction_bias is not None}}
    return found


@pytest.fixture(scope="module")
def spread(alone, tmp_path_factory) -> dict[int, list[dict[str, Any]]]:
    """What two and four processes find, in all their layouts and for all kinds."""
    recorded = {kind: result["choices"] for kind, result in alone.items()}
    return {processes: together(tmp_path_factory.mktemp(f"processes-{processes}"), processes, {
        "expert": [expert for number, expert in LAYOUTS if number == processes], "recorded": recorded})
        for processes in (2, 4)}


def joined(parts: list[dict[str, Any]], name: str) -> Tensor:
    """A whole gradient out of the processes' parts."""
    boxes = [Box(**{key: tuple(value) for key, value in part["boxes"][name].items()}) for part in parts]
    whole = torch.full(boxes[0].shape, float("nan"))
    for box, part in zip(boxes, parts, strict=True):
        assert tuple(part["gradients"][name].shape) == box.size
        whole[box.slices] = part["gradients"][name]
    assert not whole.isnan().any(), f"no process holds some part of {name}"
    return whole


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("processes, expert", LAYOUTS)
def test_gradients_are_those_of_one_process(kind: str, processes: int, expert: int, alone, spread) -> None:
    parts = [found[f"{kind} {expert}"] for found in spread[processes]]
    wanted = alone[kind]["gradients"]
    assert parts[0]["gradients"].keys() == wanted.keys()
    whole = torch.stack([g.norm() for g in wanted.values()]).norm()
    for name, gradient in wanted.items():
        difference = (joined(parts, name) - gradient).norm()
        assert difference <= 2e-6 * (gradient.norm() + 1e-3 * whole), (name, float(difference / gradient.norm()))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("processes, expert", LAYOUTS)
def test_twenty_steps_with_the_same_choices_have_the_same_losses(kind: str, processes: int, expert: int, alone, spread
                                                                 ) -> None:
    wanted = alone[kind]
    for found in spread[processes]:  # every process knows the whole batch's figures
        result = found[f"{kind} {expert}"]
        for step, (figures, one) in enumerate(zip(result["replayed"], wanted["figures"], strict=True)):
            for name in ("loss", "mtp_loss", "balance_loss", "indexer_loss"):
                assert abs(figures[name] - one[name]) <= 2e-6 * max(1.0, abs(one[name])), (step, name)
            assert figures["target_tokens"] == one["target_tokens"]
        for name, bias in wanted["biases"].items():
            assert torch.equal(result["replayed_biases"][name], bias), name


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("processes, expert", LAYOUTS)
def test_twenty_steps_of_free_routing_stay_close(kind: str, processes: int, expert: int, alone, spread) -> None:
    result = spread[processes][0][f"{kind} {expert}"]
    flips = 0
    for step in range(STEPS):
        for name, one in alone[kind]["choices"][step].items():
            parts = torch.cat([found[f"{kind} {expert}"]["free_choices"][step][name] for found in spread[processes]])
            flips += int((parts[:len(one)].sort(-1).values != one.sort(-1).values).sum())
    print(f"{kind}, {processes} processes, expert {expert}: {flips} choices differ")
    for figures, one in zip(result["free"], alone[kind]["figures"], strict=True):
        assert abs(figures["loss"] - one["loss"]) <= 1e-2


def whole_tensors(checkpoint: SavedCheckpoint | None) -> dict[str, dict[str, Tensor]]:
    assert checkpoint is not None
    return checkpoint.tensors


def test_a_checkpoint_of_four_opens_in_one_and_two_and_the_other_way(tmp_path) -> None:
    """Saved at step 12 by one, two and four processes: what the others read is that, to the bit, and they go on with it."""
    for processes, expert in ((4, 2), (2, 1)):
        together(tmp_path, processes, {"expert": [expert], "resume": [("v3", f"by-{processes}", 13)]})
    resumed("v3", Layout(), tmp_path / "by-1", 13)
    for written in (1, 2, 4):
        saved = whole_tensors(latest_checkpoint(tmp_path / f"by-{written}"))
        one = TrainingState.begin(model_of("v3"), CONFIG)
        assert one.restore(latest_checkpoint(tmp_path / f"by-{written}")) == 12 and one.cursor == 72
        assert all(torch.equal(tensor, saved[group][name]) for group, tensors in one.tensors.items()
                   for name, tensor in tensors.items())
        other = whole_tensors(latest_checkpoint(tmp_path / "by-1"))
        for name, tensor in saved["model"].items():
            assert torch.allclose(tensor, other["model"][name], atol=2e-5), name
    # Written by one and by four, gone on with by two and by one.
    resumed("v3", Layout(), tmp_path / "by-4", STEPS)
    found = together(tmp_path, 2, {"expert": [2], "resume": [("v3", "by-1", STEPS)]})
    assert found[0]["by-1"] == STEPS
    ends = [whole_tensors(latest_checkpoint(tmp_path / name)) for name in ("by-1", "by-4")]
    for name, tensor in ends[0]["model"].items():
        assert torch.allclose(tensor, ends[1]["model"][name], atol=5e-5), name


def test_the_same_layout_goes_on_to_the_bit(tmp_path) -> None:
    task = {"expert": [2], "resume": [("v3", "whole", STEPS), ("v3", "halved", 9), ("v3", "halved", 15),
                                      ("v3", "halved", STEPS)]}
    together(tmp_path, 2, task)
    whole, halved = (max((tmp_path / name).glob("step-*")) for name in ("whole", "halved"))
    assert whole.name == halved.name == "step-000000020"
    assert {file.name: file.read_bytes() for file in whole.iterdir()} == {
        file.name: file.read_bytes() for file in halved.iterdir()}
    assert len(list(whole.glob("model-*"))) == 2


@pytest.mark.parametrize("layout, processes, problem, remedy", [
    ({"data": 4}, 2, "layout.data=4 and 2 processes were started", "layout.data=2"),
    ({"expert": 3}, 4, "layout.expert=3 does not work with 4 processes and 4 experts", "set layout.expert=2"),
    ({"expert": 8}, 4, "layout.expert=8 does not work", "set layout.expert=4"),
    ({"expert": 1}, 5, "layout.expert=1 does not work with 5 processes", "number of processes that divides")])
def test_a_layout_that_cannot_be_is_refused_with_one_that_can(layout: dict, processes: int, problem: str, remedy: str
                                                              ) -> None:
    with pytest.raises(XushiError) as error:
        check_layout(LayoutConfig(**layout), THIRD, processes)
    assert problem in error.value.problem and remedy in error.value.remedy and error.value.exit_code == 2


def test_a_checkpoint_of_another_model_is_refused(tmp_path) -> None:
    resumed("v3", Layout(), tmp_path, 7)
    with pytest.raises(XushiError, match="another model"):
        TrainingState.begin(model_of("v4"), CONFIG).restore(latest_checkpoint(tmp_path))
    wider = THIRD.model_copy(update={"hidden_size": 32})
    from xushi.model import Deepseek
    with pytest.raises(XushiError, match=r"\[40, 16\] and the model's is \[40, 32\]"):
        TrainingState.begin(Deepseek(wider).initialise(0), CONFIG).restore(latest_checkpoint(tmp_path))
