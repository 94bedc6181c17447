"""How much memory training takes: an estimate for one process and the plain model, exact only in weights and states.

Not in it: the interpreter and its libraries (some hundred MiB), the data pipeline, what the allocator keeps unused.
"""

from dataclasses import dataclass
from typing import Literal

from xushi.model.config import ModelConfig
from xushi.plan.parameters import count_parameters

# What xushi.ops does, which this floor may know by number only: rows of logits that the chunked loss holds at a time,
# queries in a block of attention, and the longest sequence whose attention weights are kept for the backward pass.
LOGIT_ROWS, QUERY_BLOCK, KEEP_WEIGHTS = 512, 128, 256


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes at the top of a training step, just before the backward pass frees its first activation."""

    weights: int  # float32, and the copies in the compute dtype
    gradients: int
    optimizer: int
    activations: int  # what autograd keeps; an estimate
    logits: int  # one chunk of logits and the head's gradients that the loss has ready; an estimate

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def training_memory_bytes(config: ModelConfig, batch_tokens: int, sequence_length: int,
                          optimizer: Literal["muon", "adamw"] = "muon", compute: Literal["fp32", "bf16"] = "fp32",
                          mtp: bool = True) -> TrainingMemory:
    """Estimate for `batch_tokens` tokens in rows of `sequence_length`, one forward and backward pass.

    Weights, gradients and states are float32 (4 bytes): AdamW keeps two values per parameter, Muon one for every
    matrix but embedding and head, and AdamW's two for the rest. In bf16 the products' inputs and the weights' copies
    take 2 bytes; the residual stream stays float32.
    """
    count = count_parameters(config)
    parameters = count.total_with_mtp if mtp else count.total
    matrices = parameters - count.embedding - count.head - _vectors(config, mtp)
    states = 2 * parameters - (matrices if optimizer == "muon" else 0)
    width = 2 if compute == "bf16" else 4
    depths = config.num_nextn_predict_layers if mtp else 0
    layers = config.num_hidden_layers + depths
    activations = sum(_layer_bytes(config, layer, width, sequence_length) for layer in range(layers)) * batch_tokens
    # Each prediction keeps its final norm's input and output; a depth also joins two normed inputs.
    activations += batch_tokens * config.hidden_size * ((1 + depths) * (2 * 4 + 2 * width) + depths * 4 * (4 + width))
    head = config.vocab_size * config.hidden_size
    chunk = min(LOGIT_ROWS, batch_tokens) * config.vocab_size
    return TrainingMemory(
        weights=4 * parameters + (2 * parameters if compute == "bf16" else 0),
        gradients=4 * parameters,
        optimizer=4 * states,
        activations=activations,
        logits=2 * 4 * chunk + (1 + depths) * 4 * head)


def _vectors(config: ModelConfig, mtp: bool) -> int:
    """Norms and biases, which no optimizer treats as matrices."""
    depths = config.num_nextn_predict_layers if mtp else 0
    layers = config.num_hidden_layers + depths
    per_layer = 2 * config.hidden_size + config.kv_lora_rank + (config.q_lora_rank or 0)
    if config.attention_bias:
        per_layer += (config.kv_lora_rank + config.qk_rope_head_dim + config.hidden_size + (config.q_lora_rank or 0))
    return layers * per_layer + config.hidden_size * (1 + 3 * depths)


def _kept_weights(length: int) -> int:
    """Attention weights that a query keeps for the backward pass, per head, on average: its block's keys."""
    if length > KEEP_WEIGHTS:
        return 0
    ends = [min(start + QUERY_BLOCK, length) for start in range(0, length, QUERY_BLOCK)]
    return sum((end - start) * end for start, end in zip([0, *ends], ends, strict=False)) // length


def _layer_bytes(config: ModelConfig, layer: int, width: int, length: int) -> int:
    """Bytes that autograd keeps per token for one decoder layer whose products compute in `width`-byte values."""
    heads, hidden, latent = config.num_attention_heads, config.hidden_size, config.kv_lora_rank
    # Around every norm: its input and its normalised value, then what it hands to the products that follow.
    norms = 2 * hidden * 2 * 4 + 2 * hidden * width
    query = 3 * (config.q_lora_rank or 0)
    attention = query + 3 * latent + config.qk_rope_head_dim + heads * (
        2 * config.qk_head_dim + 3 * config.v_head_dim + _kept_weights(length))
    if not config.is_moe(layer):
        return norms + width * (attention + 4 * config.intermediate_size)
    expert = config.moe_intermediate_size
    routed = config.num_experts_per_tok * (hidden + 2 * expert)
    shared = 4 * expert * config.n_shared_experts
    router = 4 * (2 * config.n_routed_experts + 6 * config.num_experts_per_tok)
    return norms + router + width * (attention + routed + shared)
