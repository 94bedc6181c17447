"""Guards: what is not finite never reaches the weights, jumps are seen and answered, and the run
ends the same way whenever it is killed between.
"""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from xushi.base.errors import XushiError
from xushi.model import Batch, LossParts
from xushi.train import Data, ObjectiveConfig
from xushi.train import language as module
from xushi.train import step as update
from xushi.train.checkpoint import latest_checkpoint
from xushi.train.gradients import Norms
from xushi.train.guards import (
    LIMIT_IN_A_ROW,
    LIMIT_OF_ROLLBACKS,
    STEPS_BEFORE_JUDGING,
    Guard,
    LossScale,
)

from .conftest import train

SETTINGS = {
    "steps": 12,
    "learning_rate": 0.02,
    "warmup_steps": 2,
    "decay_fraction": 0.5,
    "bias_speed": 0.01,
    "checkpoint_every": 4,
    "dtype": "fp32",
    "on_spike": "warn",
}


class Killed(Exception):
    """Stands for the process's end."""


@given(st.lists(st.floats(0.1, 20), min_size=2, max_size=60))
def test_the_scale_is_the_mean_and_variance_while_few_were_seen(losses: list[float]) -> None:
    scale = LossScale()
    for loss in losses[:50]:
        scale.add(loss)
    seen = torch.tensor(losses[:50], dtype=torch.float64)
    assert scale.mean == pytest.approx(float(seen.mean()))
    assert scale.variance == pytest.approx(float(seen.var(correction=0)), abs=1e-9)


def test_a_spike_is_six_deviations_and_nothing_before_enough_was_seen() -> None:
    guard, noise = Guard(), torch.Generator().manual_seed(0)
    for step in range(STEPS_BEFORE_JUDGING):
        assert guard.judge(50.0, 50.0) is None, step
        guard.count(4.0 + 0.1 * float(torch.randn((), generator=noise)), None)
    for _ in range(2000):  # noise alone is no spike, nor is a loss that falls
        loss = 4.0 + 0.1 * float(torch.randn((), generator=noise))
        assert guard.judge(loss, loss) is None
        guard.count(loss, None)
    problem = guard.judge(5.0, 5.0)
    assert problem is not None and problem.kind == "spike" and "5" in problem.text
    assert guard.judge(4.5, 4.5) is None and not guard.withholds(problem)


def test_the_state_goes_through_json_to_the_bit() -> None:
    guard = Guard("skip")
    for loss in (1 / 3, math.pi, 2.5):
        guard.count(loss, None)
    guard.count(9.0, guard.judge(9.0, math.nan))
    again = Guard("skip")
    again.load(json.loads(json.dumps(guard.state)))
    assert again.state == guard.state and again.in_a_row == 1 and again.withheld == 1


@pytest.fixture
def sensitive(monkeypatch) -> None:
    """The guard judges from the fifth step on; a batch whose targets are all token 39 has ten times
    its loss.
    """
    real = module.pretraining_loss

    def loss(
        model: module.Deepseek, batch: Batch, *others: object, **settings: object
    ) -> LossParts:
        parts = real(model, batch, *others, **settings)
        factor = 10.0 if bool((batch.targets == 39).all()) else 1.0
        return replace(parts, total=parts.total * factor, next_token=parts.next_token * factor)

    monkeypatch.setattr(module, "pretraining_loss", loss)
    monkeypatch.setattr("xushi.train.guards.STEPS_BEFORE_JUDGING", 4)


def spiking(
    batches: Callable[[int], Batch], at: tuple[int, ...], seen: list[int] | None = None
) -> Data:
    """The batches, with a jump of the loss `at` these cursors; the cursors asked for go to `seen`."""

    def make(cursor: int, count: int) -> Batch:
        if seen is not None:
            seen.append(cursor)
        batch = batches(cursor)
        return batch._replace(targets=torch.full_like(batch.targets, 39)) if cursor in at else batch

    return Data(make)


def weights(directory: Path) -> bytes:
    return (max(directory.glob("step-*")) / "model.safetensors").read_bytes()


def poison(batches: Callable[[int], Batch], model: module.Deepseek, steps: tuple[int, ...]) -> Data:
    """The head holds a NaN during these steps and none otherwise."""

    def make(cursor: int, count: int) -> Batch:
        with torch.no_grad():
            model.head_VD[:, 0].nan_to_num_(0.0)
            if cursor in steps:
                model.head_VD[:, 0] = math.nan
        return batches(cursor)

    return Data(make)


