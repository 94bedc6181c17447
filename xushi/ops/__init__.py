"""Tensor operations: what the model code calls, in the fastest form that the hardware allows.

Each op has a plain PyTorch reference that defines it. Many also have a faster PyTorch form, and on
a CPU a compiled C++ form (`ops.native`); both must equal the reference within rounding. Compiled
code is optional. `XUSHI_OPS=reference` in the environment forces the references,
`XUSHI_OPS=pytorch` forces the PyTorch forms.
"""

from xushi.ops.attention import (
    causal_attention,
    causal_attention_reference,
    expand_heads,
    largest_scores,
    latent_attention,
    rotated_attention,
)
from xushi.ops.compressor import compress_windows
from xushi.ops.dispatch import use_reference
from xushi.ops.experts import routed_experts, routed_experts_reference
from xushi.ops.hyper_connections import collapse_streams, expand_streams, sinkhorn, stream_weights
from xushi.ops.indexer import (
    attention_shares,
    best_keys,
    index_divergence,
    index_scores,
    index_scores_reference,
)
from xushi.ops.linear import linear, swiglu, swiglu_reference
from xushi.ops.loss import (
    cross_entropy,
    cross_entropy_reference,
    token_log_probabilities,
    token_log_probabilities_reference,
)
from xushi.ops.norm import rms_norm, rms_norm_reference
from xushi.ops.rope import apply_rope, rope_frequencies, rotate_tail
from xushi.ops.router import RouterChoice, sigmoid_router, softmax_router, sqrt_softplus_router
from xushi.ops.shared_attention import (
    MaskedKeys,
    entry_shares,
    shared_attention,
    windowed_attention,
    windowed_attention_reference,
)

__all__ = [
    "MaskedKeys",
    "RouterChoice",
    "apply_rope",
    "attention_shares",
    "best_keys",
    "causal_attention",
    "causal_attention_reference",
    "collapse_streams",
    "compress_windows",
    "cross_entropy",
    "cross_entropy_reference",
    "entry_shares",
    "expand_heads",
    "expand_streams",
    "index_divergence",
    "index_scores",
    "index_scores_reference",
    "largest_scores",
    "latent_attention",
    "linear",
    "rms_norm",
    "rms_norm_reference",
    "rope_frequencies",
    "rotate_tail",
    "rotated_attention",
    "routed_experts",
    "routed_experts_reference",
    "shared_attention",
    "sigmoid_router",
    "sinkhorn",
    "softmax_router",
    "sqrt_softplus_router",
    "stream_weights",
    "swiglu",
    "swiglu_reference",
    "token_log_probabilities",
    "token_log_probabilities_reference",
    "use_reference",
    "windowed_attention",
    "windowed_attention_reference",
]
