"""The formulas for FLOPs against a count from a model's own parameters with a loop over positions,
against PyTorch's FLOP counter on the reference forms, and against published figures.
"""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from xushi.model import (
    Batch,
    Deepseek,
    LatentCache,
    LossWeights,
    ModelConfig,
    preset,
    pretraining_loss,
)
from xushi.plan import decode_flops_per_token, inspect_model, train_flops_per_token
from xushi.plan.reach import Reach

KINDS = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4")
# (model_type, changes to the small config)
VARIANTS = [
    ("deepseek_v2", {}), ("deepseek_v3", {}), ("deepseek_v3", {"q_lora_rank": None}),
    ("deepseek_v3", {"n_shared_experts": 2}), ("deepseek_v3", {"tie_word_embeddings": True}), ("deepseek_v32", {}),
    ("deepseek_v4", {}), ("deepseek_v4", {"compress_ratios": [4, 16, 16, 0], "hc_mult": 1})]  # fmt: skip


def index_layers(config: ModelConfig, layers: range) -> list[int]:
    if config.is_v4:
        return [
            layer for layer in layers if config.compress_ratio(layer) == config.compress_rate_csa
        ]
    return list(layers) if config.has_indexer else []


def weights(model: Deepseek, mtp: bool = False) -> float:
    """Multiply-adds of one token with weights: every matrix once; experts by the share that a token
    uses; V4's h_proj once per stream; embedding and the compressors' position biases not at all.
    """
    config, total = model.config, 0.0
    trunk = tuple(f"model.layers.{layer}." for layer in range(config.num_hidden_layers))
    for name, parameter in model.named_parameters():
        if (
            parameter.dim() < 2
            or "embed_tokens" in name
            or "lm_head" in name
            or name.endswith("position_bias")
        ):
            continue
        if name.startswith("model.layers.") and not name.startswith(trunk) and not mtp:
            continue
        routed = config.num_experts_per_tok / config.n_routed_experts if ".experts." in name else 1
        total += (
            parameter.numel()
            * routed
            * (config.hc_mult if name.endswith("h_proj.weight") and config.is_v4 else 1)
        )
    return total + model.head_VD.numel() * (1 + (config.num_nextn_predict_layers if mtp else 0))


def per_key(config: ModelConfig, absorbed: bool = False) -> tuple[int, int]:
    """Multiply-adds of one layer's attention, and of its indexer, for one key."""
    heads, index = config.num_attention_heads, config.index_n_heads * config.index_head_dim
    if config.is_v4:
        return heads * (config.head_dim + config.head_dim), index
    if absorbed:
        return heads * (
            (config.kv_lora_rank + config.qk_rope_head_dim) + config.kv_lora_rank
        ), index
    return heads * ((config.qk_nope_head_dim + config.qk_rope_head_dim) + config.v_head_dim), index


def met(config: ModelConfig, layer: int, tokens: int) -> tuple[int, int]:
    """Keys that the last of `tokens` tokens attends to, and keys that its indexer scores."""
    if not config.is_v4:
        return (min(tokens, config.index_topk), tokens) if config.has_indexer else (tokens, 0)
    rate, window = config.compress_ratio(layer), min(tokens, config.sliding_window)
    entries = sum(1 for closed in range(1, tokens + 1) if rate and closed % rate == 0)
    if rate == config.compress_rate_csa:
        return window + min(entries, config.index_topk), entries
    return window + entries, 0


def by_position(config: ModelConfig, layers: range, context: int) -> float:
    """Multiply-adds of attention and indexers for the average token, by a loop; a query's own token
    counts half.
    """
    keys, scored = per_key(config)
    total = 0.0
    for layer in layers:
        for tokens in range(1, context + 1):
            attended, seen = met(config, layer, tokens)
            total += keys * attended + scored * seen
            limit = (
                config.sliding_window
                if config.is_v4
                else config.index_topk
                if config.has_indexer
                else context
            )
            total -= keys / 2 if tokens <= limit else 0
            total -= scored / 2 if config.has_indexer and not config.is_v4 else 0
    return total / context


