"""What training stages read from the tracking store: means at the end, times, the control's length."""

import math
from pathlib import Path

import pytest
import torch

from xushi.base.errors import Failed
from xushi.base.tracking import Tracking
from xushi.model import Deepseek
from xushi.plan import train_flops_per_token
from xushi.run.place import RunPlace
from xushi.run.recipe import Recipe, load_recipe
from xushi.run.stages import Costs, keys_of
from xushi.run.stages.control import Control
from xushi.run.stages.conversations import conversation
from xushi.run.stages.rl import RL
from xushi.run.stages.training import end_mean, fill, training_seconds
from xushi.tokenizer import Tokenizer, chat_examples, encode_chat
from xushi.train import Layout, latest_checkpoint
from xushi.train.checkpoint import Checkpoint, save_checkpoint

from ..tiny import TINY
from .conftest import MINIATURE


@pytest.fixture
def place(tmp_path: Path):
    tracking = Tracking(tmp_path / "tracking.sqlite")
    yield RunPlace(tmp_path, tracking)
    tracking.close()


def write(tracking: Tracking, stage: str, name: str, values: list[float]) -> None:
    for step, value in enumerate(values, 1):
        tracking.metrics(stage, step, {name: value})


@pytest.mark.parametrize(
    ("values", "mean"),
    [
        ([*range(100, 80, -1)], 81.5),  # the last two of twenty
        ([5.0, 3.0, 1.0], 1.0),  # one at least
        ([9.0] * 19 + [math.nan], 9.0),
        ([math.nan], None),
        ([], None),
    ],
)
def test_the_mean_at_the_end_is_that_of_the_last_tenth(place, values, mean) -> None:
    write(place.tracking, "pretrain", "loss", values)
    assert end_mean(place.tracking, "pretrain", "loss") == mean


def sft_step_flops(recipe: Recipe) -> float:
    """What a step of fine-tuning costs, counted from the demonstrations themselves."""
    tokenizer = Tokenizer.train([], recipe.sized_model.vocab_size)
    environment = recipe.environment.make()
    lengths = []
    for index in range(160 * 64, 161 * 64):  # those after fine-tuning's
        before, own = conversation(
            environment,
            recipe.sft,
            index,
            lambda messages: len(encode_chat(tokenizer, messages, generation_prompt=False)),
        )
        examples = chat_examples(tokenizer, [*before, *own], (), len(before))
        lengths.append(sum(len(ids) - 1 for ids, _ in examples))
    assert len(lengths) == 64
    context = round(sum(lengths) / 64)
    return sum(lengths) * train_flops_per_token(recipe.sized_model, context)


def test_the_control_takes_as_many_flops_as_rl_took(place) -> None:
    recipe = load_recipe(MINIATURE, ["tokenizer.vocab_size=263"])
    Tokenizer.train([], 263).save(place.path("tokenizer"))
    step = sft_step_flops(recipe)
    write(place.tracking, "rl", "flops", [step * 1.55] * 24)
    for clock in (0.1, 77.0):  # the clock does not matter
        write(place.tracking, "rl", "seconds", [clock] * 24)
        write(place.tracking, "sft", "seconds", [clock * 3] * 160)
        place.tracking.begin("control", f"key {clock}")
        assert Control(recipe).steps(place) == 37  # 24 times 1.55
    write(place.tracking, "rl", "flops", [step * 9] * 24)
    assert Control(recipe).steps(place) == 37  # decided once: a resumed run does the same work
    place.tracking.begin("control", "another key")
    assert Control(recipe).steps(place) == 216  # another attempt decides anew


def test_the_seconds_of_a_stage_are_those_of_its_steps(place) -> None:
    write(place.tracking, "rl", "seconds", [0.775] * 24)
    assert training_seconds(place.tracking, "rl") == pytest.approx(18.6)
    assert training_seconds(place.tracking, "sft") == 0


def test_without_a_record_the_control_is_as_long_as_fine_tuning(place) -> None:
    assert Control(load_recipe(MINIATURE, [])).steps(place) == 160


@pytest.mark.parametrize("stage, name", [(RL, "rl"), (Control, "control")])
def test_without_a_store_the_steps_are_those_of_the_last_checkpoint(stage, name, place) -> None:
    """Not those of the recipe: training may have ended early, or have had a length of its own."""
    save_checkpoint(place.checkpoints(name), Checkpoint(7, {"model": {"a": torch.ones(1)}}, {}))
    found = stage(load_recipe(MINIATURE, [])).results(place).flat()
    assert found[f"{name}.steps"] == 7


