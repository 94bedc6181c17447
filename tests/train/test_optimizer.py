"""AdamW against PyTorch's own, Muon against its definition written out in float64, matrix by
matrix.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from xushi.model import Deepseek, ModelConfig
from xushi.train.gradients import clip_gradients
from xushi.train.optimizer import (
    Optimizer,
    OptimizerSettings,
    is_matrix,
    orthogonalise,
)

LR, DECAY, BETAS = 0.03, 0.2, (0.9, 0.95)


class Parts(nn.Module):
    """One parameter of each kind, under names like the model's, in float64."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {
            "embed_tokens.weight": (11, 6),
            "lm_head.weight": (11, 6),
            "norm.weight": (6,),
            "q_proj.bias": (4,),
            "q_proj.weight": (4, 6),
            "tall.weight": (9, 3),
            "gate.weight": (5, 6),
            "experts.gate_up_proj": (3, 8, 6),
            "experts.down_proj": (3, 6, 4),
        }
        g = torch.Generator().manual_seed(0)
        for name, shape in shapes.items():
            self.register_parameter(
                name.replace(".", "/"), nn.Parameter(torch.randn(shape, generator=g).double())
            )

    def named_parameters(self, *arguments, **keywords):
        for name, parameter in super().named_parameters(*arguments, **keywords):
            yield name.replace("/", "."), parameter


def set_gradients(model: nn.Module, step: int, but: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Random gradients, from tiny to large so that no step looks like another."""
    g = torch.Generator().manual_seed(100 + step)
    for name, parameter in model.named_parameters():
        gradient = torch.randn(parameter.shape, generator=g).double() * 10.0 ** (step % 3 - 1)
        parameter.grad = None if name in but else gradient
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "decay, epsilon, rest",
    [(0.0, 1e-8, None), (DECAY, 1e-8, None), (DECAY, 0.01, None), (DECAY, 1e-8, 0.3)],
)
def test_adamw_is_pytorchs(decay: float, epsilon: float, rest: float | None) -> None:
    """Weight decay on what has two axes or more, none on norms and biases; several steps at
    changing rates. `rest` times the rate is that of embedding, head, norms and biases.
    """
    ours, theirs = Parts(), Parts()
    optimizer = Optimizer(ours, OptimizerSettings("adamw", BETAS, decay, epsilon=epsilon))
    of_the_rest = {"embed_tokens.weight", "lm_head.weight", "norm.weight", "q_proj.bias"}
    groups = [
        {
            "params": [parameter],
            "weight_decay": decay if parameter.dim() >= 2 else 0.0,
            "factor": 1.0 if rest is None or name not in of_the_rest else rest,
        }
        for name, parameter in theirs.named_parameters()
    ]
    reference = torch.optim.AdamW(groups, betas=BETAS, eps=epsilon)
    for step in range(7):
        rate = LR / (step + 1)
        set_gradients(ours, step), set_gradients(theirs, step)
        for group in reference.param_groups:
            group["lr"] = rate * group["factor"]
        reference.step()
        optimizer.step(rate, None if rest is None else rate * rest)
        for (name, got), want in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14, msg=name)


def newton_schulz(matrix: Tensor) -> Tensor:
    """Jordan et al.'s iteration on one matrix: X <- a X + b (X X^T) X + c (X X^T)^2 X, from X /
    |X|_F.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / (matrix.square().sum().sqrt() + 1e-7)
    for _ in range(5):
        x = a * x + b * (x @ x.T) @ x + c * (x @ x.T) @ (x @ x.T) @ x
    return x


def published_matrices(name: str, tensor: Tensor) -> list[Tensor]:
    """Each matrix as it stands in a published checkpoint: per expert, gate and up apart."""
    if name == "experts.gate_up_proj":
        return [half for expert in tensor for half in (expert[:4], expert[4:])]
    return list(tensor) if tensor.dim() == 3 else [tensor]


@pytest.mark.parametrize("decay", [0.0, DECAY])
def test_muon_is_its_definition_on_every_published_matrix(decay: float) -> None:
    model, start = Parts(), Parts()
    optimizer = Optimizer(model, OptimizerSettings("muon", BETAS, decay))
    matrices = {
        "q_proj.weight",
        "tall.weight",
        "gate.weight",
        "experts.gate_up_proj",
        "experts.down_proj",
    }
    weights = {
        name: [m.detach().clone() for m in published_matrices(name, p)]
        for name, p in start.named_parameters()
        if name in matrices
    }
    momenta = {name: [torch.zeros_like(m) for m in each] for name, each in weights.items()}
    for step in range(5):
        rate = LR / (step + 1)
        gradients = set_gradients(model, step)
        optimizer.step(rate)
        for name, each in weights.items():
            for i, gradient in enumerate(published_matrices(name, gradients[name])):
                momenta[name][i] = 0.95 * momenta[name][i] + 0.05 * gradient
                nesterov = 0.95 * momenta[name][i] + 0.05 * gradient
                size = 0.2 * max(gradient.shape) ** 0.5
                each[i] = (1 - rate * decay) * each[i] - rate * size * newton_schulz(nesterov)
        for name, parameter in model.named_parameters():
            if name in matrices:
                for got, want in zip(
                    published_matrices(name, parameter.detach()), weights[name], strict=True
                ):
                    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("shape", [(4, 64, 128), (3, 96, 32), (2, 48, 48)])
def test_newton_schulz_in_bfloat16_orthogonalises_as_well(shape: tuple[int, int, int]) -> None:
    """The iteration leaves singular values up to 1.2 by itself; bfloat16's three digits are small
    beside that.
    """
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    exact, single, half = u @ v, orthogonalise(matrices), orthogonalise(matrices.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).norm() <= 1.05 * (single - exact).norm()
    assert (
        half.float() - single
    ).norm() <= 2**-5 * single.norm()  # 15 products, each rounding to 2**-9


def test_newton_schulz_runs_in_the_dtype_asked_for(tiny_model) -> None:
    models = [tiny_model().initialise(0) for _ in range(2)]
    for model, dtype in zip(models, (None, torch.bfloat16), strict=True):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter).cumsum(0)
        Optimizer(model, OptimizerSettings("muon", BETAS, DECAY, newton_schulz_dtype=dtype)).step(
            LR
        )
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert torch.equal(a, b) != is_matrix(name, a), name


