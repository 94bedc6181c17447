"""The training parts of a recipe: pretraining and supervised fine-tuning."""

from typing import Literal

from pydantic import Field, model_validator

from xushi.base.config import StrictConfig
from xushi.train.guards import OnSpike
from xushi.train.schedule import cosine, is_late, ramp, warmup_stable_decay

MOST_STEPS = 100_000_000  # more than any training takes
MOST_TOKENS = 1_000_000_000_000


class OptimizationConfig(StrictConfig):
    """What every kind of training shares. Sizes are in tokens and steps, never in seconds."""

    steps: int = Field(ge=1, le=MOST_STEPS)
    learning_rate: float = Field(gt=0, le=1000)
    # With Muon: the rate of embedding, head and norms, which AdamW updates; None: learning_rate.
    adamw_learning_rate: float | None = Field(None, gt=0, le=1000)
    optimizer: Literal["muon", "adamw"] = "muon"
    # Muon's five steps, or DeepSeek-V4's ten.
    newton_schulz: Literal["quintic", "hybrid"] = "quintic"
    muon_per_head: bool = False  # orthogonalise query, key and value projections head by head
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    epsilon: float = Field(1e-8, gt=0, le=1)  # AdamW's; gradients far below it hardly move a weight
    weight_decay: float = Field(0.1, ge=0, le=1000)
    gradient_clip: float = Field(1.0, gt=0, le=1e9)
    warmup_steps: int = Field(0, ge=0, le=MOST_STEPS)
    schedule: Literal["wsd", "cosine"] = "wsd"  # warm-up, stable, decay; or warm-up, half a cosine
    decay_fraction: float = Field(0.0, ge=0, le=1)  # wsd: the last part of the steps
    final_rate: float = Field(0.0, ge=0, le=1)  # where the rate ends, as a part of the peak
    bias_speed: float = Field(1e-3, ge=0, le=100)  # the router bias's gamma, per optimizer step
    # In the last `bias_late_fraction` of the steps; V3's last 500 of 14,800 billion tokens had 0.
    bias_speed_late: float | None = Field(None, ge=0, le=100)
    bias_late_fraction: float = Field(0.0, ge=0, le=1)
    on_spike: OnSpike = "warn"  # what is done when the loss jumps
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    # "keep": a layer keeps what its backward pass needs. "recompute": it keeps its input and runs
    # again, which takes less memory and more time and gives the same bits. A dry run tells both.
    activations: Literal["keep", "recompute"] = "keep"
    checkpoint_every: int = Field(100, ge=1, le=MOST_STEPS)
    # How many of the newest are kept; with 1, a damaged newest checkpoint starts the stage over.
    keep_checkpoints: int = Field(2, ge=1, le=MOST_STEPS)
    keep_every: int = Field(0, ge=0, le=MOST_STEPS)  # steps between others that stay; 0: none

    @model_validator(mode="after")
    def _consistent_steps(self) -> "OptimizationConfig":
        if self.schedule == "cosine" and (self.decay_fraction or self.warmup_steps >= self.steps):
            raise ValueError(
                'schedule = "cosine" has no decay_fraction, and more steps than warmup_steps'
            )
        if self.keep_every % self.checkpoint_every:
            raise ValueError(
                f"keep_every={self.keep_every} is not a multiple of "
                f"checkpoint_every={self.checkpoint_every}"
            )
        return self

    def rate_at(self, step: int) -> float:
        """The factor on the learning rates at `step` (from 0)."""
        if self.schedule == "cosine":
            return cosine(step, self.steps, self.warmup_steps, self.final_rate)
        return warmup_stable_decay(
            step, self.steps, self.warmup_steps, self.decay_fraction, self.final_rate
        )

    def bias_speed_at(self, step: int) -> float:
        """The router bias's gamma at `step`."""
        late = self.bias_speed_late is not None and is_late(
            step, self.steps, self.bias_late_fraction
        )
        return (self.bias_speed_late or 0.0) if late else self.bias_speed


class LayoutConfig(StrictConfig):
    """How a run is spread over processes, a grid of `pipeline` x `data`.

    `data` processes share each batch (None: as many as were started allow). `pipeline` stages share
    the layers. Groups of `expert` of the `data` processes share the experts.
    """

    data: int | None = Field(None, ge=1, le=1_000_000)
    pipeline: int = Field(1, ge=1, le=10_000)
    expert: int = Field(1, ge=1, le=1_000_000)
    # Training may continue with this many processes after others were lost; None: only with all.
    fewest: int | None = Field(None, ge=1, le=1_000_000)