def all_pairs(config: ModelConfig, layers: range, length: int, target: bool = False) -> float:
    """The same for the reference forms, which also multiply what masks then hide. Includes what the
    formulas leave out: the sums over index heads and V4's mixing of streams. `target`: only the
    attention weights from which indexers learn.
    """
    keys, scored = per_key(config)
    indexed, total = index_layers(config, layers), 0.0
    for layer in layers:
        rate = config.compress_ratio(layer) if config.is_v4 else 0
        there = length + (length // rate if rate else 0)
        if target:
            width = config.num_attention_heads * (
                config.head_dim if config.is_v4 else config.qk_head_dim
            )
            total += width * there if layer in indexed else 0
            continue
        total += keys * there + (2 * config.hc_mult**2 * config.hidden_size if config.is_v4 else 0)
        if layer in indexed:
            total += (scored + config.index_n_heads) * (length // rate if rate else length)
    return total


@pytest.mark.parametrize(("kind", "changes"), VARIANTS)
@pytest.mark.parametrize("context", [1, 9, 11, 37, 96])
def test_training_is_every_weight_and_every_key_three_times(kind, changes, context, small_of):
    config = small_of(kind, **changes)
    with torch.device("meta"):
        model = Deepseek(config)
    trunk = range(config.num_hidden_layers)
    everything = range(config.num_hidden_layers + config.num_nextn_predict_layers)
    for mtp, layers in ((False, trunk), (True, everything)):
        by_hand = 6 * (weights(model, mtp) + by_position(config, layers, context))
        assert train_flops_per_token(config, context, mtp) == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize(("kind", "changes"), VARIANTS)
def test_a_forward_pass_is_what_pytorch_counts(kind, changes, small_of, monkeypatch):
    monkeypatch.setenv("XUSHI_OPS", "reference")
    config, length = small_of(kind, **changes), 50
    model = Deepseek(config).initialise(0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(length)[None])
    by_hand = weights(model) + all_pairs(config, range(config.num_hidden_layers), length)
    assert counter.get_total_flops() == pytest.approx(2 * length * by_hand, rel=1e-12)


@pytest.mark.parametrize(("kind", "changes"), VARIANTS)
def test_a_training_step_is_what_pytorch_counts(kind, changes, small_of, monkeypatch):
    """Backward is twice the forward, except for indexers: their inputs need no gradient, and their
    target is computed a second time, without a gradient.
    """
    monkeypatch.setenv("XUSHI_OPS", "reference")
    config, length = small_of(kind, **changes), 50
    model = Deepseek(config).initialise(0)
    tokens = torch.randint(
        config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0)
    )
    batch = Batch(
        tokens=tokens,
        targets=tokens.roll(-1, 1),
        positions=torch.arange(length)[None],
        segments=torch.zeros_like(tokens),
        loss_mask=torch.ones_like(tokens, dtype=torch.bool),
    )
    with FlopCounterMode(display=False) as counter:
        pretraining_loss(model, batch, LossWeights(0.1, 1e-4)).total.backward()
    layers = range(config.num_hidden_layers + config.num_nextn_predict_layers)
    detached = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if ".indexer." in name and parameter.dim() == 2 and not name.endswith("position_bias")
    )
    by_hand = 3 * (weights(model, mtp=True) + all_pairs(config, layers, length)) - detached
    by_hand += all_pairs(config, layers, length, target=True)
    assert counter.get_total_flops() == pytest.approx(2 * length * by_hand, rel=1e-12)


