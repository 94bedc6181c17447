"""The model against transformers' `DeepseekV3ForCausalLM` on the same random weights, float32."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeepseekV3ForCausalLM
from transformers.utils.logging import disable_progress_bar

from xushi.model import Deepseek, LatentCache, ModelConfig, RopeScaling, load_pretrained, save_pretrained

# The design's bounds for float32: logits max|d| / max|ref|, gradients |d| <= 1e-5 (|g| + 1e-3 |g of the whole model|).
disable_progress_bar()

TOLERANCE = 1e-5


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    groups = draw(st.sampled_from([1, 2, 4]))
    per_group = draw(st.sampled_from([2, 3, 4]))
    top_groups = draw(st.integers(1, groups))
    layers = draw(st.integers(1, 3))
    scaling = draw(st.sampled_from([
        None,
        RopeScaling(factor=4.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=1.0),
        RopeScaling(factor=40.0, original_max_position_embeddings=64, mscale=0.707, mscale_all_dim=0.5, beta_fast=8.0),
        RopeScaling(factor=2.0, original_max_position_embeddings=32, mscale=0.0),
    ]))
    return ModelConfig(
        vocab_size=draw(st.integers(17, 67)), hidden_size=draw(st.sampled_from([16, 24, 40])),
        intermediate_size=draw(st.sampled_from([8, 33])), moe_intermediate_size=draw(st.sampled_from([8, 11])),
        num_hidden_layers=layers, num_attention_heads=draw(st.sampled_from([1, 2, 3])),
        n_shared_experts=draw(st.integers(1, 2)), n_routed_experts=groups * per_group,
        num_experts_per_tok=draw(st.integers(1, top_groups * per_group)), n_group=groups, topk_group=top_groups,
        norm_topk_prob=draw(st.booleans()), routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        first_k_dense_replace=draw(st.integers(0, layers)), q_lora_rank=draw(st.sampled_from([None, 6, 16])),
        kv_lora_rank=draw(st.sampled_from([8, 20])), qk_nope_head_dim=draw(st.sampled_from([4, 8])),
        qk_rope_head_dim=draw(st.sampled_from([2, 4, 8])), v_head_dim=draw(st.sampled_from([4, 8, 20])),
        attention_bias=draw(st.booleans()), max_position_embeddings=64, rope_theta=draw(st.sampled_from([10000.0, 500.0])),
        rope_scaling=scaling, rope_interleave=draw(st.booleans()), tie_word_embeddings=draw(st.booleans()),
        num_nextn_predict_layers=0, initializer_range=0.2)


def random_model(config: ModelConfig, seed: int) -> Deepseek:
    """Random everything: norms, biases and router biases too, so that no term can hide behind a zero or a one."""
    model = Deepseek(config).initialise(seed)
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=stream) * 0.3)
        for router in model.routers().values():
            router.e_score_correction_bias.copy_(torch.randn(config.n_routed_experts, generator=stream) * 0.2)
    return model


def pin_reference(reference: DeepseekV3ForCausalLM, choices: list[torch.Tensor]) -> None:
    """Give the reference's routers our selections: near ties flip on rounding, so selections are compared apart."""
    gates = [layer.mlp.gate for layer in reference.model.layers if hasattr(layer.mlp, "gate")]
    for gate, chosen in zip(gates, choices, strict=True):
        def forward(x: torch.Tensor, gate: torch.nn.Module = gate, chosen: torch.Tensor = chosen) -> tuple:
            logits = torch.nn.functional.linear(x.reshape(-1, x.shape[-1]).float(), gate.weight.float())
            weights = logits.sigmoid().gather(1, chosen)
            if gate.norm_topk_prob:
                weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
            return logits, weights * gate.routed_scaling_factor, chosen
        gate.forward = forward


def check_against_transformers(config: ModelConfig, seed: int, path) -> None:
    ours = random_model(config, seed)
    save_pretrained(ours, path)
    reference, report = DeepseekV3ForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager",
        output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    reference.eval()
    tokens = torch.randint(0, config.vocab_size, (2, 23), generator=torch.Generator().manual_seed(seed))

    routing = ours.hidden(tokens).routing
    x = {}
    gates = [layer.mlp.gate for layer in reference.model.layers if hasattr(layer.mlp, "gate")]
    hooks = [gate.register_forward_hook(lambda m, i, out, n=n: x.__setitem__(n, out[2])) for n, gate in enumerate(gates)]
    reference(tokens)
    for hook in hooks:
        hook.remove()
    for layer, choice in enumerate(routing):  # selections: equal as sets, but for near ties after an earlier flip
        same = (choice.indices_Nk.sort().values == x[layer].sort().values).all(-1).float().mean()
        assert same >= 0.9, f"layer {layer}: only {same:.0%} of the tokens go to the reference's experts"

    choices = [choice.indices_Nk for choice in routing]
    pin_reference(reference, choices)
    expected = reference(tokens).logits
    got = ours(tokens, pinned=choices).logits
    assert (got - expected).abs().max() <= TOLERANCE * expected.abs().max()

    targets = torch.roll(tokens, -1, 1)
    for logits in (got, expected):
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    theirs = dict(reference.named_parameters())
    whole = torch.stack([p.grad.norm() for p in theirs.values() if p.grad is not None]).norm()
    for name, parameter in ours.named_parameters():
        if parameter.grad is None:
            assert theirs[name].grad is None or not theirs[name].grad.any()
            continue
        difference = (parameter.grad - theirs[name].grad).norm()
        assert difference <= TOLERANCE * (theirs[name].grad.norm() + 1e-3 * whole), name


