"""Reinforcement learning through the training loop: the reward rises, a killed run ends with the
same bits, and a hopeless one ends at the same step.
"""

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from xushi.base.errors import XushiError
from xushi.base.tracking import Tracking
from xushi.envs import Score
from xushi.plan import train_flops_per_token
from xushi.rl import ReinforcementStep, RLConfig, grpo_loss, policy
from xushi.rl import step as module
from xushi.rl.rollout import Rollout, Sampler
from xushi.train import Layout, Training, TrainingState, latest_checkpoint
from xushi.train.training import Replayed

from .conftest import CONFIG, SHAPE


class Killed(Exception):
    """Stands for the process's end."""


@pytest.fixture
def training(fine_tuned, tokenizer, environment) -> Callable[..., Training]:
    """A training of a fresh model in a directory, with changes to the config."""

    def make(directory: Path, tracking: Tracking, **changes: object) -> Training:
        config = RLConfig(**(CONFIG.model_dump() | changes))
        step = ReinforcementStep(tokenizer, environment, config, 3)
        return Training("rl", fine_tuned(), step, directory, tracking)

    return make


@pytest.fixture
def tracking(tmp_path) -> Tracking:
    return Tracking(tmp_path / "tracking.sqlite")


def rewards(make: Callable[..., Training], directory: Path, **changes: object) -> list[float]:
    tracking = Tracking(directory / "tracking.sqlite")
    make(directory / "checkpoints", tracking, **changes).run()
    return [value for _, value in tracking.series("rl", "reward")]


def test_the_reward_rises(training, tmp_path, monkeypatch) -> None:
    """From about four right in ten to nearly all; with the loss's sign turned, to nearly none."""
    got = rewards(training, tmp_path / "right", steps=25)
    assert got[0] < 0.65 and sum(got[-5:]) / 5 > 0.9, got

    monkeypatch.setattr(policy, "grpo_loss", lambda *a, **k: -grpo_loss(*a, **k))
    turned = rewards(training, tmp_path / "turned", steps=25)
    assert sum(turned[-5:]) / 5 < 0.1, turned


def final_weights(directory: Path) -> bytes:
    return (max(directory.glob("step-*")) / "model.safetensors").read_bytes()


def killed_at(monkeypatch: pytest.MonkeyPatch, cursor: int, run: Callable[[], object]) -> None:
    """Run until the tasks from `cursor` on are to be played."""
    real = Sampler.rollout

    def rollout(self: Sampler, model, at: int, share: range) -> Rollout:
        if at == cursor:
            raise Killed
        return real(self, model, at, share)

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "rollout", rollout)
        with pytest.raises(Killed):
            run()


def test_killed_and_gone_on_with_it_ends_with_the_same_bits(
    training, tmp_path, monkeypatch
) -> None:
    """Killed while sampling, after a checkpoint and before one."""
    rewards(training, tmp_path / "whole")
    for step in (2, 6):
        killed_at(monkeypatch, 6 * step, lambda: rewards(training, tmp_path / "killed"))
    rewards(training, tmp_path / "killed")
    whole, killed = (tmp_path / name / "checkpoints" for name in ("whole", "killed"))
    assert final_weights(killed) == final_weights(whole)


def test_ctrl_c_saves_after_the_running_step(training, tmp_path, monkeypatch, tracking) -> None:
    real = Sampler.rollout

    def rollout(self: Sampler, model, cursor: int, share: range) -> Rollout:
        if cursor == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, model, cursor, share)

    monkeypatch.setattr(Sampler, "rollout", rollout)
    with pytest.raises(KeyboardInterrupt):
        training(tmp_path / "a", tracking).run()
    checkpoint = latest_checkpoint(tmp_path / "a")
    assert checkpoint is not None and checkpoint.step == 2 and checkpoint.state["cursor"] == 12


@pytest.fixture
def always(environment, monkeypatch) -> Callable[[str], None]:
    """Have the verifier say one thing always, and the limit be 4 steps."""

    def say(verdict: str) -> None:
        score = Score(verdict, "always")
        monkeypatch.setattr(type(environment), "score", lambda *_: score)
        monkeypatch.setattr(module, "LIMIT_WITHOUT_SIGNAL", 4)

    return say


def test_nothing_to_learn_from_ends_it_and_says_so(
    training, fine_tuned, always, tracking, tmp_path, capsys
) -> None:
    always("wrong")
    run = training(tmp_path / "checkpoints", tracking)
    run.run()
    assert [step for step, _ in tracking.series("rl", "reward")] == [1, 2, 3, 4]
    (event,) = tracking.events("rl", "stopped_early")
    assert event["details"]["step"] == 4 and "nothing to learn" in event["details"]["reason"]
    assert "nothing to learn from" in capsys.readouterr().err
    before = fine_tuned().state_dict()
    after = run.state.model.state_dict()
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert not moved  # the routers' biases neither, unless the recipe says so


def test_steps_without_signal_are_counted_through_a_kill(
    training, always, tracking, tmp_path, monkeypatch
) -> None:
    """Killed in step 3 it stops at the step at which it would have, and stays stopped."""
    always("wrong")
    place = tmp_path / "checkpoints"
    killed_at(monkeypatch, 12, lambda: training(place, tracking, checkpoint_every=1).run())
    for _ in range(2):
        training(place, tracking, checkpoint_every=1).run()
        checkpoint = latest_checkpoint(place)
        assert checkpoint is not None and checkpoint.step == 4 and checkpoint.state["stopped"]
    assert len(tracking.events("rl", "stopped_early")) == 1


