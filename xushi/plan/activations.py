"""Activation memory: what autograd keeps of a forward pass for the backward pass, in bytes per
token, for each part of the model.

An estimate that follows the code of `xushi.model` with the PyTorch forms of `xushi.ops`; the
compiled forms keep less. tests/plan/test_memory.py compares it with measurements. `width` is the
size in bytes of a value in the compute dtype; the residual, norms and softmax use 4 bytes.
"""

from xushi.model.config import ModelConfig

# Copies of the constants in xushi.ops.attention, so that counting does not import torch: queries in
# a block, and the longest sequence whose attention weights are kept for the backward pass.
QUERY_BLOCK = 128
KEEP_WEIGHTS = 256
# For each score of an indexer in training: its log-softmax and its target in float32, and two
# masks.
KEPT_PER_SCORE = 4 + 4 + 1 + 1


def activation_bytes(
    config: ModelConfig,
    length: int,
    width: int,
    depths: int,
    indexer_loss: bool,
    recompute: bool = False,
) -> int:
    """Bytes per token in rows of `length` tokens, with `depths` MTP layers.

    With `recompute`, every layer keeps only its input and its results for the losses, and the
    backward pass holds all activations of one layer at a time.
    """
    hidden = config.hidden_size
    each = [
        _layer(config, layer, length, width, indexer_loss)
        for layer in range(config.num_hidden_layers + depths)
    ]
    kept = sum(each)
    if recompute:
        kept = len(each) * 4 * hidden * (config.hc_mult if config.is_v4 else 1) + max(each)
        # The balance loss keeps the routers' scores and the tensors of their normalisation.
        moe_layers = sum(config.is_moe(layer) for layer in range(len(each)))
        kept += moe_layers * 10 * config.n_routed_experts
    if config.is_v4:
        # each hyper-head's streams, normed too
        kept += (1 + depths) * 2 * 4 * config.hc_mult * hidden
        kept += depths * hidden * (4 + 4 + width + config.hc_mult * (4 + width))
    else:
        # the two inputs that an MTP layer joins, normed too
        kept += depths * 4 * hidden * (4 + width)
    # Trunk and each MTP depth have masks of their own and a final norm, which keeps input and
    # output.
    return kept + (1 + depths) * (_masks(config, length) + hidden * (2 * 4 + 2 * width))


def _layer(config: ModelConfig, layer: int, length: int, width: int, indexer_loss: bool) -> int:
    kept = _feed_forward(config, layer, width) + _norms(config, width)
    if config.is_v4:
        return (
            kept
            + _shared_key_attention(config, layer, length, width, indexer_loss)
            + 2 * _hyper_connection(config, width)
        )
    return kept + _latent_attention(config, length, width, indexer_loss)


def _norms(config: ModelConfig, width: int) -> int:
    """A layer's two norms: input, normalised value, and the output that the next products read."""
    return 2 * config.hidden_size * (2 * 4 + width)


def _feed_forward(config: ModelConfig, layer: int, width: int) -> int:
    if not config.is_moe(layer):
        return width * 4 * config.intermediate_size
    expert = config.moe_intermediate_size
    routed = config.num_experts_per_tok * (config.hidden_size + 2 * expert)
    # V4 clamps gate and up, and keeps the clamped values too.
    shared = (6 if config.is_v4 else 4) * expert * config.n_shared_experts
    router = 4 * (2 * config.n_routed_experts + 6 * config.num_experts_per_tok)
    # Routers read float32, so another compute dtype needs a copy.
    router += 4 * config.hidden_size if width < 4 else 0
    return router + width * (routed + shared)


def _latent_attention(config: ModelConfig, length: int, width: int, indexer_loss: bool) -> int:
    heads, latent = config.num_attention_heads, config.kv_lora_rank
    kept = (4 + 2 * width) * ((config.q_lora_rank or 0) + latent) + width * (
        config.qk_rope_head_dim
        + heads * (2 * config.qk_head_dim + 3 * config.v_head_dim + _kept_weights(length))
    )
    if not config.has_indexer:
        return kept
    kept += length if length > config.index_topk else 0  # the mask of chosen tokens
    if not indexer_loss:
        return kept
    query = config.index_n_heads * (width * config.index_head_dim + 4)
    return kept + query + config.index_head_dim * (4 + width) + KEPT_PER_SCORE * length


def _kept_weights(length: int) -> int:
    """Attention weights per query and head that are kept for the backward pass, on average: one for
    each key of the query's block.
    """
    if length > KEEP_WEIGHTS:
        return 0
    ends = [min(start + QUERY_BLOCK, length) for start in range(0, length, QUERY_BLOCK)]
    return sum((end - start) * end for start, end in zip([0, *ends], ends, strict=False)) // length


def _shared_key_attention(
    config: ModelConfig, layer: int, length: int, width: int, indexer_loss: bool
) -> int:
    """V4's attention, which keeps no scores. The query latent, the key and every head's query are
    each normed.
    """
    key = config.head_dim
    rate = config.compress_ratio(layer)
    latents = (2 * 4 + width) * ((config.q_lora_rank or 0) + key)
    values = (
        config.num_attention_heads * key * (4 + 2 * width)
        + width * config.o_groups * config.o_lora_rank
    )
    if rate == 0:
        return latents + values
    kept = latents + values + _compressor(config, rate, key, width)
    if rate == config.compress_rate_hca:
        return kept
    entries = length // rate
    kept += entries if entries > config.index_topk else 0
    if not indexer_loss:
        return kept
    query = config.index_n_heads * (width * config.index_head_dim + 4)
    return (
        kept
        + query
        + _compressor(config, rate, config.index_head_dim, width)
        + KEPT_PER_SCORE * entries
    )


def _compressor(config: ModelConfig, rate: int, entry: int, width: int) -> int:
    """The values of a window, the softmax of its gates, and its entry before and after the norm.

    In CSA a token belongs to two windows. In HCA it belongs to one, but the gathered tensor is kept
    whole, with gates and the window before.
    """
    values, gates = (2, 2) if rate == config.compress_rate_csa else (4, 1)
    return entry * (width * values + 4 * gates) + entry * (2 * 4 + width) // rate


def _hyper_connection(config: ModelConfig, width: int) -> int:
    """The streams, their normalised value, the block's output, the weights, and the result of every
    half-iteration of Sinkhorn's algorithm.
    """
    streams, steps = config.hc_mult, 2 * config.hc_sinkhorn_iters
    weights = streams * streams + 6 * streams
    sinkhorn = (steps + 1) * streams * streams + (steps - 1) * streams
    return 4 * (2 * streams * config.hidden_size + weights + sinkhorn) + width * config.hidden_size


def _masks(config: ModelConfig, length: int) -> int:
    """The masks that all layers share: the tokens that a query may attend to and, in V4, the
    entries of each rate. None if an indexer chooses tokens: every layer then has its own mask.
    """
    if config.is_v4:
        return length + sum(length // rate for rate in set(config.compress_ratios or []) - {0})
    return 0 if config.has_indexer and length > config.index_topk else length
