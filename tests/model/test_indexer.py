"""The indexers' loss, and its separation from the other losses: V3.2's over tokens, V4's over
compressed entries.

The expected values are computed here in float64, from the published tensors, by plain loops. Of the
package's arithmetic only the computation of a layer's input is used.
"""

import math

import pytest
import torch
from torch import Tensor

from xushi.base.errors import XushiError
from xushi.model import Batch, Deepseek, LossWeights, pretraining_loss

KINDS = ("deepseek_v32", "deepseek_v4")
LENGTH = 11


def batch_of(model: Deepseek, seed: int, rows: int = 2) -> Batch:
    ids = torch.randint(
        0,
        model.config.vocab_size,
        (rows, LENGTH + 1),
        generator=torch.Generator().manual_seed(seed),
    )
    return Batch(
        tokens=ids[:, :-1],
        targets=ids[:, 1:],
        loss_mask=torch.ones(rows, LENGTH, dtype=torch.bool),
        positions=torch.arange(LENGTH).expand(rows, -1),
        segments=torch.zeros(rows, LENGTH, dtype=torch.int64),
    )


def rms(x: Tensor, weight: Tensor | float, eps: float) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean() + eps)


def pairs(x: Tensor, place: float, frequencies: list[float]) -> Tensor:
    """Pairs (x0, x1), (x2, x3), ... rotated by position * frequency."""
    out = []
    for j, frequency in enumerate(frequencies):
        a, b, angle = x[2 * j], x[2 * j + 1], place * frequency
        out += [
            a * math.cos(angle) - b * math.sin(angle),
            a * math.sin(angle) + b * math.cos(angle),
        ]
    return torch.stack(out)


def halves(x: Tensor, place: float, frequencies: list[float]) -> Tensor:
    """Pairs (x_i, x_(i + R/2)) rotated, as only V3.2's indexer does."""
    half = len(x) // 2
    first = [
        x[j] * math.cos(place * f) - x[half + j] * math.sin(place * f)
        for j, f in enumerate(frequencies)
    ]
    second = [
        x[half + j] * math.cos(place * f) + x[j] * math.sin(place * f)
        for j, f in enumerate(frequencies)
    ]
    return torch.stack(first + second)


def divergence(p: list[float], scores: list[float]) -> float:
    total, normal = sum(p), sum(math.exp(s) for s in scores)
    return sum(
        x / total * (math.log(x / total) - s + math.log(normal))
        for x, s in zip(p, scores, strict=True)
        if x
    )


def choose(scores: list[float], count: int | None) -> list[int]:
    order = sorted(range(len(scores)), key=lambda s: (-scores[s], s))
    return sorted(order if count is None else order[:count])


def index_score(q: list[Tensor], key: Tensor, weights: Tensor) -> float:
    width = len(key)
    return sum(
        float(weights[j]) * len(q) ** -0.5 * max(0.0, float(q[j] @ key)) / width**0.5
        for j in range(len(q))
    )


