"""The step of reinforcement learning: sample with the model that is trained, score, one update.

On one process sampling runs through the very model object that learns. On several each process
samples its share of the tasks with a whole copy of the weights. So the only difference between
the sampler's probabilities and the trainer's is that of decoding and whole-sequence form; it is
measured at every step (`logprob_difference`).
"""

from collections.abc import Callable
from typing import Any

from xushi.base.errors import BadInput
from xushi.data import joined_hash, row_hashes
from xushi.envs import Environment
from xushi.model import Batch, Deepseek, ModelConfig
from xushi.plan import train_flops_per_token
from xushi.rl.config import RLConfig
from xushi.rl.policy import PolicyLoss, policy_loss
from xushi.rl.rollout import Sampler, share_of
from xushi.rl.whole import WholeCopy
from xushi.tokenizer import Tokenizer
from xushi.train import Layout, Step, StepLoss, StepResult, TrainingState, guarded_update

# A rollout whose groups all agree has no gradient; so many in a row mean that the task or the
# verifier is at fault.
LIMIT_WITHOUT_SIGNAL = 50
# The guard judges 1 - mean reward. A policy that is always right has a deviation of 0 and would
# jump at its first mistake, so a spike is six times this at least: 12 answers of 100.
SMALLEST_DEVIATION = 0.02


class ReinforcementStep(Step):
    """GRPO on an environment's tasks; an item of the cursor is a task.

    `seed` is that of sampling. Samples are a function of the weights, the seed and the cursor.
    """

    config: RLConfig

    def __init__(
        self, tokenizer: Tokenizer, environment: Environment, config: RLConfig, seed: int
    ) -> None:
        self.config = config
        self._sampler = Sampler(tokenizer, environment, config, seed)
        self._pad_id = tokenizer.pad_id
        self._copy: WholeCopy | None = None
        self._without_signal = 0

    def take(self, state: TrainingState, number: int, phase: Callable[[str], None]) -> StepResult:
        """See `Step`. Raises `BadInput` where no process can hold a share of the tasks."""
        layout, config = state.layout, self.config
        check_layout(self.config, layout)
        phase("step")
        model = self._whole_model(state)
        phase("batch")
        share = share_of(config.prompts, layout.rank, layout.data)
        rollout = self._sampler.rollout(model, state.cursor, share)
        phase("step")
        policy = policy_loss(state.model, config, self._pad_id, rollout, layout)
        loss = _step_loss(policy, config)
        updated, problem = guarded_update(state, config, number, loss)
        figures = policy.figures | updated
        figures["flops"] = _flops(state.model.config, config, figures["tokens"])
        return StepResult(
            figures,
            problem,
            policy.batch,
            _hash(policy.batch, layout),
            config.prompts,
            note=f"reward {figures['reward']:.2f}  length {figures['length']:.1f}  "
            f"truncated {figures['truncated']:.0%}",
            stop=self._hopeless(figures),
        )

    def saved(self) -> dict[str, Any]:
        """How many steps in a row had nothing to learn from."""
        return {"without_signal": self._without_signal}

    def load(self, saved: dict[str, Any]) -> None:
        """See `Step`."""
        self._without_signal = saved.get("without_signal", 0)

    def _whole_model(self, state: TrainingState) -> Deepseek:
        """The model to sample with."""
        if state.layout.data == 1:
            return state.model
        self._copy = self._copy or WholeCopy(state)
        return self._copy.refresh(state)

    def _hopeless(self, figures: dict[str, float]) -> str:
        """Why to end here: for too long no group had both right and wrong answers; else ""."""
        flat = figures["with_signal"] == 0 and figures["reward"] < 0.5
        self._without_signal = self._without_signal + 1 if flat else 0
        if self._without_signal < LIMIT_WITHOUT_SIGNAL:
            return ""
        advice = "more sft.steps may help"
        if figures["verifier_errors"]:
            advice = "the verifier gave 'error' in the last step: check the environment"
        return (
            f"no group of the last {LIMIT_WITHOUT_SIGNAL} steps had both right and wrong answers, "
            f"so there is nothing to learn from ({advice})"
        )


def _flops(model: ModelConfig, config: RLConfig, tokens: float) -> float:
    """FLOPs of a step whose episodes have `tokens` tokens together, questions included.

    Learning is a forward and a backward pass, and sampling is another forward pass.
    """
    context = round(tokens / (config.prompts * config.samples))
    return tokens * train_flops_per_token(model, context, mtp=False) * 4 / 3


def check_layout(config: RLConfig, layout: Layout) -> None:
    """`BadInput` if reinforcement learning cannot run on these processes."""
    if layout.pipeline > 1:
        raise BadInput(
            f"rl needs whole layers to sample, and layout.pipeline={layout.pipeline} cuts the "
            "model",
            "set layout.pipeline=1, or run rl on one process",
        )
    if config.prompts < layout.data:
        raise BadInput(
            f"rl.prompts={config.prompts} does not give each of layout.data={layout.data} "
            "processes a task",
            f"set rl.prompts={layout.data}, or start fewer processes",
        )


def _step_loss(policy: PolicyLoss, config: RLConfig) -> StepLoss:
    """The guard judges 1 - mean reward: a policy's own loss is about zero, well or badly
    trained.

    Where the verifier failed on every answer there is no reward, and nothing is judged.
    """
    figures = policy.figures
    failed = figures["verifier_errors"] == config.prompts * config.samples
    return StepLoss(
        policy.total,
        value=figures["loss"],
        judged=None if failed else 1.0 - figures["reward"],
        loads=policy.loads,
        smallest_deviation=SMALLEST_DEVIATION,
    )


def _hash(batch: Batch, layout: Layout) -> str:
    """The hash of all processes' rows, in their order."""
    return joined_hash([row for part in layout.team.gather(row_hashes(batch)) for row in part])
