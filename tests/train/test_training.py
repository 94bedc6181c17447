"""The training loop: interrupted and gone on with it ends with the same bits; it learns; it refuses
what diverges.
"""

import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from xushi.base.errors import XushiError
from xushi.model import Batch, Deepseek, LossWeights, ModelConfig, pretraining_loss
from xushi.train import (
    Data,
    LanguageModelStep,
    ObjectiveConfig,
    PretrainConfig,
    StepLoss,
    Training,
    TrainingState,
    chosen_dtype,
    training_step,
)
from xushi.train.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    latest_checkpoint,
    save_checkpoint,
)
from xushi.train.gradients import Norms
from xushi.train.optimizer import is_matrix
from xushi.train.state import set_compute
from xushi.train.step import optimizer_step

from .conftest import train
from .layouts import MODELS

STEPS = 7
SETTINGS = {
    "steps": STEPS,
    "learning_rate": 0.02,
    "warmup_steps": 2,
    "decay_fraction": 0.5,
    "bias_speed": 0.01,
    "checkpoint_every": 3,
    "dtype": "fp32",
}


class Killed(Exception):
    """Stands for the process's end: nothing of the loop runs after it."""


def numbered(batches: Callable[[int], Batch]) -> Data:
    """One batch a step: the cursor is its number."""
    return Data(lambda cursor, _: batches(cursor))


def files(directory: Path) -> dict[str, bytes]:
    """Every file of the newest checkpoint."""
    newest = max(directory.glob("step-*"))
    return {path.name: path.read_bytes() for path in newest.iterdir()}


@pytest.fixture
def run(tiny_model, batches, tracking) -> Callable[..., dict[str, bytes]]:
    """Train a fresh model object in a directory to its end; `stop` may raise or send a signal at a
    step.
    """

    def go(
        directory: Path, stop: Callable[[int], None] = lambda step: None, **changes: object
    ) -> dict[str, bytes]:
        def watched(step: int) -> Batch:
            stop(step)
            return batches(step)

        config = ObjectiveConfig(**(SETTINGS | changes))
        model = tiny_model()
        train("test", model, config, numbered(watched), directory, tracking)
        written = files(directory)
        reread = tiny_model()
        assert (
            TrainingState.begin(reread, config).restore(latest_checkpoint(directory))
            == config.steps
        )
        assert all(
            torch.equal(a, b)
            for a, b in zip(model.state_dict().values(), reread.state_dict().values(), strict=True)
        ), "the model object is what was saved"
        return written

    return go


@pytest.mark.parametrize(
    "changes",
    [{}, {"optimizer": "adamw"}, {"dtype": "bf16"}, {"mtp_weight": 0.0}],
    ids=["muon", "adamw", "bf16", "no mtp"],
)
def test_killed_and_gone_on_with_it_ends_with_the_same_bits(changes: dict, run, tmp_path) -> None:
    """Killed after one checkpoint, after two, and before any, in the same run."""
    whole = run(tmp_path / "whole", **changes)
    for when in (1, 4, 6):

        def stop(step: int, when: int = when) -> None:
            if step == when:
                raise Killed

        with pytest.raises(Killed):
            run(tmp_path / "killed", stop, **changes)
    assert run(tmp_path / "killed", **changes) == whole
    assert set(whole) == {"manifest.json", "model.safetensors", "optimizer.safetensors"}


def test_a_run_that_is_done_is_left_as_it_is(run, tmp_path) -> None:
    first = run(tmp_path / "a")

    def never(step: int) -> None:
        raise AssertionError("no batch may be asked for")

    assert run(tmp_path / "a", never) == first


def test_ctrl_c_saves_after_the_running_step(run, tmp_path) -> None:
    whole = run(tmp_path / "whole")

    def interrupt(step: int) -> None:
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", interrupt)
    assert signal.getsignal(signal.SIGINT) is before
    checkpoint = latest_checkpoint(tmp_path / "stopped")
    assert checkpoint is not None and checkpoint.step == 5
    assert run(tmp_path / "stopped") == whole