def test_muon_leaves_the_rest_to_adamw() -> None:
    """Embedding, head, norms and biases go as in AdamW, bit by bit."""
    muon, adam = Parts(), Parts()
    first = Optimizer(muon, OptimizerSettings("muon", BETAS, DECAY))
    second = Optimizer(adam, OptimizerSettings("adamw", BETAS, DECAY))
    for step in range(3):
        set_gradients(muon, step), set_gradients(adam, step)
        first.step(LR), second.step(LR)
    equal = {
        name
        for (name, p), q in zip(muon.named_parameters(), adam.parameters(), strict=True)
        if torch.equal(p, q)
    }
    assert equal == {"embed_tokens.weight", "lm_head.weight", "norm.weight", "q_proj.bias"}


def test_the_models_own_parameters_divide_as_they_should(tiny_model) -> None:
    model = tiny_model()
    adam = {name for name, p in model.named_parameters() if not is_matrix(name, p)}
    assert adam == {"model.embed_tokens.weight", "lm_head.weight"} | {
        name for name in adam if name.endswith(("layernorm.weight", "norm.weight"))
    }
    assert all(
        model.get_parameter(name).dim() == 1 for name in adam if name.endswith("norm.weight")
    )
    optimizer = Optimizer(model, OptimizerSettings("muon", BETAS, DECAY))
    assert set(optimizer.state) == (
        {f"{kind}.{name}" for name in adam for kind in ("mean", "square")}
        | {f"momentum.{name}" for name, _ in model.named_parameters() if name not in adam}
    )


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_parameters_without_a_gradient_are_left_alone(kind: str) -> None:
    model, before = Parts(), Parts()
    optimizer = Optimizer(model, OptimizerSettings(kind, BETAS, DECAY))
    left = ("lm_head.weight", "q_proj.weight", "norm.weight")
    set_gradients(model, 0, but=left)
    optimizer.step(LR)
    for (name, p), q in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(p, q) == (name in left), name
    assert all(
        not state.any() for name, state in optimizer.state.items() if name.partition(".")[2] in left
    )
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_model_of_vectors_or_of_matrices_alone(kind: str) -> None:
    """No group may mind being empty."""
    for keep in ("norm.weight", "q_proj.weight"):
        model = Parts()
        set_gradients(
            model, 0, but=tuple(name for name, _ in model.named_parameters() if name != keep)
        )
        before = dict(model.named_parameters())[keep].detach().clone()
        Optimizer(model, OptimizerSettings(kind, BETAS, DECAY)).step(LR)
        assert not torch.equal(before, dict(model.named_parameters())[keep])


def iterated(value: Tensor, form: str) -> Tensor:
    """What becomes of a singular value: the published coefficients, written out."""
    steps = [(3.4445, -4.7750, 2.0315)] * (5 if form == "quintic" else 8)
    for a, b, c in steps + ([(2.0, -1.5, 0.5)] * 2 if form == "hybrid" else []):
        value = a * value + b * value**3 + c * value**5
    return value


