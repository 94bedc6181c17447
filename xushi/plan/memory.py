"""An estimate of the memory that training takes in one process without a distributed layout.
Weights and optimizer states are exact.

Not included: the interpreter and its libraries (some hundred MiB), the data pipeline, and memory
that the allocator holds unused.
"""

from dataclasses import dataclass
from typing import Literal

from xushi.model.config import ModelConfig
from xushi.plan.activations import activation_bytes
from xushi.plan.layers import LAYER_PARTS, hyper_head, layer_parts, mtp_joint
from xushi.plan.parameters import count_parameters

# A copy of CHUNK in xushi.ops.loss, so that counting does not import torch: rows of logits that the
# loss holds at a time.
LOGIT_ROWS = 512


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes at the peak of a training step: at the start of the backward pass, before it frees any
    activation.
    """

    weights: int  # float32, and copies in the compute dtype
    gradients: int
    optimizer: int
    activations: int  # kept by autograd; an estimate
    logits: int  # one chunk of logits, and the head's gradients from the loss; an estimate

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
    """Estimate for one forward and backward pass of `batch_tokens` tokens in rows of
    `sequence_length`.

    Weights, gradients and optimizer states are float32 (4 bytes). AdamW keeps two values per
    parameter. Muon keeps one for every matrix but embedding and head, and AdamW's two for the other
    parameters. With `compute` bf16, the inputs of products and copies of the weights take 2 bytes
    per value; the residual stays float32. `indexer_loss`: indexers, if any, are trained.
    `recompute`: layers keep only their inputs and run again in the backward pass.
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
    """Parameters in matrices that multiply, without embedding and head: those that Muon updates."""
    depths = config.num_nextn_predict_layers if mtp else 0
    held = hyper_head(config).products + depths * mtp_joint(config).products
    for layer in range(config.num_hidden_layers + depths):
        parts = layer_parts(config, layer)
        held += sum(parts[part].products for part in LAYER_PARTS)
    return held