class ObjectiveConfig(OptimizationConfig):
    """What training on text adds: the weights of `pretraining_loss`."""

    mtp_weight: float = Field(0.3, ge=0, le=1000)
    # In the last `mtp_late_fraction` of the steps; V3's last 4.8 of 14.8 trillion tokens had 0.1.
    mtp_weight_late: float | None = Field(None, ge=0, le=1000)
    mtp_late_fraction: float = Field(0.0, ge=0, le=1)
    balance_weight: float = Field(1e-4, ge=0, le=1000)  # the sequence-wise loss's alpha
    # Of the loss of V3.2's and V4's indexers; 0 leaves them as they are.
    indexer_weight: float = Field(1.0, ge=0, le=1000)
    # The largest attention score a head may have before it is scaled down; K2 had 100.
    qk_clip: float | None = Field(None, gt=0, le=1e9)
    allow_unbalanced: bool = False  # train a mixture with neither bias nor balance loss

    @model_validator(mode="after")
    def _balanced(self) -> "ObjectiveConfig":
        if self.balance_weight == 0 and self.bias_speed == 0 and not self.allow_unbalanced:
            raise ValueError(
                "balance_weight and bias_speed are both 0, so a mixture would train unbalanced; "
                "set allow_unbalanced = true if that is wanted"
            )
        return self

    def trains_indexers_alone(self, step: int) -> bool:
        """Whether `step` (from 0) trains the indexers alone, as pretraining's first steps may."""
        return False

    def mtp_weight_at(self, step: int) -> float:
        """The weight of the MTP losses at `step` (from 0)."""
        late = self.mtp_weight_late is not None and is_late(
            step, self.steps, self.mtp_late_fraction
        )
        return (self.mtp_weight_late or 0.0) if late else self.mtp_weight


class PretrainConfig(ObjectiveConfig):
    """`batch_tokens` per optimizer step, a multiple of the sequence length."""

    batch_tokens: int = Field(ge=1, le=MOST_TOKENS)
    # The first step takes `batch_tokens_first`; the batch grows over `batch_ramp_steps` steps.
    batch_tokens_first: int | None = Field(None, ge=1, le=MOST_TOKENS)
    batch_ramp_steps: int = Field(0, ge=0, le=1_000_000)
    # The first steps train the indexers alone, against dense attention.
    indexer_warmup_steps: int = Field(0, ge=0, le=MOST_STEPS)
    # Steps between measurements on `evaluate_tokens` of the held-out text.
    evaluate_every: int = Field(200, ge=1, le=MOST_STEPS)
    evaluate_tokens: int = Field(16384, ge=1, le=MOST_TOKENS)

    @model_validator(mode="after")
    def _consistent_ramp(self) -> "PretrainConfig":
        if (self.batch_tokens_first is None) != (self.batch_ramp_steps == 0):
            raise ValueError(
                "a ramp of the batch needs both batch_tokens_first and batch_ramp_steps above 0"
            )
        if self.batch_tokens_first is not None and self.batch_tokens_first > self.batch_tokens:
            raise ValueError("batch_tokens_first must be at most batch_tokens")
        return self

    def trains_indexers_alone(self, step: int) -> bool:
        """Whether `step` (from 0) belongs to the indexers' warm-up."""
        return step < self.indexer_warmup_steps

    def rows_at(self, step: int, length: int) -> int:
        """The rows of `length` tokens that `step` (from 0) takes."""
        rows = self.batch_tokens // length
        return ramp(
            step,
            self.batch_ramp_steps,
            (self.batch_tokens_first or self.batch_tokens) // length,
            rows,
        )

    def tokens(self, length: int) -> int:
        """What all steps take together, in rows of `length`."""
        growing = min(self.steps, self.batch_ramp_steps)
        rows = sum(self.rows_at(step, length) for step in range(growing))
        return length * (rows + (self.steps - growing) * (self.batch_tokens // length))


class SFTConfig(ObjectiveConfig):
    """Supervised fine-tuning on the environment's demonstrations, `batch_examples` per optimizer
    step.
    """

    batch_examples: int = Field(ge=1, le=100_000_000)
    # The share of demonstrations that show their working; the others are bare answers.
    thinking_share: float = Field(0.2, ge=0, le=1)
    # The share of demonstrations that follow another one in a conversation. Of these the same share
    # follows two, and so on, as long as the conversation fits into `sequence_length`.
    follow_up_share: float = Field(0.3, ge=0, lt=1)
    # Demonstrations are packed into sequences of this many tokens.
    sequence_length: int = Field(128, ge=1, le=10_000_000)
