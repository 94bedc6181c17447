"""What the processes of test_processes run: `python -m tests.rl.processes PLACE`, started as
torchrun starts them.

Each process writes what it holds at the end to PLACE; the test puts the parts together. Not a test
by itself.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

from xushi.base.tracking import Tracking
from xushi.model import Deepseek
from xushi.rl import ReinforcementStep, RLConfig
from xushi.rl.policy import policy_loss
from xushi.rl.rollout import Rollout, Sampler, share_of
from xushi.tokenizer import Tokenizer
from xushi.tokenizer.config import SMALLEST_VOCABULARY
from xushi.train import Layout, LayoutConfig, Training, join
from xushi.train.layout import local
from xushi.train.sharding import shard

from .conftest import CONFIG, SHAPE, EvenDigit

STEPS = 4
KILLED = 40  # steps of the run that is killed
VARIANTS = ("answers", "tokens")


def config_of(loss_mean: str, steps: int = STEPS) -> RLConfig:
    """With routers whose biases move by the whole batch's loads, and the demo's epsilon."""
    changes = {"loss_mean": loss_mean, "bias_speed": 0.01, "epsilon": 0.01, "steps": steps}
    return CONFIG.model_copy(update=changes)


def load(place: Path) -> Deepseek:
    model = Deepseek(SHAPE)
    model.load_state_dict(torch.load(place / "weights.pt", weights_only=True))
    return model


def tokenizer() -> Tokenizer:
    return Tokenizer.train(["0123456789"], SMALLEST_VOCABULARY)


def off_policy_rollout(place: Path) -> Rollout:
    """The whole step's episodes as one process samples them, with old probabilities moved so that
    ratios differ and some are clipped.
    """
    rollout = Sampler(tokenizer(), EvenDigit(), CONFIG, 7).rollout(load(place), 0, range(6))
    stream = torch.Generator().manual_seed(5)
    for branch in rollout.branches:
        moved = torch.randn(len(branch.logprobs), generator=stream) * 0.3
        branch.sampling_logprobs[:] = (torch.tensor(branch.logprobs) + moved).tolist()
    return rollout


def part_of(rollout: Rollout, share: range) -> Rollout:
    rows = slice(share.start, share.stop)
    samples = rollout.rewards_PS.shape[1]
    episodes = rollout.episodes[share.start * samples : share.stop * samples]
    return Rollout(episodes, rollout.rewards_PS[rows], rollout.counted_PS[rows])


def gradients(
    place: Path, layout: Layout, loss_mean: str, exact: bool
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """This process's parts of the gradient of the whole rollout, and the figures."""
    model = load(place)
    model = shard(model.double() if exact else model, layout)
    rollout = part_of(off_policy_rollout(place), share_of(6, layout.rank, layout.data))
    policy = policy_loss(model, config_of(loss_mean), tokenizer().pad_id, rollout, layout)
    policy.total.backward()
    found = {n: local(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    return found, policy.figures | {f"load {n}": float(v[0]) for n, v in policy.loads.items()}


def trained(
    place: Path, layout: Layout, directory: Path, config: RLConfig
) -> tuple[Training, list[dict[str, float]]]:
    """A training to its end, and what it tracked."""
    tracked = []

    class Remembering(Tracking):
        def metrics(self, stage, step, values):
            tracked.append(dict(values))

    step = ReinforcementStep(tokenizer(), EvenDigit(), config, 3)
    training = Training("rl", load(place), step, directory, Remembering(None), layout)
    training.run()
    return training, tracked


def main(place: Path) -> None:
    torch.set_num_threads(1)
    task = torch.load(place / "task.pt", weights_only=True)
    layout = join(LayoutConfig(expert=task["expert"]), SHAPE)
    if "kill" in task:
        config = config_of("tokens", KILLED).model_copy(update={"checkpoint_every": 2})
        trained(place, layout, place / "run", config)
        return
    results: dict[str, object] = {}
    for name in VARIANTS:
        for exact in (False, True):
            results[f"{name} {exact}"] = gradients(place, layout, name, exact)
        training, tracked = trained(place, layout, place / name, config_of(name))
        results[f"{name} figures"] = tracked
        results["boxes"] = {n: vars(training.layout.box(n)) for n in training.layout.shapes}
    torch.save(results, place / f"found-{layout.team.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
