"""Training spread over processes is the training of one: gradients, losses, router biases,
checkpoints, in every layout of two and four processes and for every kind of model.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from xushi.base.errors import XushiError
from xushi.train import Layout, TrainingState, latest_checkpoint
from xushi.train.boxes import Box
from xushi.train.checkpoint import SavedCheckpoint

from .layouts import (
    COMPARED,
    CONFIG,
    MODELS,
    STEPS,
    THIRD,
    Choices,
    biases,
    config_of,
    gradients,
    losses,
    model_of,
    resumed,
)

ROOT = Path(__file__).parent.parent.parent
# Processes: (stages of a pipeline, how many share out the experts). Data processes are those of
# each stage.
LAYOUTS = {2: [(1, 1), (1, 2), (2, 1)], 4: [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)]}
# V4's tensors whose float32 gradient is a sum over many rows that nearly cancels: one process's
# own error is beyond the bound for the others (docs/lab-log.md, 2026-11-28).
LOSE_DIGITS = ("hc_", "_hc.", "sinks", "q_a_norm")
# In every run of the tests V3 on two processes; the rest with the slow ones.
CASES = [
    pytest.param(
        kind,
        processes,
        f"{stages} {expert}",
        marks=[] if (kind, processes) == ("v3", 2) else [pytest.mark.slow],
    )
    for kind in MODELS
    for processes, layouts in LAYOUTS.items()
    for stages, expert in layouts
    if kind.endswith("deep") == (stages == 4)
]


def start(
    place: Path, processes: int, module: str = "tests.train.layouts", **environment: str
) -> list[subprocess.Popen[str]]:
    """As many processes of a module, with the environment that torchrun gives."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ,
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    return [
        subprocess.Popen(
            [sys.executable, "-m", module, str(place)],
            cwd=ROOT,
            text=True,
            stderr=subprocess.PIPE,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(processes)
    ]


def together(
    place: Path,
    processes: int,
    task: dict[str, Any],
    module: str = "tests.train.layouts",
    **environment: str,
) -> list[dict[str, Any]]:
    """What each of so many processes found for a task."""
    torch.save(task, place / "task.pt")
    started = start(place, processes, module, **environment)
    said = [process.communicate(timeout=600)[1] for process in started]
    assert all(process.returncode == 0 for process in started), "\n".join(
        text[-2000:] for text in said
    )
    return [torch.load(place / f"found-{rank}.pt", weights_only=True) for rank in range(processes)]


@cache
def alone(kind: str) -> dict[str, Any]:
    """What one process finds, and the choices that it made."""
    state = TrainingState.begin(model_of(kind), config_of(kind))
    choices = Choices(state.model, Layout())
    figures = losses(kind, state, choices)
    return {
        "gradients": gradients(model_of(kind), Layout()),
        "exact": gradients(model_of(kind).double(), Layout()),
        "figures": figures,
        "choices": choices.seen[:COMPARED],
        "biases": biases(state.model),
    }


@pytest.fixture(scope="module")
def spread(tmp_path_factory) -> Callable[[str, int], list[dict[str, Any]]]:
    """What so many processes find for a kind, in all their layouts."""

    @cache
    def found(kinds: tuple[str, ...], processes: int) -> list[dict[str, Any]]:
        return together(
            tmp_path_factory.mktemp(f"processes-{processes}"),
            processes,
            {
                "layouts": LAYOUTS[processes],
                "recorded": {kind: alone(kind)["choices"] for kind in kinds},
            },
        )

    def of(kind: str, processes: int) -> list[dict[str, Any]]:
        quick = (kind, processes) == ("v3", 2)
        some = [
            k
            for k in MODELS
            if (k, processes) != ("v3", 2) and (processes == 4 or not k.endswith("deep"))
        ]
        return found(("v3",) if quick else tuple(some), processes)

    return of


def joined(parts: list[dict[str, Any]], name: str, which: str) -> Tensor:
    """A whole gradient out of the processes' parts."""
    parts = [part for part in parts if name in part["boxes"]]  # the stage's whose it is
    boxes = [
        Box(**{key: tuple(value) for key, value in part["boxes"][name].items()}) for part in parts
    ]
    whole = torch.full(boxes[0].shape, float("nan"), dtype=torch.float64)
    for box, part in zip(boxes, parts, strict=True):
        assert tuple(part[which][name].shape) == box.size
        whole[box.slices] = part[which][name]
    assert not whole.isnan().any(), f"no process holds some part of {name}"
    return whole


def size(gradient: Tensor, all_of_them: Tensor) -> Tensor:
    """What a gradient's error is measured against (the design's "how equal is equal")."""
    return gradient.norm() + 1e-3 * all_of_them


@pytest.mark.parametrize("kind, processes, layout", CASES)
def test_gradients_are_those_of_one_process(kind: str, processes: int, layout: str, spread) -> None:
    """In float64 to its rounding, so nothing is computed otherwise; in float32 within 2e-6. V4 is the
    exception: gradients around its streams are sums that nearly cancel (the norm behind the head's
    takes away what all streams share), and one process alone is up to 3.1e-6 from float64. There
    two layouts differ by no more than 2e-6 and one process's own error. Which tensors exceed 2e-6
    depends on the processor: those of the streams on one, sinks and query norms on another.
    """
    check_gradients([found[f"{kind} {layout}"] for found in spread(kind, processes)], alone(kind))


@pytest.mark.slow
def test_gradients_of_the_forms_without_a_compiler(tmp_path) -> None:
    task = {"layouts": LAYOUTS[2], "recorded": {"v3": alone("v3")["choices"]}}
    found = together(tmp_path, 2, task, XUSHI_OPS="pytorch")
    for stages, expert in LAYOUTS[2]:
        check_gradients([part[f"v3 {stages} {expert}"] for part in found], alone("v3"))


def check_gradients(parts: list[dict[str, Any]], one: dict[str, Any]) -> None:
    assert {name for part in parts for name in part["gradients"]} == one["gradients"].keys()
    whole = torch.stack([g.norm() for g in one["exact"].values()]).norm()
    for name, exact in one["exact"].items():
        assert (joined(parts, name, "exact") - exact).norm() <= 1e-12 * size(exact, whole), name
        found, single = joined(parts, name, "gradients"), one["gradients"][name].double()
        own = (single - exact).norm() if any(part in name for part in LOSE_DIGITS) else 0.0
        assert (found - single).norm() <= own + 2e-6 * size(exact, whole), name


@pytest.mark.parametrize("kind, processes, layout", CASES)
def test_steps_with_the_same_choices_have_the_same_losses(
    kind: str, processes: int, layout: str, spread
) -> None:
    one, moved = alone(kind), set[str]()
    for found in spread(kind, processes):  # every process knows the whole batch's figures
        result = found[f"{kind} {layout}"]
        for step, (figures, wanted) in enumerate(
            zip(result["replayed"], one["figures"], strict=True)
        ):
            for name in ("loss", "mtp_loss", "balance_loss", "indexer_loss"):
                assert abs(figures[name] - wanted[name]) <= 2e-6 * max(1.0, abs(wanted[name])), (
                    step,
                    name,
                )
            assert figures["target_tokens"] == wanted["target_tokens"]
        for name, bias in result["replayed_biases"].items():
            assert torch.equal(one["biases"][name], bias), name
        moved |= result["replayed_biases"].keys()
    assert moved == one["biases"].keys()


@pytest.mark.parametrize("kind, processes, layout", CASES)
def test_steps_of_free_routing_stay_close(kind: str, processes: int, layout: str, spread) -> None:
    everyone, one, flips = spread(kind, processes), alone(kind), 0
    for step in range(COMPARED):
        for name, chosen in one["choices"][step].items():
            seen = [found[f"{kind} {layout}"]["free_choices"][step] for found in everyone]
            parts = torch.cat([choices[name] for choices in seen if name in choices])
            flips += int((parts[: len(chosen)].sort(-1).values != chosen.sort(-1).values).sum())
    print(f"{kind}, {processes} processes, {layout}: {flips} choices differ")
    for figures, wanted in zip(
        everyone[0][f"{kind} {layout}"]["free"], one["figures"], strict=True
    ):
        assert abs(figures["loss"] - wanted["loss"]) <= 1e-2


def whole_tensors(checkpoint: SavedCheckpoint | None) -> dict[str, dict[str, Tensor]]:
    assert checkpoint is not None
    return checkpoint.tensors


@pytest.mark.slow
def test_a_checkpoint_of_four_opens_in_one_and_two_and_the_other_way(tmp_path) -> None:
    """Saved at step 12 by one, two and four: what others read is that, to the bit, and they go on
    with it.
    """
    for processes, layout in ((4, (2, 2)), (2, (1, 1))):
        together(
            tmp_path, processes, {"layouts": [layout], "resume": [("v3", f"by-{processes}", 13)]}
        )
    resumed("v3", Layout(), tmp_path / "by-1", 13)
    for written in (1, 2, 4):
        saved = whole_tensors(latest_checkpoint(tmp_path / f"by-{written}"))
        one = TrainingState.begin(model_of("v3"), CONFIG)
        assert one.restore(latest_checkpoint(tmp_path / f"by-{written}")) == 12 and one.cursor == 72
        assert all(
            torch.equal(tensor, saved[group][name])
            for group, tensors in one.tensors.items()
            for name, tensor in tensors.items()
        )
        other = whole_tensors(latest_checkpoint(tmp_path / "by-1"))
        for name, tensor in saved["model"].items():
            assert torch.allclose(tensor, other["model"][name], atol=2e-5), name
    # Written by one and by four, gone on with by two and by one.
    resumed("v3", Layout(), tmp_path / "by-4", STEPS)
    found = together(tmp_path, 2, {"layouts": [(2, 1)], "resume": [("v3", "by-1", STEPS)]})
    assert found[0]["by-1"] == STEPS
    ends = [whole_tensors(latest_checkpoint(tmp_path / name)) for name in ("by-1", "by-4")]
    for name, tensor in ends[0]["model"].items():
        assert torch.allclose(tensor, ends[1]["model"][name], atol=5e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(1, 2), (2, 1)])