@pytest.mark.parametrize("form", ["quintic", "hybrid"])
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 20),
    columns=st.integers(1, 20),
    count=st.integers(1, 4),
)
def test_orthogonalise_keeps_the_singular_vectors(
    form: str, seed: int, rows: int, columns: int, count: int
) -> None:
    """U f(S) V^T with f the quintic, each matrix by itself, from an exact decomposition."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.rand(count, 1, 1, generator=g, dtype=torch.float64)
    matrices = torch.randn(count, rows, columns, generator=g, dtype=torch.float64) * sizes
    got = orthogonalise(matrices, form)
    for matrix, result in zip(matrices, got, strict=True):
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        want = u @ torch.diag(iterated(s / (s.square().sum().sqrt() + 1e-7), form)) @ v
        torch.testing.assert_close(result, want, rtol=1e-9, atol=1e-9)


@given(seed=st.integers(0, 2**31), size=st.sampled_from([(16, 16), (8, 32), (48, 16)]))
def test_singular_values_end_in_the_known_band(seed: int, size: tuple[int, int]) -> None:
    """All that are not tiny come to lie between 0.67 and 1.21: f is within that on [0.01, 1], where
    the values of random matrices lie for the most part, and below it no value grows beyond.
    """
    grid = iterated(torch.linspace(0.01, 1.0, 1000, dtype=torch.float64), "quintic")
    assert grid.min() > 0.67 and grid.max() < 1.21
    matrix = torch.randn(1, *size, generator=torch.Generator().manual_seed(seed))
    start = torch.linalg.svdvals(matrix[0] / matrix[0].norm())
    values = torch.linalg.svdvals(orthogonalise(matrix)[0])
    assert values.max() < 1.21 and values[start > 0.011].min() > 0.67


def test_orthogonalising_nothing_is_nothing() -> None:
    assert not orthogonalise(torch.zeros(2, 3, 4)).any()


@given(seed=st.integers(0, 2**31), limit=st.floats(1e-3, 1e3))
def test_clipping_is_pytorchs(seed: int, limit: float) -> None:
    ours, theirs = Parts(), Parts()
    for model in (ours, theirs):
        set_gradients(model, seed % 7, but=("gate.weight",))
    norms = clip_gradients(ours.named_parameters(), limit)
    assert sum(norm**2 for norm in norms.parts.values()) ** 0.5 == pytest.approx(norms.whole)
    assert norms.whole == pytest.approx(float(nn.utils.clip_grad_norm_(theirs.parameters(), limit)))
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None and q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad)


def test_a_bias_with_two_axes_is_a_bias() -> None:
    """V4's compressors add one to their gates by place: neither Muon nor weight decay takes it."""
    config = ModelConfig(
        model_type="deepseek_v4",
        vocab_size=9,
        hidden_size=8,
        moe_intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        n_routed_experts=2,
        num_experts_per_tok=1,
        q_lora_rank=4,
        qk_rope_head_dim=2,
        head_dim=4,
        o_groups=1,
        o_lora_rank=2,
        compress_ratios=[4],
        index_n_heads=1,
        index_head_dim=4,
        num_hash_layers=0,
        hc_mult=2,
        num_nextn_predict_layers=0,
        max_position_embeddings=8,
    )
    for kind in ("muon", "adamw"):
        model = Deepseek(config).initialise(1)
        biases = {name: p for name, p in model.named_parameters() if name.endswith("position_bias")}
        assert len(biases) == 2 and not any(is_matrix(name, p) for name, p in biases.items())
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with torch.no_grad():
            for bias in biases.values():
                bias.fill_(1.0)
        Optimizer(model, OptimizerSettings(kind, BETAS, DECAY)).step(LR)
        assert all(bool((bias == 1.0).all()) for bias in biases.values())


def test_the_hybrid_form_ends_close_to_one() -> None:
    """Where the quintic leaves 0.68 to 1.21, two steps that converge leave 0.96 to 1.04 (values of
    0.001 and more).
    """
    grid = iterated(torch.linspace(0.001, 1.0, 2000, dtype=torch.float64), "hybrid")
    assert float(grid.min()) > 0.95 and float(grid.max()) < 1.05
    matrix = torch.randn(1, 12, 30, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrix, "hybrid")[0])
    assert float(values.min()) > 0.95 and float(values.max()) < 1.05


@pytest.mark.parametrize("kind", ["v3", "v3.2", "v4"])
def test_heads_and_groups_are_orthogonalised_apart(kind: str) -> None:
    """One step on a whole model in float64, against each head's rows by themselves."""
    from .layouts import MODELS, model_of

    config, model = MODELS[kind], model_of(kind).double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        stream = torch.Generator().manual_seed(sum(name.encode()))
        parameter.grad = torch.randn(parameter.shape, generator=stream, dtype=torch.float64)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    Optimizer(model, OptimizerSettings("muon", BETAS, 0.0, per_head=True)).step(LR)
    heads, checked = config.num_attention_heads, set()
    for name, parameter in model.named_parameters():
        short = name.rsplit("self_attn.", 1)[-1]
        count = {
            "q_b_proj.weight": heads,
            "kv_b_proj.weight": heads,
            "indexer.wq_b.weight": config.index_n_heads,
            "indexer.q_b_proj.weight": config.index_n_heads,
            "o_a_proj.weight": config.o_groups,
            "kv_proj.weight": 1,
            "o_proj.weight": 1,
            "o_b_proj.weight": 1,
        }.get(short)
        if count is None:
            continue
        checked.add(short)
        nesterov = gradients[name] * (0.95 * 0.05 + 0.05)
        rows = len(nesterov) // count
        for head in range(count):
            part = slice(head * rows, (head + 1) * rows)
            size = 0.2 * max(rows, nesterov.shape[1]) ** 0.5
            want = before[name][part] - LR * size * newton_schulz(nesterov[part])
            torch.testing.assert_close(
                parameter.detach()[part], want, rtol=1e-9, atol=1e-11, msg=name
            )
    assert len(checked) >= 3