@settings(max_examples=12, deadline=None)
@given(config=configs(), seed=st.integers(0, 2**31))
def test_logits_and_gradients(config: ModelConfig, seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    check_against_transformers(config, seed, tmp_path_factory.mktemp("checkpoint"))


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(config=configs(), seed=st.integers(0, 2**31))
def test_logits_and_gradients_at_length(config: ModelConfig, seed: int,
                                        tmp_path_factory: pytest.TempPathFactory) -> None:
    check_against_transformers(config, seed, tmp_path_factory.mktemp("checkpoint"))


@settings(max_examples=15, deadline=None)
@given(config=configs(), seed=st.integers(0, 2**31), data=st.data())
def test_decoding_equals_the_full_forward(config: ModelConfig, seed: int, data: st.DataObject) -> None:
    """Chunks of any sizes, several sequences in one call, forks and truncation: the logits of the whole forward."""
    model = random_model(config, seed)
    tokens = torch.randint(0, config.vocab_size, (2, 19), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        expected = model(tokens).logits
    cache = LatentCache(config, slots=200)
    first, second = cache.allocate(), cache.allocate()
    done = {first: 0, second: 0}
    row = {first: 0, second: 1}

    def step(additions: list[tuple[int, int]]) -> None:
        flat = cache.extend([(s, tokens[row[s], done[s]:done[s] + n].tolist()) for s, n in additions], wanted="all")
        logits = model.decode(flat, cache).logits_MV
        want = torch.cat([expected[row[s], done[s]:done[s] + n] for s, n in additions])
        assert (logits - want).abs().max() <= TOLERANCE * expected.abs().max()
        for s, n in additions:
            done[s] += n

    while any(done[s] < 19 for s in (first, second)):
        wanted = [(s, min(9 - data.draw(st.integers(0, 9)), 19 - done[s])) for s in (first, second)]
        if wanted := [(s, n) for s, n in wanted if n]:
            step(wanted)
    kept = data.draw(st.integers(0, 18))
    fork = cache.fork(first)
    row[fork], done[fork] = 0, kept
    cache.truncate(fork, kept)
    step([(fork, 19 - kept)])
    cache.free(first), cache.free(second), cache.free(fork)
    assert cache.available == 200


def test_packed_documents_equal_documents_run_alone() -> None:
    config = ModelConfig(vocab_size=50, hidden_size=24, intermediate_size=32, moe_intermediate_size=8,
                         num_hidden_layers=2, num_attention_heads=2, n_routed_experts=8, num_experts_per_tok=2,
                         n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=8,
                         qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=8, initializer_range=0.2)
    model = random_model(config, 5)
    a, b = torch.arange(11)[None] % 50, (torch.arange(9)[None] * 7) % 50
    packed = torch.cat((a, b), 1)
    segments = torch.tensor([[0] * 11 + [1] * 9])
    positions = torch.tensor([[*range(11), *range(9)]])
    got = model(packed, positions, segments).logits
    alone = torch.cat((model(a).logits, model(b).logits), 1)
    assert (got - alone).abs().max() <= TOLERANCE * alone.abs().max()


def test_save_load_save_is_bit_identical(tmp_path) -> None:
    config = ModelConfig(vocab_size=40, hidden_size=16, intermediate_size=24, moe_intermediate_size=8,
                         num_hidden_layers=2, num_attention_heads=2, n_routed_experts=4, num_experts_per_tok=2,
                         n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8,
                         qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4, num_nextn_predict_layers=1)
    model = random_model(config, 3)
    save_pretrained(model, tmp_path / "a")
    again = load_pretrained(tmp_path / "a")
    save_pretrained(again, tmp_path / "b")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    tokens = torch.arange(12)[None]
    assert torch.equal(model(tokens).logits, again(tokens).logits)
    _, report = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not report["missing_keys"]
    assert all(key.startswith("model.layers.2.") for key in report["unexpected_keys"])  # the MTP layer, and it alone
