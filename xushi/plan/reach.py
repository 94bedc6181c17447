"""How many keys each token attends to, at what cost, and how much of them the cache keeps."""

from dataclasses import dataclass
from fractions import Fraction

from xushi.model.config import ModelConfig


@dataclass(frozen=True)
class Reach:
    """The keys that a query of a layer attends to. Each costs `width` multiply-adds.

    With `rate` 0 the keys are the tokens up to the query, otherwise the entries of all complete
    windows of `rate` tokens. `limit` is the most that a query attends to (a window's tokens, or an
    indexer's choice).
    """

    width: int
    rate: int = 0
    limit: int | None = None

    def at(self, tokens: int) -> int:
        """The number of keys for the last of `tokens` tokens."""
        available = tokens // self.rate if self.rate else tokens
        return available if self.limit is None else min(available, self.limit)

    def mean(self, context: int) -> float:
        """The number of keys averaged over the tokens of a document of `context` tokens, in closed
        form.

        A query's own token counts half, so that dense attention costs half of the square, as in
        published figures.
        """
        if not self.rate:
            full = self.at(context)
            return full - full * full / (2 * context)
        # Every `rate` tokens add one entry, up to token `rising`; from there the limit applies.
        rising = context if self.limit is None else min(context, self.rate * self.limit)
        entries, rest = divmod(rising, self.rate)
        total = self.rate * (entries * (entries - 1) // 2) + entries * (rest + 1)
        return (total + (context - rising) * (self.limit or 0)) / context


def attention_reaches(config: ModelConfig, layer: int, absorbed: bool) -> list[Reach]:
    """The keys of layer `layer`'s attention. A key costs a score and a weighted sum in every head.

    In training MLA expands its latents into keys and values; in decoding (`absorbed`) it works on
    the latents (V2, arXiv:2405.04434, section 2.1.2). In V4 the key is also the value and is never
    expanded.
    """
    heads = config.num_attention_heads
    if not config.is_v4:
        if absorbed:
            width = heads * (2 * config.kv_lora_rank + config.qk_rope_head_dim)
        else:
            width = heads * (config.qk_head_dim + config.v_head_dim)
        return [Reach(width, limit=config.index_topk if config.has_indexer else None)]
    width = 2 * heads * config.head_dim
    rate = config.compress_ratio(layer)
    window = Reach(width, limit=config.sliding_window)
    if rate == 0:
        return [window]
    chosen = config.index_topk if rate == config.compress_rate_csa else None
    return [window, Reach(width, rate, chosen)]


def index_reach(config: ModelConfig, layer: int) -> Reach | None:
    """The keys that layer `layer`'s indexer scores: all tokens in V3.2, all entries in V4's sparse
    layers. None if the layer has no indexer.
    """
    width = config.index_n_heads * config.index_head_dim
    if not config.is_v4:
        return Reach(width) if config.has_indexer else None
    rate = config.compress_ratio(layer)
    return Reach(width, rate) if rate == config.compress_rate_csa else None


def kv_cache_bytes(config: ModelConfig, context: int, bytes_per_value: int = 2) -> int:
    """Bytes that `context` tokens need in the cache of all layers.

    MLA: the latent and the rotated key of every token (V2, table 1), and V3.2's index key. V4: the
    keys of the last sliding window's tokens, and an entry for every complete compression window, in
    a sparse layer with its index key. Not counted: what an unfinished compression window keeps of
    its tokens.
    """
    values = 0
    for layer in range(config.num_hidden_layers):
        values += sum(count * width for count, width in _kept(config, layer, context))
    return values * bytes_per_value


def kv_cache_bytes_per_token(config: ModelConfig, bytes_per_value: int = 2) -> float:
    """Bytes that one more token of a long context adds to the cache, on average. An int if whole.

    In V2, V3 and V3.2 every token costs the same. In V4 it is a token's share of a compressed
    entry; the sliding window is full by then and does not grow.
    """
    values = Fraction()
    for layer in range(config.num_hidden_layers):
        rate = config.compress_ratio(layer) if config.is_v4 else 1
        values += Fraction(_entry_width(config, layer), rate) if rate else 0
    exact = values * bytes_per_value
    return int(exact) if exact.denominator == 1 else float(exact)


def _kept(config: ModelConfig, layer: int, context: int) -> list[tuple[int, int]]:
    """What layer `layer` caches: (how many entries, values per entry) for each kind of entry."""
    if not config.is_v4:
        return [(context, _entry_width(config, layer))]
    rate = config.compress_ratio(layer)
    window = (min(context, config.sliding_window), config.head_dim)
    return [window, (context // rate, _entry_width(config, layer))] if rate else [window]


def _entry_width(config: ModelConfig, layer: int) -> int:
    """Values per permanent entry of layer `layer`'s cache: of a token, or in V4 of a compressed
    entry.
    """
    if not config.is_v4:
        index_key = config.index_head_dim if config.has_indexer else 0
        return config.kv_lora_rank + config.qk_rope_head_dim + index_key
    sparse = config.compress_ratio(layer) == config.compress_rate_csa
    return config.head_dim + (config.index_head_dim if sparse else 0)
