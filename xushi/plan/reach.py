"""What a token's attention meets: how many keys, at what cost, and what of them the cache keeps."""

from dataclasses import dataclass
from fractions import Fraction

from xushi.model.config import ModelConfig


@dataclass(frozen=True)
class Reach:
    """Keys that every query of a layer meets, each at `width` multiply-adds.

    With `rate` 0 they are the tokens up to itself, otherwise the entries of all complete windows of
    `rate` tokens; of either the last or the chosen `limit`, if there is one.
    """

    width: int
    rate: int = 0
    limit: int | None = None

    def at(self, tokens: int) -> int:
        """Keys that the last of `tokens` tokens meets."""
        there = tokens // self.rate if self.rate else tokens
        return there if self.limit is None else min(there, self.limit)

    def mean(self, context: int) -> float:
        """Keys that a token of a document of `context` tokens meets on average, in closed form.

        Of tokens a query's own counts half, so that dense attention takes half of the square, as
        published figures do.
        """
        if not self.rate:
            full = self.at(context)
            return full - full * full / (2 * context)
        # From the `rising`-th token on the limit holds; before, there is one entry more with every
        # `rate` tokens.
        rising = context if self.limit is None else min(context, self.rate * self.limit)
        entries, rest = divmod(rising, self.rate)
        total = self.rate * (entries * (entries - 1) // 2) + entries * (rest + 1)
        return (total + (context - rising) * (self.limit or 0)) / context


def attention_reaches(config: ModelConfig, layer: int, absorbed: bool) -> list[Reach]:
    """The keys of layer `layer`'s attention: a score and a weighted sum in every head.

    MLA expands its latents into keys and values in training; `absorbed`, as it decodes, it works on
    the latents themselves (V2, arXiv:2405.04434, section 2.1.2). V4's one key is its value too and
    is never expanded.
    """
    heads = config.num_attention_heads
    if not config.is_v4:
        width = heads * (
            2 * config.kv_lora_rank + config.qk_rope_head_dim
            if absorbed
            else config.qk_head_dim + config.v_head_dim
        )
        return [Reach(width, limit=config.index_topk if config.has_indexer else None)]
    width, rate = 2 * heads * config.head_dim, config.compress_ratio(layer)
    window = Reach(width, limit=config.sliding_window)
    if rate == 0:
        return [window]
    return [
        window,
        Reach(width, rate, config.index_topk if rate == config.compress_rate_csa else None),
    ]


def index_reach(config: ModelConfig, layer: int) -> Reach | None:
    """What layer `layer`'s indexer scores, if it has one: every token in V3.2, every entry in V4's
    sparse layers.
    """
    width = config.index_n_heads * config.index_head_dim
    if not config.is_v4:
        return Reach(width) if config.has_indexer else None
    rate = config.compress_ratio(layer)
    return Reach(width, rate) if rate == config.compress_rate_csa else None


def kv_cache_bytes(config: ModelConfig, context: int, bytes_per_value: int = 2) -> int:
    """Bytes that `context` tokens keep in the cache of all layers.

    MLA's latent and rotated key (V2, table 1) and V3.2's index key of every token. In V4 the keys
    of the last window's tokens, and of every complete compression window an entry, with its index
    key in a sparse layer; what the tokens of an unfinished window will give to their entry is not
    in it.
    """
    values = 0
    for layer in range(config.num_hidden_layers):
        values += sum(count * width for count, width in _kept(config, layer, context))
    return values * bytes_per_value


def kv_cache_bytes_per_token(config: ModelConfig, bytes_per_value: int = 2) -> float:
    """Bytes by which one further token of a long context makes the cache grow, on average; an int
    where it is one.

    In V2, V3 and V3.2 every token costs as much. In V4 only compressed entries grow, by a token's
    share of one; the sliding window, which is full by then, is left out.
    """
    values = Fraction()
    for layer in range(config.num_hidden_layers):
        rate = config.compress_ratio(layer) if config.is_v4 else 1
        values += Fraction(_entry_width(config, layer), rate) if rate else 0
    exact = values * bytes_per_value
    return int(exact) if exact.denominator == 1 else float(exact)


def _kept(config: ModelConfig, layer: int, context: int) -> list[tuple[int, int]]:
    """What layer `layer` keeps: (how many, values each)."""
    if not config.is_v4:
        return [(context, _entry_width(config, layer))]
    rate = config.compress_ratio(layer)
    window = (min(context, config.sliding_window), config.head_dim)
    return [window, (context // rate, _entry_width(config, layer))] if rate else [window]


def _entry_width(config: ModelConfig, layer: int) -> int:
    """Values of what stays in layer `layer` for good: a token's, in V4 a compressed entry's."""
    if not config.is_v4:
        return (
            config.kv_lora_rank
            + config.qk_rope_head_dim
            + (config.index_head_dim if config.has_indexer else 0)
        )
    sparse = config.compress_ratio(layer) == config.compress_rate_csa
    return config.head_dim + (config.index_head_dim if sparse else 0)