def test_what_is_tracked(run, tracking, tmp_path) -> None:
    run(tmp_path / "a", **{"steps": 5})
    assert [step for step, _ in tracking.series("test", "loss")] == [1, 2, 3, 4, 5]
    rates = [value for _, value in tracking.series("test", "learning_rate")]
    assert rates == pytest.approx([0.02 * f for f in (1 / 3, 2 / 3, 1, 2 / 3, 1 / 3)])
    names = set(tracking.names("test"))
    assert {
        "loss",
        "mtp_loss",
        "balance_loss",
        "gradient_norm",
        "tokens_per_second",
        "seconds",
    } <= names
    for layer in ("1", "2"):
        assert {
            f"router.{layer}.{name}"
            for name in ("max_violation", "dead_experts", "bias_drift", "load.3")
        } <= names
    assert all(math.isfinite(value) for name in names for _, value in tracking.series("test", name))


def test_evaluation_at_its_steps_and_at_the_end(tiny_model, batches, tracking, tmp_path) -> None:
    class Counting:
        every = 3
        measured = 0

        def measure(self) -> dict[str, float]:
            self.measured += 1
            return {"quality": float(self.measured)}

    metrics = train(
        "test",
        tiny_model(),
        ObjectiveConfig(**SETTINGS),
        numbered(batches),
        tmp_path,
        tracking,
        Counting(),
    )
    assert (
        tracking.series("test", "quality") == [(3, 1.0), (6, 2.0), (7, 3.0)]
        and metrics["quality"] == 3.0
    )


@pytest.mark.parametrize("optimizer, rate", [("muon", 0.05), ("adamw", 0.02)])
def test_it_learns(optimizer: str, rate: float, tiny_model, batches, tracking, tmp_path) -> None:
    """One batch again and again: what can be known of it, all but its documents' first tokens, is
    soon known.

    From ln 40 = 3.7 for 40 equally likely tokens; with the sign of an update turned the loss grows.
    """
    config = ObjectiveConfig(steps=40, learning_rate=rate, optimizer=optimizer, dtype="fp32")
    metrics = train(
        "test", tiny_model(), config, numbered(lambda _: batches(0)), tmp_path, tracking
    )
    losses = [value for _, value in tracking.series("test", "loss")]
    assert losses[0] == pytest.approx(math.log(40), abs=0.2) and metrics["loss"] < 0.5
    assert metrics["mtp_loss"] < 1.5


def test_biases_move_in_training_and_not_without_speed(
    tiny_model, batches, tracking, tmp_path
) -> None:
    moving, still = tiny_model(), tiny_model()
    train("a", moving, ObjectiveConfig(**SETTINGS), numbered(batches), tmp_path / "a", tracking)
    train(
        "b",
        still,
        ObjectiveConfig(**(SETTINGS | {"bias_speed": 0.0})),
        numbered(batches),
        tmp_path / "b",
        tracking,
    )
    for name in ("1", "2"):  # a decoder layer and the MTP layer
        bias = moving.routers()[name].e_score_correction_bias
        assert bias.any() and bias.abs().max() <= 2 * 0.01 * STEPS and bias.mean().abs() < 1e-6
        assert not still.routers()[name].e_score_correction_bias.any()


def test_a_step_moves_biases_against_the_loads(tiny_model, batches) -> None:
    model, config = tiny_model(), ObjectiveConfig(**SETTINGS)
    parts = pretraining_loss(model, batches(0), LossWeights(0.3, 1e-4))
    parts.total.backward()
    state = TrainingState.begin(model, config)
    loss = StepLoss(parts.total, 0.0, 0.0, parts.loads)
    figures = optimizer_step(state, config, 0, loss, Norms(1.5, {"experts": 1.2}))
    for name, load in parts.loads.items():
        bias = model.routers()[name].e_score_correction_bias
        if load.max() > load.min():
            assert bias[load.argmax()] < bias[load.argmin()]
    assert figures["learning_rate"] == pytest.approx(0.02 / 3) and figures["gradient_norm"] == 1.5


