"""The training parts of a recipe: pretraining and supervised fine-tuning."""

from typing import Literal

from pydantic import model_validator

from xushi.base.config import StrictConfig
from xushi.train.guards import OnSpike
from xushi.train.schedule import cosine, is_late, ramp, warmup_stable_decay


class OptimizationConfig(StrictConfig):
    """What every kind of training shares. Sizes are in tokens and steps, never in seconds."""

    steps: int
    learning_rate: float
    adamw_learning_rate: float | None = (
        None  # beside Muon, for embedding, head and norms; None: the same rate
    )
    optimizer: Literal["muon", "adamw"] = "muon"
    newton_schulz: Literal["quintic", "hybrid"] = (
        "quintic"  # of muon: five steps, or DeepSeek-V4's ten
    )
    muon_per_head: bool = False  # orthogonalise what makes queries, keys and values head by head
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8  # of AdamW: what has gradients far below it hardly moves
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    warmup_steps: int = 0
    schedule: Literal["wsd", "cosine"] = (
        "wsd"  # warm-up, stable, decay; or warm-up and half a cosine
    )
    decay_fraction: float = (
        0.0  # of wsd: the last part of the steps, in which the learning rate falls
    )
    final_rate: float = 0.0  # where it falls to, as a part of the peak
    bias_speed: float = 1e-3  # the router bias's gamma, per optimizer step
    bias_speed_late: float | None = None  # V3's last 500 of 14,800 billion tokens had 0
    bias_late_fraction: float = 0.0  # the last part of the steps, in which that holds
    on_spike: OnSpike = "warn"  # what is done when the loss jumps
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    # What the backward pass needs of a layer is kept, or its input alone and the layer is run
    # again: less memory for more time, and the same bits. A dry run says what either costs.
    activations: Literal["keep", "recompute"] = "keep"
    checkpoint_every: int = 100
    keep_checkpoints: int = (
        2  # the newest so many; with 1, a damaged newest one starts the stage over
    )
    keep_every: int = 0  # beside them, those of every so many steps; 0: none

    @model_validator(mode="after")
    def _sound(self) -> "OptimizationConfig":
        for name in ("steps", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        for name in ("learning_rate", "adamw_learning_rate", "epsilon", "gradient_clip"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0")
        for name in ("warmup_steps", "weight_decay", "bias_speed", "bias_speed_late", "keep_every"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must not be negative")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1")
        for name in ("decay_fraction", "final_rate", "bias_late_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1")
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
    """`data` processes share each batch (None: as many as were started allow); groups of `expert`
    of them the experts. Each of them is `pipeline` processes, which share the layers.
    """

    data: int | None = None
    pipeline: int = 1
    expert: int = 1
    fewest: int | None = (
        # with so many processes training may go on where others were lost; None: with all only
        None
    )

    @model_validator(mode="after")
    def _sound(self) -> "LayoutConfig":
        for name in ("data", "pipeline", "expert", "fewest"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1")
        return self


class ObjectiveConfig(OptimizationConfig):
    """What training on text adds: the weights of `pretraining_loss`."""

    mtp_weight: float = 0.3
    mtp_weight_late: float | None = None  # V3's last 4.8 of 14.8 trillion tokens had 0.1
    mtp_late_fraction: float = 0.0  # the last part of the steps, in which that holds
    balance_weight: float = 1e-4  # the sequence-wise loss's alpha
    indexer_weight: float = 1.0  # the loss of V3.2's and V4's indexers; 0 leaves them as they are
    qk_clip: float | None = (
        None  # the largest attention score a head may have before it is scaled down; K2 had 100
    )
    allow_unbalanced: bool = False  # train a mixture with neither bias nor balance loss

    @model_validator(mode="after")
    def _balanced(self) -> "ObjectiveConfig":
        for name in ("mtp_weight", "mtp_weight_late", "balance_weight", "indexer_weight"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must not be negative")
        if self.qk_clip is not None and self.qk_clip <= 0:
            raise ValueError("qk_clip must be above 0")
        if not 0 <= self.mtp_late_fraction <= 1:
            raise ValueError("mtp_late_fraction must lie between 0 and 1")
        if self.balance_weight == 0 and self.bias_speed == 0 and not self.allow_unbalanced:
            raise ValueError(
                "balance_weight and bias_speed are both 0, so a mixture would train unbalanced; "
                "set allow_unbalanced = true if that is wanted"
            )
        return self

    def trains_indexers_alone(self, step: int) -> bool:
        """Whether `step` (from 0) belongs to the indexers' warm-up; there is one in pretraining only."""
        return False

    def mtp_weight_at(self, step: int) -> float:
        """The weight of the MTP losses at `step` (from 0)."""
        late = self.mtp_weight_late is not None and is_late(
            step, self.steps, self.mtp_late_fraction
        )
        return (self.mtp_weight_late or 0.0) if late else self.mtp_weight


class PretrainConfig(ObjectiveConfig):
    """`batch_tokens` per optimizer step, a multiple of the sequence length."""

    batch_tokens: int
    batch_tokens_first: int | None = None  # what the first step takes, to grow from
    batch_ramp_steps: int = 0  # over so many steps
    indexer_warmup_steps: int = (
        0  # at first the indexers alone are trained, against dense attention
    )
    evaluate_every: int = (
        200  # steps between measurements on `evaluate_tokens` of the held-out text
    )
    evaluate_tokens: int = 16384

    @model_validator(mode="after")
    def _sizes(self) -> "PretrainConfig":
        for name in ("batch_tokens", "evaluate_every", "evaluate_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if (self.batch_tokens_first is None) != (
            self.batch_ramp_steps == 0
        ) or self.batch_ramp_steps < 0:
            raise ValueError(
                "a ramp of the batch needs both batch_tokens_first and batch_ramp_steps above 0"
            )
        if (
            self.batch_tokens_first is not None
            and not 0 < self.batch_tokens_first <= self.batch_tokens
        ):
            raise ValueError("batch_tokens_first must be at least 1 and at most batch_tokens")
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
        return length * sum(self.rows_at(step, length) for step in range(self.steps))


class SFTConfig(ObjectiveConfig):
    """Supervised fine-tuning on the environment's demonstrations, `batch_examples` per optimizer
    step.
    """

    batch_examples: int
    thinking_share: float = (
        0.2  # of the demonstrations that are worked, the rest being bare answers
    )
    sequence_length: int = 128  # demonstrations are packed into sequences of this many tokens

    @model_validator(mode="after")
    def _share(self) -> "SFTConfig":
        for name in ("batch_examples", "sequence_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if not 0 <= self.thinking_share <= 1:
            raise ValueError("thinking_share must lie between 0 and 1")
        return self
