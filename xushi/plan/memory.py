"""How much memory training takes: an estimate for one process and the plain model, exact only in
weights and states.

Not in it: the interpreter and its libraries (some hundred MiB), the data pipeline, what the
allocator keeps unused.
"""

from dataclasses import dataclass
from typing import Literal

from xushi.model.config import ModelConfig
from xushi.plan.activations import activation_bytes
from xushi.plan.layers import LAYER_PARTS, hyper_head, layer_parts, mtp_joint
from xushi.plan.parameters import count_parameters

# What xushi.ops does, which this floor may know by number only: rows of logits that the chunked
# loss holds at a time.
LOGIT_ROWS = 512


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes at the top of a training step, just before the backward pass frees its first
    activation.
    """

    weights: int  # float32, and the copies in the compute dtype
    gradients: int
    optimizer: int
    activations: int  # what autograd keeps; an estimate
    logits: int  # one chunk of logits and the head's gradients that the loss has ready; an estimate

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def training_memory_bytes(
    config: ModelConfig,
    batch_tokens: int,
    sequence_length: int,
    optimizer: Literal["muon", "adamw"] = "muon",
    compute: Literal["fp32", "bf16"] = "fp32",
    mtp: bool = True,
    indexer_loss: bool = True,
    recompute: bool = False,
) -> TrainingMemory:
    """Estimate for `batch_tokens` tokens in rows of `sequence_length`, one forward and backward
    pass.

    Weights, gradients and states are float32 (4 bytes): AdamW keeps two values per parameter, Muon
    one for every matrix but embedding and head, and AdamW's two for the rest. In bf16 the products'
    inputs and the weights' copies take 2 bytes; the residual stays float32. `indexer_loss`:
    indexers, where there are any, are trained. `recompute`: layers keep their inputs and are run
    again in the backward pass.
    """
    count = count_parameters(config)
    parameters = count.total_with_mtp if mtp else count.total
    states = 2 * parameters - (_matrices(config, mtp) if optimizer == "muon" else 0)
    depths = config.num_nextn_predict_layers if mtp else 0
    head = config.vocab_size * config.hidden_size
    chunk = min(LOGIT_ROWS, batch_tokens) * config.vocab_size
    return TrainingMemory(
        weights=4 * parameters + (2 * parameters if compute == "bf16" else 0),
        gradients=4 * parameters,
        optimizer=4 * states,
        activations=batch_tokens
        * activation_bytes(
            config, sequence_length, 2 if compute == "bf16" else 4, depths, indexer_loss, recompute
        ),
        logits=2 * 4 * chunk + (1 + depths) * 4 * head,
    )


def _matrices(config: ModelConfig, mtp: bool) -> int:
    """Parameters that multiply something, without embedding and head."""
    depths = config.num_nextn_predict_layers if mtp else 0
    held = hyper_head(config).products + depths * mtp_joint(config).products
    for layer in range(config.num_hidden_layers + depths):
        parts = layer_parts(config, layer)
        held += sum(parts[part].products for part in LAYER_PARTS)
    return held