@pytest.mark.parametrize("dtype, expected", [("fp32", None), ("bf16", torch.bfloat16)])
def test_compute_dtype(dtype: str, expected: torch.dtype | None, tiny_model) -> None:
    model = tiny_model()
    set_compute(model, ObjectiveConfig(**(SETTINGS | {"dtype": dtype})))
    assert model.compute_dtype == expected
    assert chosen_dtype(dtype) == dtype and chosen_dtype("auto") in ("bf16", "fp32")
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_everything_a_step_depends_on_is_in_the_checkpoint(tiny_model, batches, tmp_path) -> None:
    """Moments, their count, the router biases by their published names, the cursor, and what the
    guard has seen.
    """
    config = ObjectiveConfig(**SETTINGS)
    state = TrainingState.begin(tiny_model(), config)
    for step in range(2):
        training_step(state, config, step, batches(step))
        state.cursor += 5
    save_checkpoint(tmp_path, state.checkpoint(2))
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.state == {
        "optimizer_steps": 2,
        "cursor": 10,
        "guard": state.guard.state,
        "step": {},
        "stopped": "",
    }
    assert state.guard.scale.seen == 2
    assert set(checkpoint.tensors["model"]) == set(state.model.state_dict())
    assert all(parameter.grad is None for parameter in state.model.parameters())
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in checkpoint.tensors["model"]
    assert "momentum.model.layers.1.mlp.experts.gate_up_proj" in checkpoint.tensors["optimizer"]

    again = TrainingState.begin(tiny_model(), config)
    assert again.restore(checkpoint) == 2 and again.optimizer.steps == 2 and again.cursor == 10
    assert again.guard.state == state.guard.state
    assert all(
        torch.equal(again.optimizer.state[name], tensor)
        for name, tensor in state.optimizer.state.items()
    )


class Operations(TorchDispatchMode):
    """Collects the operations that run, and refuses accumulating index_put, whose order of sums
    varies with threads.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        name = function.overloadpacket.__name__
        self.names.add(name)
        if "index_put" in name:
            accumulates = keywords.get("accumulate", arguments[3] if len(arguments) > 3 else False)
            assert not accumulates, "an accumulating index_put"
        return function(*arguments, **keywords)


def test_activations_recomputed_give_the_same_bits(run, tmp_path) -> None:
    assert run(tmp_path / "a") == run(tmp_path / "b", activations="recompute")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("form", ["compiled", "pytorch"])
def test_no_step_accumulates_by_index_put(
    form: str, dtype: str, tiny_model, batches, monkeypatch
) -> None:
    """Forward and backward of everything pretraining has: a race that ten runs may miss is seen in
    one.
    """
    products = (
        {"mm"} if form == "pytorch" else set()
    )  # the compiled ones' are not PyTorch's operations
    if form == "pytorch":
        monkeypatch.setenv("XUSHI_OPS", "pytorch")
    model = tiny_model()
    set_compute(model, ObjectiveConfig(**(SETTINGS | {"dtype": dtype})))
    with Operations() as seen:
        pretraining_loss(model, batches(0), LossWeights(0.3, 1e-4)).total.backward()
    assert {"index_add_", "embedding_dense_backward", *products} <= seen.names, (
        "the backward pass was not watched"
    )
    x, index = torch.zeros(2, requires_grad=True), torch.tensor([0, 0])
    with pytest.raises(AssertionError, match="accumulating"), Operations():
        x[index].sum().backward()


def test_ten_steps_on_two_threads_give_the_same_bits(batches, tiny_model) -> None:
    """Rows enough that two threads share the work."""
    many = Batch(*map(torch.cat, zip(*(batches(step) for step in range(40)), strict=True)))
    before, first = torch.get_num_threads(), None
    torch.set_num_threads(2)
    try:
        for _ in range(10):
            model: Deepseek = tiny_model()
            pretraining_loss(model, many, LossWeights(0.3, 1e-4)).total.backward()
            now = [p.grad for p in model.parameters()]
            first = first or now
            assert all(torch.equal(a, b) for a, b in zip(now, first, strict=True))
    finally:
        torch.set_num_threads(before)


WARMED = {**SETTINGS, "batch_tokens": 40, "indexer_warmup_steps": 4}


@pytest.mark.parametrize("config", [MODELS["v3.2"], MODELS["v4"]], ids=["v3.2", "v4"])
def test_the_other_kinds_resume_to_the_same_bits(
    config: ModelConfig, batches, tracking, tmp_path
) -> None:
    """Killed within the indexers' warm-up and after it."""

    def go(directory: Path, end: int | None = None) -> dict[str, bytes]:
        def watched(step: int) -> Batch:
            if step == end:
                raise Killed
            return batches(step)

        train(
            "test",
            Deepseek(config).initialise(5),
            PretrainConfig(**WARMED),
            numbered(watched),
            directory,
            tracking,
        )
        return files(directory)

    whole = go(tmp_path / "whole")
    for end in (3, 5):
        with pytest.raises(Killed):
            go(tmp_path / "killed", end)
    assert go(tmp_path / "killed") == whole


