"""The parameters of one decoder layer, by part and by use.

Not here: buffers, which no gradient updates (the routers' correction biases, the hash layers'
tables of experts).
"""

from dataclasses import dataclass

from xushi.model.config import ModelConfig


@dataclass(frozen=True)
class Weights:
    """Parameters of one part, by use.

    `products` are matrices that multiply every token once (routed experts: every token that chose
    them). `tables` are matrices that are only added. `vectors` are norms, biases, sinks and scales.
    """

    products: int = 0
    tables: int = 0
    vectors: int = 0

    @property
    def total(self) -> int:
        """The sum of all three."""
        return self.products + self.tables + self.vectors

    def __add__(self, other: "Weights") -> "Weights":
        return Weights(
            self.products + other.products, self.tables + other.tables, self.vectors + other.vectors
        )


# The parts of a decoder layer, in display order.
LAYER_PARTS = (
    "attention",
    "indexers",
    "compressors",
    "hyper_connections",
    "dense_mlp",
    "routers",
    "routed_experts",
    "shared_experts",
    "norms",
)


def layer_parts(config: ModelConfig, layer: int) -> dict[str, Weights]:
    """The parameters of decoder layer `layer` by part. MTP layers are numbered after the trunk's;
    their joining parts are in `mtp_joint`.
    """
    moe = config.is_moe(layer)
    expert = expert_parameters(config)
    hidden = config.hidden_size
    return {
        "attention": _shared_key_attention(config) if config.is_v4 else _latent_attention(config),
        "indexers": _indexer(config, layer),
        "compressors": (
            _compressor(config, config.compress_ratio(layer), config.head_dim)
            if config.is_v4
            else Weights()
        ),
        "hyper_connections": _hyper_connection(config) + _hyper_connection(config)
        if config.is_v4
        else Weights(),
        "dense_mlp": Weights(0 if moe else 3 * hidden * config.intermediate_size),
        "routers": Weights(config.n_routed_experts * hidden if moe else 0),
        "routed_experts": Weights(config.n_routed_experts * expert if moe else 0),
        "shared_experts": Weights(config.n_shared_experts * expert if moe else 0),
        "norms": Weights(vectors=2 * hidden),
    }


def expert_parameters(config: ModelConfig) -> int:
    """Parameters of one expert: gate, up and down."""
    return 3 * config.hidden_size * config.moe_intermediate_size


def index_query_weights(config: ModelConfig) -> int:
    """An indexer's weights for queries and head weights. They are unused while the context has no
    more keys than the indexer may choose.
    """
    return config.index_n_heads * (
        (config.q_lora_rank or 0) * config.index_head_dim + config.hidden_size
    )


def hyper_head(config: ModelConfig) -> Weights:
    """V4's module that collapses the streams into one, at the end of the trunk and of each MTP
    layer; empty for other models.
    """
    if not config.is_v4:
        return Weights()
    streams = config.hc_mult
    return Weights(streams * streams * config.hidden_size, vectors=streams + 1)


def mtp_joint(config: ModelConfig) -> Weights:
    """What an MTP layer has in addition to its decoder layer: the matrices that join its inputs,
    three norms and, in V4, its own hyper-head.
    """
    hidden = config.hidden_size
    return Weights(2 * hidden * hidden, vectors=3 * hidden) + hyper_head(config)


def _latent_attention(config: ModelConfig) -> Weights:
    """MLA (V2, arXiv:2405.04434, section 2.1) with its latents' norms and, with `attention_bias`,
    biases.
    """
    heads = config.num_attention_heads
    hidden = config.hidden_size
    latent = config.kv_lora_rank
    query = config.q_lora_rank or 0
    queries = heads * config.qk_head_dim
    products = query * (hidden + queries) if query else hidden * queries
    products += (
        hidden * (latent + config.qk_rope_head_dim)
        + latent * heads * (config.qk_nope_head_dim + config.v_head_dim)
        + heads * config.v_head_dim * hidden
    )
    # In the published code both down projections and the output have a bias; a query projection
    # without latent has none.
    biases = query + latent + config.qk_rope_head_dim + hidden if config.attention_bias else 0
    return Weights(products, vectors=query + latent + biases)


def _shared_key_attention(config: ModelConfig) -> Weights:
    """V4's attention (DeepSeek-V4, section 2.3): query latent, one key per token, grouped output, a
    sink for every head.
    """
    heads = config.num_attention_heads
    hidden = config.hidden_size
    width = config.head_dim
    query = config.q_lora_rank or 0
    output = config.o_lora_rank * (heads * width + config.o_groups * hidden)
    return Weights(
        query * (hidden + heads * width) + hidden * width + output, vectors=query + width + heads
    )


def _indexer(config: ModelConfig, layer: int) -> Weights:
    """V3.2's lightning indexer (arXiv:2512.02556, section 2.1), or that of V4's sparse layers,
    which has a compressor of its own for its keys.
    """
    if config.is_v4:
        if config.compress_ratio(layer) != config.compress_rate_csa:
            return Weights()
        return Weights(index_query_weights(config)) + _compressor(
            config, config.compress_rate_csa, config.index_head_dim
        )
    if not config.has_indexer:
        return Weights()
    key = Weights(config.hidden_size * config.index_head_dim, vectors=2 * config.index_head_dim)
    return Weights(index_query_weights(config)) + key


def _compressor(config: ModelConfig, rate: int, width: int) -> Weights:
    """V4's compressor (sections 2.3.1 and 2.3.2): values and gates (two series of each in CSA), a
    bias for each position in the window, and a norm.
    """
    if rate == 0:
        return Weights()
    values = (2 if rate == config.compress_rate_csa else 1) * width
    return Weights(2 * config.hidden_size * values, tables=rate * values, vectors=width)


def _hyper_connection(config: ModelConfig) -> Weights:
    """One block's weights for reading, writing and mixing the streams (mHC, arXiv:2512.24880)."""
    parts = (2 + config.hc_mult) * config.hc_mult
    return Weights(parts * config.hc_mult * config.hidden_size, vectors=parts + 3)
