"""Layers of random shapes, compiled forms against PyTorch forms: arbitrary widths up to 2,048, up
to 256 experts and 32 heads, sequences of up to 8,192 tokens.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xushi.model import Batch, Deepseek, LossWeights, ModelConfig, pretraining_loss
from xushi.ops import native

pytestmark = [pytest.mark.slow, pytest.mark.skipif(native.load() is None, reason=native.status())]


@st.composite
def cases(draw: st.DrawFn) -> tuple[ModelConfig, int, int]:
    """A model with a dense and a routed layer, a sequence length, and a seed; of a size that takes
    only seconds.
    """
    hidden, heads = draw(st.integers(128, 2048)), draw(st.integers(2, 32))
    experts = draw(st.integers(4, 256))
    length = min(
        draw(st.sampled_from([17, 63, 257, 1000, 4097, 8192])), 2**21 // hidden, 2**17 // heads
    )
    config = ModelConfig(
        vocab_size=draw(st.integers(50, 3000)),
        hidden_size=hidden,
        intermediate_size=draw(st.integers(1, 500)),
        moe_intermediate_size=draw(st.integers(1, 70)),
        num_hidden_layers=2,
        num_attention_heads=heads,
        n_routed_experts=experts,
        num_experts_per_tok=draw(st.integers(1, min(8, experts))),
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=draw(st.sampled_from([None, 40, 97])),
        kv_lora_rank=draw(st.integers(1, 100)),
        qk_nope_head_dim=draw(st.integers(1, 70)),
        qk_rope_head_dim=2 * draw(st.integers(1, 16)),
        v_head_dim=draw(st.integers(1, 70)),
        num_nextn_predict_layers=0,
        max_position_embeddings=8192,
        initializer_range=0.05,
    )
    return config, length, draw(st.integers(0, 2**31))


def loss_and_gradients(
    config: ModelConfig,
    length: int,
    seed: int,
    dtype: torch.dtype | None,
    pinned: list[torch.Tensor],
) -> list[torch.Tensor]:
    """Loss and gradients in one form and dtype. The first call's choice of experts is pinned for
    the others.
    """
    model = Deepseek(config).initialise(seed)
    model.compute_dtype = dtype
    tokens = torch.randint(
        0, config.vocab_size, (1, length), generator=torch.Generator().manual_seed(seed)
    )
    batch = Batch(
        tokens=tokens,
        targets=tokens.roll(-1, 1),
        positions=torch.arange(length)[None],
        segments=(torch.arange(length) * 3 // length)[None],
        loss_mask=torch.ones_like(tokens) > 0,
    )
    hidden = model.hidden

    def with_choice(*arguments, **keywords):
        found = hidden(*arguments, pinned=pinned or None, **keywords)
        pinned[:] = [choice.indices_Nk for choice in found.routing]
        return found

    model.hidden = with_choice
    total = pretraining_loss(model, batch, LossWeights(0.0, 0.01)).total
    total.backward()
    return [total.detach(), *(p.grad for p in model.parameters())]


@settings(max_examples=20)
@given(case=cases())
def test_any_shape(case: tuple[ModelConfig, int, int]) -> None:
    """Compares norms. Allowed are 2^13 float32 roundings, as many as the longest sum has terms, and
    a dozen roundings to bfloat16, or twice what the plain form loses in bfloat16: some gradients
    are the small rest of large terms, such as that of a latent of one channel before its norm.
    """
    config, length, seed = case
    pinned: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("XUSHI_OPS", raising=False)
        fast = loss_and_gradients(config, length, seed, None, pinned)
        half = loss_and_gradients(config, length, seed, torch.bfloat16, pinned)
        patch.setenv("XUSHI_OPS", "pytorch")
        plain = loss_and_gradients(config, length, seed, None, pinned)
        plain_half = loss_and_gradients(config, length, seed, torch.bfloat16, pinned)
    whole = torch.stack([tensor.norm() for tensor in plain[1:]]).norm()
    for got, rough, want, peer in zip(fast, half, plain, plain_half, strict=True):
        assert (got - want).norm() <= 2.0**-11 * (want.norm() + 1e-2 * whole)
        roundings = 12 * 2.0**-8 * (want.norm() + 0.1 * whole)
        assert (rough - want).norm() <= max(roundings, 2 * (peer - want).norm())