def test_the_control_is_a_choice() -> None:
    names = [stage.name for stage in load_recipe(MINIATURE, []).run_stages()]
    assert "control" in names
    off = load_recipe(MINIATURE, ["evaluate.control=false"])
    assert [stage.name for stage in off.run_stages()] == [n for n in names if n != "control"]
    demo = MINIATURE.parent.parent / "recipes" / "demo.toml"
    assert "control" not in [stage.name for stage in load_recipe(demo, []).run_stages()]
    assert "control" in [
        stage.name for stage in load_recipe(demo, ["evaluate.control=true"]).run_stages()
    ]
    # Turning it on does not train anything else again.
    one, other = (keys_of(recipe.run_stages(), {}) for recipe in (off, load_recipe(MINIATURE, [])))
    assert [name for name in one if one[name] != other[name]] == ["evaluate", "export"]


def test_the_control_goes_on_with_demonstrations_that_were_not_seen() -> None:
    control = Control(load_recipe(MINIATURE, []))
    assert control.first == 160 * 64
    assert control.start == "sft" and not control.main


def test_rl_runs_on_the_first_process_alone_where_layers_are_spread() -> None:
    stages = {stage.name: stage for stage in load_recipe(MINIATURE, []).run_stages()}
    assert stages["rl"].together(Layout(data=2)) and not stages["rl"].together(Layout(pipeline=2))
    for name in ("pretrain", "sft", "control"):
        assert stages[name].together(Layout(pipeline=2))
    for name in ("data", "tokenizer", "evaluate", "export"):
        assert not stages[name].together(Layout(data=2))


def test_an_estimate_grows_with_what_it_counts() -> None:
    """Pretraining's is exact in tokens, those measured on included; that of RL counts every
    answer.
    """
    costs = Costs(1e-3, 1e-4, 1.0, 2.0, 3.0, 10_000, 50_000_000)
    stages = {stage.name: stage for stage in load_recipe(MINIATURE, []).run_stages()}
    # 200 steps, 2,048 held-out tokens every 30 of them and at the end
    pretrain = 200 * 1024 * 1e-3 + 7 * 2048 * 1e-4
    assert stages["pretrain"].seconds(costs) == pytest.approx(pretrain)
    dividing = load_recipe(MINIATURE, ["pretrain.evaluate_every=50"]).run_stages()
    pretrain = 200 * 1024 * 1e-3 + 4 * 2048 * 1e-4
    assert {s.name: s for s in dividing}["pretrain"].seconds(costs) == pytest.approx(pretrain)
    doubled = load_recipe(MINIATURE, ["rl.samples=16", "sft.steps=320"]).run_stages()
    more = {stage.name: stage for stage in doubled}
    for name in ("rl", "sft"):
        assert more[name].seconds(costs) == pytest.approx(2 * stages[name].seconds(costs)) != 0
    assert (stages["data"].seconds(costs), stages["tokenizer"].seconds(costs)) == (1.0, 2.0)
    assert stages["export"].seconds(costs) == pytest.approx(2 * (0.5 + 1.0))
    alone = load_recipe(MINIATURE, [], stages=["data", "tokenizer", "pretrain"])
    evaluate = {stage.name: stage for stage in alone.run_stages()}["evaluate"]
    assert evaluate.seconds(costs) == pytest.approx(10_000 * 1e-4 + 3.0)
    # greedy, forced, longer and 8 samples, before and after, and the control's greedy ones
    answers = (2 + 8) * 2 + 1 + 1
    tokens = (stages["evaluate"].seconds(costs) - 4.0) / (answers * 100 * 1e-3)
    assert tokens == pytest.approx(round(tokens)) and tokens > 5


def test_a_checkpoint_fills_the_model_it_belongs_to(tmp_path: Path) -> None:
    """Tensor by tensor; one of another model is refused by the name of a tensor."""
    model = Deepseek(TINY).initialise(1)
    tensors = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    save_checkpoint(tmp_path, Checkpoint(1, {"model": tensors}, {}))
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    fill(model, checkpoint)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in tensors.items())
    other = Deepseek(TINY.model_copy(update={"num_hidden_layers": 3}))
    with pytest.raises(Failed, match=r"another model's: model\.layers\.2\.eh_proj"):
        fill(other, checkpoint)
