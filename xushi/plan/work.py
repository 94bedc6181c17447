"""Arithmetic and cache per token: FLOPs of matrix products, two per multiplication and addition.

Elementwise work (norms, activations, softmax, rotation) is left out, as in published figures. How long the arithmetic
takes on some machine is not here.
"""

from xushi.model.config import ModelConfig
from xushi.plan.parameters import attention_matrices, expert_parameters


def kv_cache_bytes_per_token(config: ModelConfig, bytes_per_value: int = 2) -> int:
    """Bytes that one token of context keeps in the latent cache of all layers (V2, arXiv:2405.04434, table 1)."""
    return config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim) * bytes_per_value


def train_flops_per_token(config: ModelConfig, context: int, mtp: bool = True) -> float:
    """FLOPs to train on one token in documents of `context` tokens, forward and backward (three times the forward).

    Attention is causal: a token sees half of its document on average. With `mtp`, each MTP layer adds its own decoder
    layer, joining projection and use of the head. Nothing is recomputed.
    """
    layers = list(range(config.num_hidden_layers))
    head = config.vocab_size * config.hidden_size
    multiplied = head + sum(_layer_matrices(config, layer) for layer in layers)
    if mtp:
        extra = [config.num_hidden_layers + depth for depth in range(config.num_nextn_predict_layers)]
        multiplied += sum(_layer_matrices(config, layer) + 2 * config.hidden_size**2 + head for layer in extra)
        layers += extra
    width = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    attention = len(layers) * width * context / 2
    return 6.0 * (multiplied + attention)


def decode_flops_per_token(config: ModelConfig, context: int) -> float:
    """FLOPs to generate one token after `context` cached ones, MLA working on the latents themselves.

    The key and value expansions are applied to the query and the output instead of to every cached token (V2,
    section 2.1.2): the same weights once per token, and scores and sums over kv_lora_rank values per head and position.
    """
    multiplied = config.vocab_size * config.hidden_size + sum(
        _layer_matrices(config, layer) for layer in range(config.num_hidden_layers))
    width = config.num_attention_heads * (2 * config.kv_lora_rank + config.qk_rope_head_dim)
    return 2.0 * (multiplied + config.num_hidden_layers * width * context)


def _layer_matrices(config: ModelConfig, layer: int) -> int:
    """Weights of decoder layer `layer` that multiply one token."""
    hidden = config.hidden_size
    if not config.is_moe(layer):
        return attention_matrices(config) + 3 * hidden * config.intermediate_size
    experts = (config.num_experts_per_tok + config.n_shared_experts) * expert_parameters(config)
    return attention_matrices(config) + config.n_routed_experts * hidden + experts