def expected_v32(w: dict[str, Tensor], c, xs: list[Tensor], count: int | None) -> list[float]:
    """KL(attention averaged over heads || softmax of the index scores) for each query."""
    frequencies = [
        c.rope_theta ** (-2 * j / c.qk_rope_head_dim) for j in range(c.qk_rope_head_dim // 2)
    ]
    nope, rope, heads = c.qk_nope_head_dim, c.qk_rope_head_dim, c.num_attention_heads
    queries, keys, index_q, index_k, index_w = [], [], [], [], []
    for t, x in enumerate(xs):
        latent = rms(w["q_a_proj.weight"] @ x, w["q_a_layernorm.weight"], 1e-6)
        q = (w["q_b_proj.weight"] @ latent).view(heads, nope + rope)
        queries.append(
            [torch.cat((q[h, :nope], pairs(q[h, nope:], t, frequencies))) for h in range(heads)]
        )
        down = w["kv_a_proj_with_mqa.weight"] @ x
        up = w["kv_b_proj.weight"] @ rms(down[: c.kv_lora_rank], w["kv_a_layernorm.weight"], 1e-6)
        shared = pairs(down[c.kv_lora_rank :], t, frequencies)
        keys.append([torch.cat((up.view(heads, -1)[h, :nope], shared)) for h in range(heads)])
        iq = (w["indexer.wq_b.weight"] @ latent).view(c.index_n_heads, -1)
        index_q.append([torch.cat((halves(i[:rope], t, frequencies), i[rope:])) for i in iq])
        raw = w["indexer.wk.weight"] @ x
        raw = (raw - raw.mean()) / torch.sqrt(((raw - raw.mean()) ** 2).mean() + 1e-6)
        raw = raw * w["indexer.k_norm.weight"] + w["indexer.k_norm.bias"]
        index_k.append(torch.cat((halves(raw[:rope], t, frequencies), raw[rope:])))
        index_w.append(w["indexer.weights_proj.weight"] @ x)
    result = []
    for t in range(len(xs)):
        scores = [index_score(index_q[t], index_k[s], index_w[t]) for s in range(t + 1)]
        seen = choose(scores, count)
        p = [0.0] * len(seen)
        for h in range(heads):
            e = [math.exp(float(queries[t][h] @ keys[s][h]) / math.sqrt(nope + rope)) for s in seen]
            p = [a + b / sum(e) for a, b in zip(p, e, strict=True)]
        result.append(divergence(p, [scores[s] for s in seen]))
    return result


def expected_v4(w: dict[str, Tensor], c, xs: list[Tensor], count: int | None) -> list[float]:
    """The same over compressed entries; the attention's softmax also covers the window's tokens and
    the sink.
    """
    eps, rope, heads, rate = (
        c.rms_norm_eps,
        c.qk_rope_head_dim,
        c.num_attention_heads,
        c.compress_rate_csa,
    )
    frequencies = [c.compress_rope_theta ** (-2 * j / rope) for j in range(rope // 2)]

    def tail(x: Tensor, place: float) -> Tensor:
        return torch.cat((x[:-rope], pairs(x[-rope:], place, frequencies)))

    def entries(name: str, width: int) -> list[Tensor]:
        made = []
        for window in range(len(xs) // rate):
            slots = []
            for m in range(2 * rate):
                s, first = (window - 1) * rate + m, m < rate
                if s < 0:
                    continue
                part = slice(0, width) if first else slice(width, 2 * width)
                slots.append(
                    (
                        (w[f"{name}kv_proj.weight"] @ xs[s])[part],
                        (
                            w[f"{name}gate_proj.weight"] @ xs[s]
                            + w[f"{name}position_bias"][m % rate]
                        )[part],
                    )
                )
            total = sum(gate.exp() for _, gate in slots)
            pooled = sum(gate.exp() / total * value for value, gate in slots)
            made.append(tail(rms(pooled, w[f"{name}kv_norm.weight"], eps), window * rate))
        return made

    pooled, index_keys = (
        entries("compressor.", c.head_dim),
        entries("compressor.indexer.", c.index_head_dim),
    )
    keys = [
        tail(rms(w["kv_proj.weight"] @ x, w["kv_norm.weight"], eps), t) for t, x in enumerate(xs)
    ]
    result = []
    for t, x in enumerate(xs):
        visible = (t + 1) // rate
        if not visible:
            result.append(0.0)
            continue
        latent = rms(w["q_a_proj.weight"] @ x, w["q_a_norm.weight"], eps)
        q = [
            tail(rms(head, 1.0, eps), t) for head in (w["q_b_proj.weight"] @ latent).view(heads, -1)
        ]
        iq = [
            tail(i, t)
            for i in (w["compressor.indexer.q_b_proj.weight"] @ latent).view(c.index_n_heads, -1)
        ]
        weights = w["compressor.indexer.scorer.weights_proj.weight"] @ x
        scores = [index_score(iq, key, weights) for key in index_keys[:visible]]
        seen = choose(scores, count)
        p = [0.0] * len(seen)
        for h in range(heads):

            def weigh(key: Tensor, query: Tensor = q[h]) -> float:
                return math.exp(float(query @ key) * c.head_dim**-0.5)

            window = range(max(0, t - c.sliding_window + 1), t + 1)
            total = (
                math.exp(float(w["sinks"][h]))
                + sum(weigh(keys[s]) for s in window)
                + sum(weigh(pooled[s]) for s in seen)
            )
            p = [a + weigh(pooled[s]) / total for a, s in zip(p, seen, strict=True)]
        result.append(divergence(p, [scores[s] for s in seen]))
    return result


def one_layer(kind: str, random_model, tiny_of, **changes: object) -> Deepseek:
    changes = {"num_hidden_layers": 1, "rope_scaling": None} | changes
    if kind == "deepseek_v4":
        changes |= {"compress_ratios": [2]}
    model: Deepseek = random_model(tiny_of(kind, **changes), 41)
    return model.double()


@pytest.mark.parametrize("dense", [True, False], ids=["dense warm-up", "sparse"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_divergence_is_the_papers(kind: str, dense: bool, random_model, tiny_of) -> None:
    model = one_layer(kind, random_model, tiny_of)
    batch = batch_of(model, 7, rows=1)
    got = model.hidden(batch.tokens, batch.positions, dense=dense, index_loss=True).index_divergence
    assert len(got) == 1 and got[0].shape == (1, LENGTH)
    layer = model.decoder_layers[0]
    residual, _ = layer.attn_hc.read(model.embed(batch.tokens))
    inputs = list(layer.input_layernorm(residual)[0].detach())
    weights = {name: p.detach() for name, p in layer.self_attn.named_parameters()}
    want = (expected_v32 if kind == "deepseek_v32" else expected_v4)(
        weights, model.config, inputs, None if dense else model.config.index_topk
    )
    # The model's rotation frequencies are float32: relative errors of 6e-8, times up to 11
    # positions.
    torch.testing.assert_close(
        got[0][0].detach(), torch.tensor(want, dtype=torch.float64), rtol=1e-6, atol=1e-12
    )
    assert max(want) > 0.01


@pytest.mark.parametrize("warmup", [True, False], ids=["dense warm-up", "sparse"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_differences(kind: str, warmup: bool, random_model, tiny_of) -> None:
    """The gradient of every parameter of the indexers against central differences, in float64."""
    model = one_layer(kind, random_model, tiny_of)
    batch = batch_of(model, 8)
    names = [name for name, _ in model.named_parameters() if ".indexer." in name]
    assert len(names) >= 5

    def loss() -> Tensor:
        return pretraining_loss(model, batch, LossWeights(0.0, 0.0), indexer_warmup=warmup).indexer

    model.zero_grad()
    pretraining_loss(model, batch, LossWeights(0.0, 0.0), indexer_warmup=warmup).total.backward()
    step, g = 1e-6, torch.Generator().manual_seed(1)
    for name in names:
        parameter = model.get_parameter(name)
        direction = torch.randn(parameter.shape, generator=g, dtype=torch.float64)
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                parameter.add_(direction, alpha=sign * step)
                values.append(float(loss()))
                parameter.add_(direction, alpha=-sign * step)
        slope = float((parameter.grad * direction).sum())
        # A central difference's error is the step's cube times the third derivative, over the step,
        # plus rounding over the step.
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=1e-4, abs=1e-8), (
            name
        )


@pytest.mark.parametrize("kind", KINDS)
def test_losses_do_not_cross(kind: str, random_model, tiny_of) -> None:
    """The text's loss gives the indexers no gradient, and their loss gives none to other
    parameters. The sparse stage has both losses.
    """
    model = random_model(tiny_of(kind, num_nextn_predict_layers=1), 42)
    batch = batch_of(model, 9)

    def touched(indexer_weight: float = 1.0, **settings: object) -> set[str]:
        model.zero_grad()
        weights = LossWeights(0.3, 0.01, indexer_weight)
        pretraining_loss(model, batch, weights, **settings).total.backward()
        return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}

    indexers = {name for name, _ in model.named_parameters() if ".indexer." in name}
    assert touched(indexer_weight=0.0).isdisjoint(indexers)
    assert touched(indexer_warmup=True) == indexers
    both = touched()
    assert indexers < both and "model.embed_tokens.weight" in both


@pytest.mark.parametrize("kind", KINDS)
def test_the_warm_up_attends_to_everything(kind: str, random_model, tiny_of) -> None:
    model = random_model(tiny_of(kind), 43)
    batch = batch_of(model, 10)
    whole = random_model(tiny_of(kind, index_topk=1000), 43)
    dense = model.hidden(batch.tokens, dense=True).hidden_BTD
    torch.testing.assert_close(dense, whole.hidden(batch.tokens).hidden_BTD, rtol=0, atol=0)
    assert (dense - model.hidden(batch.tokens).hidden_BTD).abs().max() > 1e-3


def test_a_warm_up_of_nothing_is_refused(random_model, tiny) -> None:
    model = random_model(tiny(), 44)
    with pytest.raises(XushiError, match="indexer"):
        pretraining_loss(model, batch_of(model, 11), LossWeights(0.0, 0.0), indexer_warmup=True)
