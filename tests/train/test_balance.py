"""The bias that balances: its direction, its size, its centring; and the figures that say whether
it works.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xushi.model import Deepseek, ModelConfig
from xushi.ops import sigmoid_router
from xushi.train.balance import router_health, update_router_biases

CONFIG = ModelConfig(
    vocab_size=8,
    hidden_size=8,
    intermediate_size=8,
    moe_intermediate_size=4,
    num_hidden_layers=3,
    num_attention_heads=1,
    n_routed_experts=6,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    q_lora_rank=None,
    kv_lora_rank=4,
    qk_nope_head_dim=2,
    qk_rope_head_dim=2,
    v_head_dim=2,
    num_nextn_predict_layers=1,
)
loads = st.lists(st.integers(0, 50).map(float), min_size=6, max_size=6).map(torch.tensor)


def model() -> Deepseek:
    return Deepseek(CONFIG).initialise(0)


@given(load=loads, speed=st.sampled_from([1e-3, 0.1]))
def test_the_rule(load: torch.Tensor, speed: float) -> None:
    """b += speed * sign(mean - load), then centred (V3, section 2.1.2)."""
    net = model()
    start = torch.tensor([0.3, -0.1, 0.0, 0.2, -0.5, 0.1])
    net.routers()["1"].e_score_correction_bias.copy_(start)
    update_router_biases(net, {"1": load}, speed)
    moved = [
        b + speed * ((load.mean() > x) * 1.0 - (load.mean() < x) * 1.0)
        for b, x in zip(start, load, strict=True)
    ]
    want = torch.stack(moved) - torch.stack(moved).mean()
    bias = net.routers()["1"].e_score_correction_bias
    torch.testing.assert_close(bias, want, rtol=0, atol=1e-6)
    assert bias.mean().abs() < 1e-6 and bias.dtype == torch.float32
    assert not any(
        router.e_score_correction_bias.any()
        for name, router in net.routers().items()
        if name != "1"
    )
    over, under = load.argmax(), load.argmin()
    if load[over] > load[under]:
        assert (bias - start)[over] < (bias - start)[under], (
            "the overloaded expert's bias must fall"
        )


def test_equal_loads_move_nothing() -> None:
    net = model()
    update_router_biases(net, {"1": torch.full((6,), 7.0)}, 0.1)
    assert not net.routers()["1"].e_score_correction_bias.any()


def test_a_router_without_bias_is_left_alone() -> None:
    """V2's has none; its balance loss pulls instead."""
    second = CONFIG.model_dump() | {
        "model_type": "deepseek_v2",
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "num_nextn_predict_layers": 0,
    }
    net = Deepseek(ModelConfig(**second)).initialise(0)
    load = {"1": torch.tensor([9.0, 0, 0, 0, 0, 0])}
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    update_router_biases(net, load, 0.1)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    health = router_health(net, load)
    assert health["router.1.max_violation"] == 5 and "router.1.bias_drift" not in health


def test_an_overloaded_expert_loses_tokens() -> None:
    """The rule and the router together: with the rule on, loads that began skewed come near the
    mean.
    """
    g = torch.Generator().manual_seed(0)
    net, x = model(), torch.randn(600, 8, generator=g) + 1
    router = net.routers()["1"]
    with torch.no_grad():
        router.weight.copy_(torch.randn(6, 8, generator=g) * 0.1)
        router.weight[0] += 0.1  # scores high for most tokens

    def load() -> torch.Tensor:
        choice = sigmoid_router(
            x,
            router.weight,
            router.e_score_correction_bias,
            top_k=2,
            groups=1,
            top_groups=1,
            normalise=True,
            scale=1.0,
        )
        return torch.bincount(choice.indices_Nk.flatten(), minlength=6).float()

    before = load()
    for _ in range(150):
        update_router_biases(net, {"1": load()}, 5e-3)
    after = load()
    assert before[0] > 1.5 * before.mean() and after.max() < 1.1 * after.mean()


def test_health_of_a_known_load() -> None:
    net = model()
    net.routers()["2"].e_score_correction_bias.copy_(torch.tensor([0.1, -0.4, 0.0, 0.0, 0.0, 0.3]))
    values = router_health(net, {"2": torch.tensor([6.0, 0.0, 3.0, 3.0, 0.0, 0.0])})
    assert values["router.2.max_violation"] == pytest.approx(2.0)  # (6 - 2) / 2
    assert values["router.2.dead_experts"] == 3 and values["router.2.bias_drift"] == pytest.approx(
        0.4
    )
    assert [values[f"router.2.load.{e}"] for e in range(6)] == pytest.approx(
        [0.5, 0, 0.25, 0.25, 0, 0]
    )
    assert len(values) == 9


def test_health_of_nothing_at_all_is_finite() -> None:
    values = router_health(model(), {"1": torch.zeros(6)})
    assert values["router.1.max_violation"] == 0 and values["router.1.dead_experts"] == 6