def test_a_task_that_is_solved_is_not_hopeless(training, always, tracking, tmp_path) -> None:
    """No group differs where all are right either."""
    always("right")
    training(tmp_path / "checkpoints", tracking, steps=6).run()
    assert [value for _, value in tracking.series("rl", "with_signal")] == [0.0] * 6


@pytest.mark.parametrize(("errors", "judged"), [(0, 1.0), (CONFIG.samples, 1.0), (None, None)])
def test_a_step_in_which_the_verifier_failed_is_no_collapse(errors, judged) -> None:
    """The guard sees 1 - mean reward, and nothing where no answer has a reward."""
    every = CONFIG.prompts * CONFIG.samples
    figures = {"loss": 0.0, "reward": 0.0, "verifier_errors": every if errors is None else errors}
    loss = policy.PolicyLoss(torch.zeros(()), None, figures, {})  # type: ignore[arg-type]
    assert module._step_loss(loss, CONFIG).judged == judged


def test_steps_in_which_the_verifier_failed_do_not_move_the_guard(
    training, always, tracking, tmp_path
) -> None:
    """Counted as rewards of 1, three such steps would hide a fall of the mean reward later."""
    always("error")
    run = training(tmp_path / "checkpoints", tracking, steps=3)
    run.run()
    assert run.state.guard.scale.seen == 0
    assert [value for _, value in tracking.series("rl", "withheld_steps")] == [0.0] * 3


def test_figures_and_batches_are_tracked_at_every_step(training, tracking, tmp_path) -> None:
    training(tmp_path / "checkpoints", tracking, steps=2).run()
    names = set(tracking.names("rl"))
    assert {
        "reward",
        "length",
        "entropy",
        "truncated",
        "with_signal",
        "verifier_errors",
        "logprob_difference",
        "gradient_norm",
        "tokens_per_second",
        "router.1.max_violation",
    } <= names
    assert all(math.isfinite(value) for name in names for _, value in tracking.series("rl", name))
    tokens, flops = (tracking.series("rl", name) for name in ("tokens", "flops"))
    for (_, count), (_, spent) in zip(tokens, flops, strict=True):
        context = round(count / (CONFIG.prompts * CONFIG.samples))
        # Learning takes three forward passes and sampling one.
        passes = train_flops_per_token(SHAPE, context, mtp=False) / 3 * 4
        assert spent == pytest.approx(count * passes)
    records = tracking.batches("rl", 2)
    assert [(record.cursor, record.items) for record in records] == [(0, 6), (6, 6)]
    assert records[0].hash != records[1].hash


def test_a_step_is_replayed_with_its_loss(training, tracking, tmp_path) -> None:
    training(tmp_path / "checkpoints", tracking, steps=7).run()
    records = tracking.batches("rl", 6)
    replayed: Replayed = training(tmp_path / "checkpoints", Tracking(None), steps=7).replay(records)
    assert replayed.trained_from == 4
    for name in ("loss", "reward", "gradient_norm"):
        assert replayed.result.figures[name] == dict(tracking.series("rl", name))[6]
    other = [*records[:-1], records[-1]._replace(hash="another")]
    with pytest.raises(XushiError, match="not the one that was trained on"):
        training(tmp_path / "checkpoints", Tracking(None), steps=7).replay(other)


def test_a_reward_that_collapses_is_a_spike_and_rolled_back(
    training, environment, tracking, tmp_path, monkeypatch
) -> None:
    """The guard judges 1 - mean reward: from always right to always wrong at one step's tasks."""
    monkeypatch.setattr("xushi.train.guards.STEPS_BEFORE_JUDGING", 3)

    def score(self, task, transcript) -> Score:
        return Score("wrong" if 24 <= task.index < 30 else "right", "by number")

    monkeypatch.setattr(type(environment), "score", score)
    training(tmp_path / "checkpoints", tracking, steps=7, on_spike="rollback").run()
    (event,) = tracking.events("rl", "rollback")
    assert event["details"] == {
        "from_step": 5,
        "to_step": 4,
        "skipped_from": 24,
        "skipped_to": 30,
    }
    cursors = [record.cursor for record in tracking.batches("rl", 7)]
    assert cursors == [0, 6, 12, 18, 30, 36, 42]


def test_one_mistake_after_a_long_time_without_is_no_spike(
    training, environment, tracking, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("xushi.train.guards.STEPS_BEFORE_JUDGING", 2)

    def score(self, task, transcript) -> Score:
        return Score("wrong" if task.index == 24 else "right", "by number")

    monkeypatch.setattr(type(environment), "score", score)
    training(tmp_path / "checkpoints", tracking, steps=5, prompts=12, samples=2).run()
    assert not tracking.events("rl", "spike")
    assert [value for _, value in tracking.series("rl", "reward")] == [1, 1, 22 / 24, 1, 1]


def test_layouts_that_cannot_sample_are_refused(fine_tuned, tokenizer, environment) -> None:
    step = ReinforcementStep(tokenizer, environment, CONFIG, 3)
    state = TrainingState.begin(fine_tuned(), CONFIG)
    for layout, problem in (
        (Layout(pipeline=2), "layout.pipeline=2 cuts the model"),
        (Layout(data=7), "rl.prompts=6 does not give each of layout.data=7"),
    ):
        state.layout = layout
        with pytest.raises(XushiError, match=problem) as error:
            step.take(state, 0, lambda _: None)
        assert error.value.exit_code == 2