@pytest.mark.parametrize(("kind", "changes"), VARIANTS)
@pytest.mark.parametrize("context", [2, 9, 12, 16, 41, 64])
def test_decoding_is_every_weight_and_every_key_once(kind, changes, context, small_of, monkeypatch):
    """The decoding form also multiplies what masks then hide: keys that were not chosen, and a
    window that is not full yet.
    """
    monkeypatch.setenv("XUSHI_OPS", "reference")
    config = small_of(kind, **changes)
    model, cache = Deepseek(config).initialise(0), LatentCache(config, 64)
    trunk = range(config.num_hidden_layers)
    needed = wasted = 0.0
    keys, scored = per_key(config, absorbed=True)
    for layer in trunk:
        attended, seen = met(config, layer, context)
        rate = config.compress_ratio(layer) if config.is_v4 else 0
        there = (
            config.sliding_window + (context // rate if rate else 0) if config.is_v4 else context
        )
        needed += keys * attended
        wasted += keys * (there - attended) + (
            2 * config.hc_mult**2 * config.hidden_size if config.is_v4 else 0
        )
        if seen > config.index_topk:
            needed += scored * seen
            wasted += config.index_n_heads * seen
        elif layer in index_layers(config, trunk):  # nothing to choose, so no queries
            needed -= config.index_n_heads * (
                config.q_lora_rank * config.index_head_dim + config.hidden_size
            )
    assert decode_flops_per_token(config, context) == 2 * (weights(model) + needed)
    sequence = cache.allocate()
    model.decode(cache.extend([(sequence, list(range(context - 1)))]), cache)
    flat = cache.extend([(sequence, [7])])
    with FlopCounterMode(display=False) as counter:
        model.decode(flat, cache)
    assert counter.get_total_flops() == 2 * (weights(model) + needed + wasted)


@given(st.integers(1, 300), st.integers(0, 9), st.none() | st.integers(1, 40))
def test_closed_forms_are_loops(context, rate, limit):
    reach, ceiling = Reach(1, rate, limit), limit or 10**9
    if rate:
        counts = [min(tokens // rate, ceiling) for tokens in range(1, context + 1)]
    else:  # between all tokens before and these with the query's own
        counts = [
            (min(tokens, ceiling) + min(tokens - 1, ceiling)) / 2
            for tokens in range(1, context + 1)
        ]
    assert reach.mean(context) == pytest.approx(sum(counts) / context, rel=1e-12, abs=1e-12)
    assert reach.at(context) == min(context // rate if rate else context, ceiling)


def test_published_figures_of_v3():
    config = ModelConfig()
    assert train_flops_per_token(config, 4096, mtp=False) == pytest.approx(250.45e9, rel=1e-5)
    assert train_flops_per_token(config, 4096, mtp=True) == pytest.approx(260.64e9, rel=1e-5)


def test_sparse_attention_costs_what_dense_does_while_everything_is_chosen():
    dense, sparse = preset("deepseek-v3"), preset("deepseek-v3.2")
    indexer = 61 * (64 * (1536 * 128 + 7168) + 7168 * 128 + 64 * 128 * 1024)
    assert (
        train_flops_per_token(sparse, 2048, False)
        == train_flops_per_token(dense, 2048, False) + 6 * indexer
    )
    assert (
        decode_flops_per_token(sparse, 2048)
        == decode_flops_per_token(dense, 2048) + 2 * 61 * 7168 * 128
    )
    assert decode_flops_per_token(sparse, 65536) < decode_flops_per_token(dense, 65536) / 5


def test_v4_decodes_a_million_tokens_at_the_share_of_v32_that_is_published():
    """The page of deepseek-ai/DeepSeek-V4-Pro states 27 % of V3.2's FLOPs per token at a million
    tokens and 10 % of its cache. It may weigh number formats; counted in products and in values of
    equal size, the shares are close to that.
    """
    ours, before = (
        inspect_model(preset(name), 2**20, mtp=False)
        for name in ("deepseek-v4-pro", "deepseek-v3.2")
    )
    assert ours["flops.decode_per_token"] / before["flops.decode_per_token"] == pytest.approx(
        0.27, abs=0.02
    )
    assert ours["kv_cache.bytes_at_context"] / before["kv_cache.bytes_at_context"] == pytest.approx(
        0.10, abs=0.02
    )


@pytest.mark.parametrize("name", ["deepseek-v3.2", "deepseek-v4-pro"])
def test_a_million_tokens_take_no_longer_to_count(name):
    def lines_run(context: int) -> int:
        lines = 0

        def count(*_: object) -> Callable[..., Any]:
            nonlocal lines
            lines += 1
            return count

        before = sys.gettrace()
        sys.settrace(count)
        try:
            inspect_model(preset(name), context, mtp=True)
        finally:
            sys.settrace(before)
        return lines

    inspect_model(preset(name), 1, mtp=True)  # what is read once is read
    assert lines_run(2**20) <= 1.1 * lines_run(2**14)


@pytest.mark.parametrize("kind", KINDS)
def test_mtp_adds_what_a_depth_has(kind, small_of):
    config = small_of(kind)
    none = config.model_copy(
        update={
            "num_nextn_predict_layers": 0,
            "compress_ratios": config.compress_ratios and config.compress_ratios[:3],
        }
    )
    assert train_flops_per_token(none, 128) == train_flops_per_token(config, 128, mtp=False)
    assert (train_flops_per_token(config, 128) > train_flops_per_token(none, 128)) == (
        kind != "deepseek_v2"
    )