def test_what_is_not_finite_is_left_out_and_counted(
    tiny_model, batches, tracking, tmp_path, capsys
) -> None:
    model = tiny_model()
    train(
        "test",
        model,
        ObjectiveConfig(**SETTINGS),
        poison(batches, model, (4, 5, 8)),
        tmp_path,
        tracking,
    )
    assert [value for _, value in tracking.series("test", "withheld_steps")] == [0] * 4 + [
        1,
        2,
        2,
        2,
        3,
        3,
        3,
        3,
    ]
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    checkpoint = latest_checkpoint(tmp_path)
    assert (
        checkpoint is not None
        and checkpoint.step == 12
        and checkpoint.state["optimizer_steps"] == 9
    )
    assert [event["details"]["step"] for event in tracking.events("test", "not_finite")] == [
        5,
        6,
        9,
    ]
    assert "its update is left out" in capsys.readouterr().err
    assert [bool(record.problem) for record in tracking.batches("test", 12)] == [
        i in (4, 5, 8) for i in range(12)
    ]


def test_three_in_a_row_stop_with_the_last_checkpoint_and_the_batch(
    tiny_model, batches, tracking, tmp_path
) -> None:
    model, config = tiny_model(), ObjectiveConfig(**SETTINGS)
    with pytest.raises(XushiError, match="step 8: the loss is not finite") as error:
        train("test", model, config, poison(batches, model, (5, 6, 7)), tmp_path / "test", tracking)
    assert (
        error.value.exit_code == 1
        and "learning_rate" in error.value.remedy
        and str(tmp_path) in error.value.remedy
    )
    checkpoint = latest_checkpoint(tmp_path / "test")
    assert checkpoint is not None and checkpoint.step == 4
    assert all(tensor.isfinite().all() for tensor in checkpoint.tensors["model"].values())
    batch = load_file(tmp_path / "refused-test-step-000000008.safetensors")
    assert all(torch.equal(batch[name], tensor) for name, tensor in batches(7)._asdict().items())
    assert LIMIT_IN_A_ROW == 3


def test_a_gradient_that_is_not_finite_is_left_out_too(
    tiny_model, batches, tracking, tmp_path, monkeypatch
) -> None:
    norms = iter([1.0, math.inf, 1.0, 1.0])
    monkeypatch.setattr(update, "clip_gradients", lambda *_: Norms(next(norms), {}))
    model = tiny_model()
    data = Data(lambda cursor, _: batches(cursor))
    train("test", model, ObjectiveConfig(**(SETTINGS | {"steps": 4})), data, tmp_path, tracking)
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.state["optimizer_steps"] == 3
    assert (
        "the gradient is not finite (inf)"
        in tracking.events("test", "not_finite")[0]["details"]["text"]
    )


@pytest.mark.parametrize("on_spike, updates", [("warn", 12), ("skip", 11)])
def test_a_spike_is_told_and_left_out_if_the_recipe_says_so(
    on_spike: str, updates: int, sensitive, tiny_model, batches, tracking, tmp_path
) -> None:
    model = tiny_model()
    train(
        "test",
        model,
        ObjectiveConfig(**(SETTINGS | {"on_spike": on_spike})),
        spiking(batches, (7,)),
        tmp_path,
        tracking,
    )
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.state["optimizer_steps"] == updates
    assert [event["details"]["step"] for event in tracking.events("test", "spike")] == [8]


def rolled_back(
    directory: Path,
    make_model: Callable[[], module.Deepseek],
    batches,
    tracking,
    end: int | None = None,
) -> list[int]:
    """Cursors in the order asked for; killed when `end` batches were."""
    model, seen = make_model(), list[int]()
    inner = spiking(batches, (6,), seen).batches

    def make(cursor: int, count: int) -> Batch:
        if len(seen) == end:
            raise Killed
        return inner(cursor, count)

    train(
        "test",
        model,
        ObjectiveConfig(**(SETTINGS | {"on_spike": "rollback"})),
        Data(make),
        directory,
        tracking,
    )
    return seen


