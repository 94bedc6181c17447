"""AdamW, and Muon for matrices with AdamW for the rest.

Muon (Jordan et al. 2024) with Nesterov momentum, orthogonalised by Newton-Schulz and scaled to
AdamW's update size by 0.2 * sqrt(max(rows, columns)) (Moonlight, Liu et al. 2025, arXiv:2502.16982,
section 2.2), so that one learning rate and one weight decay serve both. Each expert's gate, up and
down matrix is orthogonalised by itself, and each group of V4's grouped output map; on request each
head of what makes queries, keys and values. DeepSeek-V4's Newton-Schulz has ten steps: eight that
blow small singular values up, two that bring all close to one.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from xushi.model import ModelConfig
from xushi.ops import native
from xushi.train.layout import Layout, local
from xushi.train.matrix_exchange import MatrixExchange

MUON_MOMENTUM = 0.95
MUON_SCALE = 0.2
# Muon's quintic (Jordan et al. 2024): it inflates small singular values fast and leaves all within
# about 0.7 to 1.2.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
Form = Literal["quintic", "hybrid"]
# (coefficients, steps) in order; the hybrid form's second part converges to 1 (DeepSeek-V4,
# arXiv:2606.19348).
FORMS: dict[Form, tuple[tuple[tuple[float, float, float], int], ...]] = {
    "quintic": ((NEWTON_SCHULZ, NEWTON_SCHULZ_STEPS),),
    "hybrid": ((NEWTON_SCHULZ, 8), ((2.0, -1.5, 0.5), 2)),
}


def orthogonalise(matrices_NRC: Tensor, form: Form = "quintic") -> Tensor:
    """Approximately U V^T of each matrix's singular value decomposition, by Newton-Schulz: [N, R,
    C] to the same.

    Computed in the dtype that comes in. bfloat16 serves: the quintic's singular values end between
    0.7 and 1.2 in any case.
    """
    wide = matrices_NRC.shape[-2] <= matrices_NRC.shape[-1]
    x = matrices_NRC if wide else matrices_NRC.mT
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    if x.dtype == torch.float32 and native.serves(
        x
    ):  # pairs of bfloat16 err more than PyTorch's form
        iterated: Tensor = x.contiguous()
        for coefficients, steps in FORMS[form]:
            native.newton_schulz(iterated, coefficients, steps)
        return iterated if wide else iterated.mT
    for (a, b, c), steps in FORMS[form]:
        for _ in range(steps):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


def stacked_matrices(name: str, config: ModelConfig | None = None, per_head: bool = False) -> int:
    """How many matrices that are orthogonalised apart lie above one another in a parameter."""
    if name.endswith("gate_up_proj"):
        return 2
    if config is None:
        return 1
    if name.endswith("o_a_proj.weight"):
        return config.o_groups
    if per_head and name.endswith(("indexer.wq_b.weight", "indexer.q_b_proj.weight")):
        return config.index_n_heads
    if per_head and name.endswith(("q_proj.weight", "q_b_proj.weight", "kv_b_proj.weight")):
        return config.num_attention_heads
    return 1


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon takes this parameter: every matrix but the embedding and the head."""
    return _decays(name, parameter) and "embed_tokens" not in name and "lm_head" not in name


def _decays(name: str, parameter: Tensor) -> bool:
    """Whether it is weight, not a norm or a bias; V4's compressors have a bias with two axes."""
    return parameter.dim() >= 2 and not name.endswith("bias")