@pytest.mark.parametrize("config", [MODELS["v3.2"], MODELS["v4"]], ids=["v3.2", "v4"])
def test_the_warm_up_trains_the_indexers_alone(
    config: ModelConfig, batches, tracking, tmp_path
) -> None:
    before, model = Deepseek(config).initialise(5).state_dict(), Deepseek(config).initialise(5)
    settings = WARMED | {"steps": 12, "indexer_warmup_steps": 12, "optimizer": "adamw"}
    train(
        "test",
        model,
        PretrainConfig(**settings),
        numbered(lambda _: batches(0)),
        tmp_path,
        tracking,
    )
    moved = {
        name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert moved == {name for name in before if ".indexer." in name}  # no router's bias either
    losses = [value for _, value in tracking.series("test", "indexer_loss")]
    assert losses[-1] < 0.7 * losses[0]


def test_ctrl_c_while_the_last_step_is_saved_is_not_forgotten(
    run, tmp_path, monkeypatch, tracking
) -> None:
    """Everything is saved, and still the run ends there instead of beginning the next stage."""
    real = CheckpointWriter.save

    def save(self: CheckpointWriter, checkpoint: Checkpoint) -> None:
        real(self, checkpoint)
        if checkpoint.step == STEPS:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(CheckpointWriter, "save", save)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a")
    checkpoint = latest_checkpoint(tmp_path / "a")
    assert checkpoint is not None and checkpoint.step == STEPS


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_each_rate_is_that_of_its_own_parameters(
    tiny_model, batches, tracking, tmp_path, optimizer: str
) -> None:
    """With either optimizer `learning_rate` moves the matrices in the first step and
    `adamw_learning_rate` moves the rest; left out, it is the same rate.
    """

    def after_a_step(rate: float, rest: float | None) -> dict[str, Tensor]:
        model = tiny_model()
        own = {"steps": 1, "optimizer": optimizer, "learning_rate": rate}
        config = ObjectiveConfig(**(SETTINGS | own | {"adamw_learning_rate": rest}))
        train("test", model, config, numbered(batches), tmp_path / f"{rate} {rest}", tracking)
        return {name: parameter.detach() for name, parameter in model.named_parameters()}

    def moved(other: dict[str, Tensor]) -> set[str]:
        return {name for name in start if not torch.equal(start[name], other[name])}

    start = after_a_step(0.02, None)
    matrices = {name for name in start if is_matrix(name, start[name])}
    assert moved(after_a_step(0.02, 0.02)) == set()
    assert moved(after_a_step(0.02, 0.05)) == set(start) - matrices != set()
    assert moved(after_a_step(0.05, 0.02)) == matrices != set()
    assert moved(after_a_step(0.05, None)) == set(start)


@pytest.mark.parametrize("config", [MODELS["v3.2"], MODELS["v4"]], ids=["v3.2", "v4"])
def test_the_optimizer_restarts_after_the_warm_up(config: ModelConfig, batches) -> None:
    """Its step count and its moments begin again with the first step that trains everything."""
    settings = PretrainConfig(**(WARMED | {"optimizer": "adamw"}))
    state = TrainingState.begin(Deepseek(config).initialise(5), settings)
    for step in range(4):
        training_step(state, settings, step, batches(step))
    assert state.optimizer.steps == 4
    indexer = next(
        name for name in state.optimizer.state if name.startswith("mean.") and ".indexer." in name
    )
    old = state.optimizer.state[indexer].clone()
    seen = []
    real = state.optimizer.step

    def step_watched(*arguments: float) -> None:
        seen.append((state.optimizer.steps, state.optimizer.state[indexer].clone()))
        real(*arguments)

    state.optimizer.step = step_watched
    training_step(state, settings, 4, batches(4))
    training_step(state, settings, 5, batches(5))
    assert [steps for steps, _ in seen] == [0, 1] and state.optimizer.steps == 2
    assert old.any() and not seen[0][1].any() and seen[1][1].any()


def test_a_step_that_says_stop_ends_training_for_good(
    tiny_model, batches, tracking, tmp_path, capsys
) -> None:
    """Saved at once, said once, and after a new start not one step more."""

    class Ending(LanguageModelStep):
        def take(self, state, number, phase):
            result = super().take(state, number, phase)
            return replace(result, stop="nothing is left" if number == 1 else "")

    for figures in (True, False):
        step = Ending(ObjectiveConfig(**SETTINGS), numbered(batches))
        found = Training("test", tiny_model(), step, tmp_path, tracking).run()
        assert bool(found) == figures
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.step == 2
    assert [event["details"] for event in tracking.events("test", "stopped_early")] == [
        {"step": 2, "reason": "nothing is left"}
    ]
    assert capsys.readouterr().err.count("nothing is left; stopped after 2 steps") == 1


class Counted(LanguageModelStep):
    """Trains on the batch that a number of its own names, not the cursor."""

    calls = 0

    def take(self, state, number, phase):
        self.calls += 1
        state.cursor = 10 + self.calls
        return super().take(state, number, phase)

    def saved(self):
        return {"calls": self.calls}

    def load(self, saved):
        self.calls = saved.get("calls", 0)


def test_what_a_step_saves_decides_after_a_kill(tiny_model, batches, tracking, tmp_path) -> None:
    def go(directory: Path, end: int | None = None) -> dict[str, bytes]:
        def watched(cursor: int, count: int) -> Batch:
            if cursor == end:
                raise Killed
            return batches(cursor)

        step = Counted(ObjectiveConfig(**SETTINGS), Data(watched))
        Training("test", tiny_model(), step, directory, tracking).run()
        return files(directory)

    whole = go(tmp_path / "whole")
    with pytest.raises(Killed):
        go(tmp_path / "killed", 15)
    assert go(tmp_path / "killed") == whole


def test_a_step_is_replayed_from_the_checkpoint_before(
    tiny_model, batches, tracking, tmp_path
) -> None:
    def made() -> Training:
        config = ObjectiveConfig(**(SETTINGS | {"keep_checkpoints": 9}))
        step = LanguageModelStep(config, numbered(batches))
        return Training("test", tiny_model(), step, tmp_path, tracking)

    made().run()
    losses = dict(tracking.series("test", "loss"))
    for number, start in ((2, 0), (3, 0), (6, 3), (7, 6)):
        replayed = made().replay(tracking.batches("test", number))
        assert replayed.trained_from == start
        assert replayed.result.figures["loss"] == losses[number]
    records = tracking.batches("test", 6)
    with pytest.raises(XushiError, match="not the one that was trained on"):
        made().replay([*records[:-1], records[-1]._replace(hash="another")])
    with pytest.raises(XushiError, match="has nothing before step 5"):
        made().replay(records[4:])
