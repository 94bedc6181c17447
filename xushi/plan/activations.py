"""What autograd keeps of a forward pass for the backward pass, in bytes per token, part by part of
the model.

An estimate that follows the model as it is written, with `xushi.ops`' forms in PyTorch (the
compiled ones keep less); tests/plan/test_memory.py measures both and fails where they part. `width`
is the bytes of a value in the products' dtype; the residual and what norms and softmax compute take
4.
"""

from xushi.model.config import ModelConfig

# What xushi.ops.attention does, which this floor may know by number only: queries in a block, and
# the longest sequence whose attention weights are kept for the backward pass.
QUERY_BLOCK, KEEP_WEIGHTS = 128, 256
# A score of an indexer that learns: its log-softmax and its target in float32, and the mask of each
# of two steps.
KEPT_OF_A_SCORE = 4 + 4 + 1 + 1


def activation_bytes(
    config: ModelConfig,
    length: int,
    width: int,
    depths: int,
    indexer_loss: bool,
    recompute: bool = False,
) -> int:
    """Bytes per token of rows of `length` tokens, with `depths` MTP layers.

    With `recompute` a layer keeps its input and what it returns; in the backward pass there is all
    of one at a time.
    """
    hidden = config.hidden_size
    each = [
        _layer(config, layer, length, width, indexer_loss)
        for layer in range(config.num_hidden_layers + depths)
    ]
    kept = sum(each)
    if recompute:
        kept = len(each) * 4 * hidden * (config.hc_mult if config.is_v4 else 1) + max(each)
        # The balance loss has the routers' scores, their shares, and what they are a share of.
        kept += (
            sum(config.is_moe(layer) for layer in range(len(each))) * 10 * config.n_routed_experts
        )
    if config.is_v4:
        kept += (
            (1 + depths) * 2 * 4 * config.hc_mult * hidden
        )  # what each hyper-head reads, and its normalised value
        kept += depths * hidden * (4 + 4 + width + config.hc_mult * (4 + width))
    else:
        kept += depths * 4 * hidden * (4 + width)  # the two joined inputs, normed
    # Each prediction has its masks, and keeps its final norm's input and output.
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
    """Around a layer's two norms: input and normalised value, then what goes to the products that
    follow.
    """
    return 2 * config.hidden_size * (2 * 4 + width)


def _feed_forward(config: ModelConfig, layer: int, width: int) -> int:
    if not config.is_moe(layer):
        return width * 4 * config.intermediate_size
    expert = config.moe_intermediate_size
    routed = config.num_experts_per_tok * (config.hidden_size + 2 * expert)
    shared = (
        (6 if config.is_v4 else 4) * expert * config.n_shared_experts
    )  # V4 clamps gate and up, and keeps both
    router = 4 * (2 * config.n_routed_experts + 6 * config.num_experts_per_tok)
    router += (
        4 * config.hidden_size if width < 4 else 0
    )  # routers read float32, which is a copy of its own then
    return router + width * (routed + shared)


def _latent_attention(config: ModelConfig, length: int, width: int, indexer_loss: bool) -> int:
    heads, latent = config.num_attention_heads, config.kv_lora_rank
    kept = (4 + 2 * width) * ((config.q_lora_rank or 0) + latent) + width * (
        config.qk_rope_head_dim
        + heads * (2 * config.qk_head_dim + 3 * config.v_head_dim + _kept_weights(length))
    )
    if not config.has_indexer:
        return kept
    kept += length if length > config.index_topk else 0  # the mask of what was chosen
    if not indexer_loss:
        return kept
    query = config.index_n_heads * (width * config.index_head_dim + 4)
    return kept + query + config.index_head_dim * (4 + width) + KEPT_OF_A_SCORE * length


def _kept_weights(length: int) -> int:
    """Attention weights that a query keeps for the backward pass, per head, on average: its block's
    keys.
    """
    if length > KEEP_WEIGHTS:
        return 0
    ends = [min(start + QUERY_BLOCK, length) for start in range(0, length, QUERY_BLOCK)]
    return sum((end - start) * end for start, end in zip([0, *ends], ends, strict=False)) // length


def _shared_key_attention(
    config: ModelConfig, layer: int, length: int, width: int, indexer_loss: bool
) -> int:
    """V4's: no score is kept. The query latent and the key pass a norm each, every head's query
    another.
    """
    key, rate = config.head_dim, config.compress_ratio(layer)
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
        + KEPT_OF_A_SCORE * entries
    )


def _compressor(config: ModelConfig, rate: int, entry: int, width: int) -> int:
    """A window's values and the softmax of its gates, and the entry that they become around its
    norm.

    In CSA a token counts in two windows; in HCA once, but values are kept as they were gathered:
    gates and the window before beside them.
    """
    values, gates = (2, 2) if rate == config.compress_rate_csa else (4, 1)
    return entry * (width * values + 4 * gates) + entry * (2 * 4 + width) // rate


def _hyper_connection(config: ModelConfig, width: int) -> int:
    """The streams and their normalised value, what the block gave, the weights, and each half-step
    of Sinkhorn's.
    """
    streams, steps = config.hc_mult, 2 * config.hc_sinkhorn_iters
    weights = streams * streams + 6 * streams
    sinkhorn = (steps + 1) * streams * streams + (steps - 1) * streams
    return 4 * (2 * streams * config.hidden_size + weights + sinkhorn) + width * config.hidden_size


def _masks(config: ModelConfig, length: int) -> int:
    """What all layers share: which tokens of a packed row a query may see, and in V4 which entries
    of each rate.

    Where an indexer chooses tokens, every layer has its own instead.
    """
    if config.is_v4:
        return length + sum(length // rate for rate in set(config.compress_ratios or []) - {0})
    return 0 if config.has_indexer and length > config.index_topk else length