class Optimizer:
    """One optimizer over a model's named parameters; its state is addressed by their names.

    kind: "muon" or "adamw". Weight decay is decoupled and falls on matrices, embedding and head,
    never on norms and biases. Newton-Schulz runs in `newton_schulz_dtype`, or in the parameters'
    own; all else is in their own. Where `layout` spreads the model, parameters and state are this
    process's parts; whole matrices meet for Newton-Schulz alone.
    """

    def __init__(
        self,
        model: nn.Module,
        kind: str,
        betas: tuple[float, float],
        weight_decay: float,
        newton_schulz_dtype: torch.dtype | None = None,
        layout: Layout | None = None,
        *,
        form: Form = "quintic",
        per_head: bool = False,
        epsilon: float = 1e-8,
    ) -> None:
        self._named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        named = [(name, local(p)) for name, p in self._named]
        self.parameters: dict[str, Tensor] = dict(named)
        self._exchange = MatrixExchange(layout or Layout())
        self._shapes = {name: tuple(p.shape) for name, p in self._named}
        self._form: Form = form
        config = getattr(model, "config", None)
        self._stacked = {name: stacked_matrices(name, config, per_head) for name, _ in named}
        self.betas, self.weight_decay, self.epsilon = betas, weight_decay, epsilon
        self.newton_schulz_dtype = newton_schulz_dtype
        self._muon = [name for name, p in named if kind == "muon" and is_matrix(name, p)]
        self._adam = [name for name, _ in named if name not in set(self._muon)]
        self.steps = 0
        self.state: dict[str, Tensor] = {}
        for name in self._muon:
            self.state[f"momentum.{name}"] = torch.zeros_like(self.parameters[name])
        for name in self._adam:
            self.state[f"mean.{name}"] = torch.zeros_like(self.parameters[name])
            self.state[f"square.{name}"] = torch.zeros_like(self.parameters[name])

    @torch.no_grad()
    def step(self, learning_rate: float, adamw_learning_rate: float | None = None) -> None:
        """Apply the gradients; parameters without one (an MTP layer that has no loss) are left
        alone.

        `adamw_learning_rate` is for what AdamW takes; the same if None.
        """
        self.steps += 1
        gradients = {name: local(p.grad) for name, p in self._named if p.grad is not None}
        self._step_adam(
            {name: gradients[name] for name in self._adam if name in gradients},
            learning_rate if adamw_learning_rate is None else adamw_learning_rate,
        )
        self._step_muon(
            {name: gradients[name] for name in self._muon if name in gradients}, learning_rate
        )

    def restart(self) -> None:
        """Forget all moments: what had no gradient so far begins like everything else."""
        self.steps = 0
        for tensor in self.state.values():
            tensor.zero_()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for _, parameter in self._named:
            parameter.grad = None

    def _step_adam(self, gradient_of: dict[str, Tensor], learning_rate: float) -> None:
        names = [name for name, gradient in gradient_of.items() if gradient.numel()]
        if not names:
            return
        beta1, beta2 = self.betas
        rate, root = learning_rate / (1 - beta1**self.steps), (1 - beta2**self.steps) ** 0.5
        parameters: list[Tensor] = [self.parameters[n] for n in names]
        gradients = [gradient_of[n] for n in names]
        means = [self.state[f"mean.{n}"] for n in names]
        squares = [self.state[f"square.{n}"] for n in names]
        if native.serves(*parameters, *gradients) and all(
            t.is_contiguous() for t in (*parameters, *gradients)
        ):
            for name, p, g, mean, square in zip(
                names, parameters, gradients, means, squares, strict=True
            ):
                native.adamw(
                    p,
                    g,
                    mean,
                    square,
                    rate=rate,
                    betas=self.betas,
                    correction2=root,
                    eps=self.epsilon,
                    decay=learning_rate * self.weight_decay if _decays(name, p) else 0.0,
                )
            return
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        decayed: list[Tensor] = [p for n, p in zip(names, parameters, strict=True) if _decays(n, p)]
        if decayed:
            torch._foreach_mul_(decayed, 1 - learning_rate * self.weight_decay)
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_div_(denominators, root)
        torch._foreach_add_(denominators, self.epsilon)
        torch._foreach_addcdiv_(parameters, means, denominators, -rate)

    def _step_muon(self, gradient_of: dict[str, Tensor], learning_rate: float) -> None:
        updates = {}
        for name, gradient in gradient_of.items():
            momentum = self.state[f"momentum.{name}"]
            momentum.lerp_(gradient, 1 - MUON_MOMENTUM)
            update = gradient.lerp(momentum, MUON_MOMENTUM)  # Nesterov
            updates[name] = update.to(self.newton_schulz_dtype or update.dtype)
        for name, direction in self._exchange.on_whole_matrices(
            updates, self._orthogonalised
        ).items():
            rows, columns = self._shapes[name][-2:]
            rate = learning_rate * MUON_SCALE * max(rows // self._stacked[name], columns) ** 0.5
            self.parameters[name].mul_(1 - learning_rate * self.weight_decay).add_(
                direction, alpha=-rate
            )

    def _orthogonalised(self, updates: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each matrix of whole updates by itself; those of equal shape go together."""
        by_shape: dict[tuple[int, int], list[tuple[str, Tensor]]] = {}
        for name, update in updates.items():
            for matrices in _stacked(update).chunk(self._stacked[name], dim=1):
                by_shape.setdefault((matrices.shape[-2], matrices.shape[-1]), []).append(
                    (name, matrices)
                )
        parts: dict[str, list[Tensor]] = {name: [] for name in updates}
        for found in by_shape.values():
            directions = orthogonalise(torch.cat([matrices for _, matrices in found]), self._form)
            for (name, _), part in zip(
                found, torch.split(directions, [len(m) for _, m in found]), strict=True
            ):
                parts[name].append(part)
        return {
            name: torch.cat(found, dim=1).view_as(updates[name]) for name, found in parts.items()
        }


def _stacked(tensor: Tensor) -> Tensor:
    """A parameter as [n, rows, columns]."""
    return tensor if tensor.dim() == 3 else tensor[None]


PARTS = {
    "embed_tokens": "embedding",
    "lm_head": "head",
    ".indexer.": "indexer",
    ".self_attn.": "attention",
    ".experts.": "experts",
    ".shared_experts.": "shared_experts",
    ".mlp.gate.": "router",
    ".mlp.": "dense",
}


def part_of(name: str) -> str:
    """Which part of the model a parameter belongs to, for figures: the first key of `PARTS` that is
    in its name.
    """
    return next((part for key, part in PARTS.items() if key in name), "other")


class Norms(NamedTuple):
    """Of the whole gradient, and of each part's."""

    whole: float
    parts: dict[str, float]


def clip_gradients(
    parameters: Iterable[tuple[str, nn.Parameter]], limit: float, layout: Layout | None = None
) -> Norms:
    """Scale all gradients so that their joint norm is at most `limit`; returns the norms before."""
    layout = layout or Layout()
    layout.add_shared_gradients()
    found = [(name, p) for name, p in parameters if p.grad is not None]
    gradients: list[Tensor] = [local(p.grad) for _, p in found]  # type: ignore[arg-type]
    names = [*dict.fromkeys(PARTS.values()), "other"]
    squares = torch.zeros(len(names), dtype=torch.float64)
    # A pipeline's stage may have no gradient at all, where indexers alone are trained and it has
    # none.
    norms = torch.stack(torch._foreach_norm(gradients)).double().cpu() if gradients else squares[:0]
    for (name, p), norm in zip(found, norms, strict=True):
        if (
            p is not layout.shared or layout.stage == 0
        ):  # what the first and the last stage share counts once
            squares[names.index(part_of(name))] += norm.square()
    squares = layout.grand_total(squares.to(layout.device)).cpu()
    whole = float(squares.sum().sqrt())
    if (
        gradients and not (scale := limit / (whole + 1e-6)) >= 1.0
    ):  # else there is nothing to do to gigabytes
        torch._foreach_mul_(gradients, scale)
    return Norms(
        whole,
        {name: float(square.sqrt()) for name, square in zip(names, squares, strict=True) if square},
    )
