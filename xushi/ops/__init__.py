"""Floor 1: the tensor operations that model code calls.

Each op has a plain PyTorch reference that defines it, and a fast form that must equal it; both are PyTorch today, so
nothing is compiled. `XUSHI_OPS=reference` in the environment forces the references.
"""

from xushi.ops.attention import causal_attention, causal_attention_reference
from xushi.ops.dispatch import use_reference
from xushi.ops.experts import routed_experts, routed_experts_reference
from xushi.ops.loss import (
    cross_entropy,
    cross_entropy_reference,
    token_log_probabilities,
    token_log_probabilities_reference,
)
from xushi.ops.norm import rms_norm
from xushi.ops.rope import apply_rope, rope_frequencies
from xushi.ops.router import RouterChoice, sigmoid_router, softmax_router

__all__ = [
    "RouterChoice", "apply_rope", "causal_attention", "causal_attention_reference", "cross_entropy",
    "cross_entropy_reference", "rms_norm", "rope_frequencies", "routed_experts", "routed_experts_reference",
    "sigmoid_router", "softmax_router", "token_log_probabilities", "token_log_probabilities_reference", "use_reference",
]