def test_the_same_layout_goes_on_to_the_bit(layout: tuple[int, int], tmp_path) -> None:
    task = {
        "layouts": [layout],
        "resume": [
            ("v3", "whole", STEPS),
            ("v3", "halved", 9),
            ("v3", "halved", 15),
            ("v3", "halved", STEPS),
        ],
    }
    together(tmp_path, 2, task)
    whole, halved = (max((tmp_path / name).glob("step-*")) for name in ("whole", "halved"))
    assert whole.name == halved.name == "step-000000020"
    assert {file.name: file.read_bytes() for file in whole.iterdir()} == {
        file.name: file.read_bytes() for file in halved.iterdir()
    }
    assert len(list(whole.glob("model-*"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(1, 2), (2, 1)])
def test_what_is_not_finite_in_one_process_is_left_out_in_all(
    layout: tuple[int, int], tmp_path
) -> None:
    """And with activations that are recomputed, dispatch of experts included."""
    results = together(tmp_path, 2, {"layouts": [layout], "poison": True})
    # Reading a corpus, reinforcement learning: the others may have to wait for the first for long.
    assert all(part["seconds_to_wait"] >= 24 * 3600 for part in results)
    found = [part["poisoned"] for part in results]
    for figures in found:
        assert [step["withheld_steps"] for step in figures] == [0, 0, 1, 1, 1, 1]
        assert "gradient_norm" not in figures[2] and figures[3]["gradient_norm"] > 0
    assert [[step["loss"] for step in figures] for figures in found] == [
        [step["loss"] for step in found[0]]
    ] * 2
    saved = latest_checkpoint(tmp_path / "poisoned")
    assert saved is not None and saved.state["optimizer_steps"] == 5
    assert all(tensor.isfinite().all() for tensor in saved.tensors["model"].values())


def test_a_checkpoint_of_another_model_is_refused(tmp_path) -> None:
    resumed("v3", Layout(), tmp_path, 7)
    with pytest.raises(XushiError, match="another model"):
        TrainingState.begin(model_of("v4"), CONFIG).restore(latest_checkpoint(tmp_path))
    wider = THIRD.model_copy(update={"hidden_size": 32})
    from xushi.model import Deepseek

    with pytest.raises(XushiError, match=r"\[40, 16\] and the model's is \[40, 32\]"):
        TrainingState.begin(Deepseek(wider).initialise(0), CONFIG).restore(
            latest_checkpoint(tmp_path)
        )