def test_rollback_leaves_the_data_out_and_is_the_same_after_a_kill(
    sensitive, tiny_model, batches, tracking, tmp_path
) -> None:
    seen = rolled_back(tmp_path / "whole", tiny_model, batches, tracking)
    assert seen == [*range(7), *range(7, 15)]  # back to step 4 with the data after the spike
    assert [record.cursor for record in tracking.batches("test", 12)] == [0, 1, 2, 3, *range(7, 15)]
    assert tracking.events("test", "rollback")[0]["details"] == {
        "from_step": 7,
        "to_step": 4,
        "skipped_from": 4,
        "skipped_to": 7,
    }
    for end in (3, 6, 4, 9):
        with pytest.raises(Killed):
            rolled_back(tmp_path / "killed", tiny_model, batches, tracking, end)
    rolled_back(tmp_path / "killed", tiny_model, batches, tracking)
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    assert [record.cursor for record in tracking.batches("test", 12)] == [0, 1, 2, 3, *range(7, 15)]


def test_rollback_without_a_checkpoint_goes_to_the_beginning_and_not_for_ever(
    sensitive, tiny_model, batches, tracking, tmp_path
) -> None:
    model = tiny_model()
    config = ObjectiveConfig(**(SETTINGS | {"on_spike": "rollback", "checkpoint_every": 12}))
    train("test", model, config, spiking(batches, (6,)), tmp_path / "a", tracking)
    assert tracking.events("test", "rollback")[0]["details"]["to_step"] == 0
    model, many = tiny_model(), tuple(range(6, 200, 7))
    with pytest.raises(XushiError, match=f"after {LIMIT_OF_ROLLBACKS} returns to step 0"):
        train("test", model, config, spiking(batches, many), tmp_path / "b", tracking)


def scale_of(losses: list[float]) -> LossScale:
    scale = LossScale()
    for loss in losses:
        scale.add(loss)
    return scale


def test_the_limit_is_six_deviations() -> None:
    """Losses 3 and 5 in turn: mean 4, deviation 1."""
    scale = scale_of([3.0, 5.0] * 25)
    deviation = scale.deviation()
    assert scale.mean == pytest.approx(4.0) and deviation == pytest.approx(1.0)
    assert scale.is_spike(4.0 + 6.01 * deviation) and not scale.is_spike(4.0 + 5.99 * deviation)


def test_the_first_loss_that_is_judged_is_the_fifty_first() -> None:
    assert not scale_of([4.0] * 49).is_spike(100.0)
    assert scale_of([4.0] * 50).is_spike(100.0)


def test_the_mean_forgets_with_a_memory_of_fifty_steps() -> None:
    """After 50 steps at 1 a mean of 3 has come down to 1 + 2 * 0.98**50."""
    scale = scale_of([3.0] * 200 + [1.0] * 50)
    assert scale.mean == pytest.approx(1 + 2 * 0.98**50, rel=1e-9)


def test_the_smallest_deviation_is_a_part_of_the_mean_or_what_the_step_says() -> None:
    still = scale_of([1.0] * 60)
    assert still.is_spike(1.13) and not still.is_spike(1.11)  # 6 * 0.02
    assert still.is_spike(1.19, 0.03) and not still.is_spike(1.17, 0.03)


def test_a_step_with_nothing_to_compare_is_neither_judged_nor_counted() -> None:
    """But it is left out where what is differentiated is not finite."""
    guard = Guard("skip")
    for _ in range(60):
        guard.count(4.0, guard.judge(4.0, 4.0))
    before = guard.state
    assert guard.judge(100.0, 1.0) is not None and guard.judge(None, 1.0) is None
    guard.count(None, None)
    assert guard.state == before
    problem = guard.judge(None, math.nan)
    assert problem is not None and problem.kind == "not finite"
    guard.count(None, problem)
    assert guard.state == before | {"withheld": 1, "in_a_row": 1}


@pytest.mark.parametrize("spikes, fails", [(3, False), (4, True)])
def test_three_returns_to_one_checkpoint_are_allowed(
    spikes: int, fails: bool, sensitive, tiny_model, batches, tracking, tmp_path
) -> None:
    """Each attempt from step 0 meets the next spike at its seventh step."""
    many = tuple(6 + 7 * n for n in range(spikes))
    config = ObjectiveConfig(**(SETTINGS | {"on_spike": "rollback", "checkpoint_every": 12}))

    def go() -> None:
        train("test", tiny_model(), config, spiking(batches, many), tmp_path / "a", tracking)

    if fails:
        with pytest.raises(XushiError, match="the loss jumps after 3 returns to step 0") as error:
            go()
        assert "--update" in error.value.remedy  # else another recipe is refused here
    else:
        go()
    backs = [event["details"]["to_step"] for event in tracking.events("test", "rollback")]
    assert backs == [0, 0, 0]
