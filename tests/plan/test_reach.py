"""The cache's size against the cache itself, an account token by token, and published figures."""

import pytest
import torch

from xushi.model import LatentCache, preset
from xushi.model.cache import slot_widths
from xushi.plan import kv_cache_bytes, kv_cache_bytes_per_token


@pytest.mark.parametrize("kind", ["deepseek_v2", "deepseek_v3", "deepseek_v32"])
def test_bytes_equal_what_the_cache_holds(kind, small_of):
    config = small_of(kind)
    cache = LatentCache(config, slots=10, dtype=torch.bfloat16)
    assert sum(layer.nbytes for layer in cache.layers) == 10 * kv_cache_bytes_per_token(config)
    assert kv_cache_bytes(config, 10) == 10 * kv_cache_bytes_per_token(config)
    assert kv_cache_bytes_per_token(config, 4) == 2 * kv_cache_bytes_per_token(config)


@pytest.mark.parametrize("context", [1, 3, 10, 11, 16, 63, 64])
def test_v4_keeps_a_window_and_entries(context, small_of):
    config = small_of("deepseek_v4")
    held = 0
    for layer in range(config.num_hidden_layers):
        for token in range(context):
            held += config.head_dim if token >= context - config.sliding_window else 0
            rate = config.compress_ratio(layer)
            held += slot_widths(config, layer)[1] if rate and (token + 1) % rate == 0 else 0
    assert kv_cache_bytes(config, context, bytes_per_value=1) == held


def test_a_further_token_of_v4_adds_its_share_of_entries(small_of):
    config = small_of("deepseek_v4")
    # The rates are 4 and 16, and the window of 10 is full.
    grown = kv_cache_bytes(config, 160) - kv_cache_bytes(config, 144)
    assert kv_cache_bytes_per_token(config) * 16 == grown
    assert isinstance(kv_cache_bytes_per_token(preset("deepseek-v4-flash")), int)
    odd = config.model_copy(update={"head_dim": 25})
    assert kv_cache_bytes_per_token(odd, 1) == (25 + 12) / 4 + 25 / 16


def test_published_figures():
    """V3's 70.272 KB (arXiv:2505.09343, table 1). V4-Flash computed by hand: 21 sparse layers with
    a key of 512 and an index key of 128 per four tokens; 20 heavily compressed layers with a key of
    512 per 128 tokens.
    """
    assert kv_cache_bytes_per_token(preset("deepseek-v3")) == 70_272
    assert kv_cache_bytes_per_token(preset("deepseek-v3.2")) == 70_272 + 61 * 128 * 2
    flash = preset("deepseek-v4-flash")
    assert (
        kv_cache_bytes_per_token(flash) == 21 * (512 + 128) * 2 // 4 + 20 * 512 * 2 // 128 == 6880
    )
    assert kv_cache_bytes(flash, 2**20) == 6880 * 2**20 + 43 * 128 * 512 * 2
