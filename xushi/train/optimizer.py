"""AdamW, and Muon for matrices with AdamW for the rest.

Muon (Jordan et al. 2024) has Nesterov momentum, orthogonalised by Newton-Schulz and scaled to
AdamW's update size by 0.2 * sqrt(max(rows, columns)) (Moonlight, Liu et al. 2025, arXiv:2502.16982,
section 2.2), so that one learning rate and one weight decay serve both. Each expert's gate, up and
down matrix is orthogonalised by itself, and so is each group of V4's grouped output projection; on
request also each head of the query, key and value projections. DeepSeek-V4's Newton-Schulz has ten
steps: eight that raise small singular values and two that bring all close to one.

Not here: the gradient's norm (gradients).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from xushi.model import ModelConfig
from xushi.ops import native
from xushi.train.layout import Layout, local
from xushi.train.matrix_exchange import MatrixExchange

MUON_MOMENTUM = 0.95
MUON_SCALE = 0.2
# Muon's quintic (Jordan et al. 2024): it raises small singular values fast and leaves all of them
# within about 0.7 to 1.2.
QUINTIC = (3.4445, -4.7750, 2.0315)
NewtonSchulz = Literal["quintic", "hybrid"]
# (coefficients, steps) in order. The second part of "hybrid" converges to 1 (DeepSeek-V4,
# arXiv:2606.19348).
NEWTON_SCHULZ: dict[NewtonSchulz, tuple[tuple[tuple[float, float, float], int], ...]] = {
    "quintic": ((QUINTIC, 5),),
    "hybrid": ((QUINTIC, 8), ((2.0, -1.5, 0.5), 2)),
}


@dataclass(frozen=True)
class OptimizerSettings:
    """Weight decay is decoupled and applies to matrices, embedding and head, never to norms and
    biases.

    `kind` "muon" uses AdamW for what is no matrix. Newton-Schulz runs in `newton_schulz_dtype`,
    None: the parameters' own; everything else runs in the parameters' own. With `per_head` Muon
    takes each head of the query, key and value projections by itself.
    """

    kind: Literal["muon", "adamw"]
    betas: tuple[float, float]
    weight_decay: float
    epsilon: float = 1e-8
    newton_schulz: NewtonSchulz = "quintic"
    newton_schulz_dtype: torch.dtype | None = None
    per_head: bool = False


def orthogonalise(matrices_NRC: Tensor, form: NewtonSchulz = "quintic") -> Tensor:
    """Approximately U V^T of each matrix's singular value decomposition, by Newton-Schulz.

    [N, R, C] to the same, in the same dtype. bfloat16 is good enough: the quintic's singular values
    end between 0.7 and 1.2 in any case.
    """
    wide = matrices_NRC.shape[-2] <= matrices_NRC.shape[-1]
    x = matrices_NRC if wide else matrices_NRC.mT
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    # In bfloat16 the compiled form errs more than PyTorch's.
    if x.dtype == torch.float32 and native.serves(x):
        iterated: Tensor = x.contiguous()
        for coefficients, steps in NEWTON_SCHULZ[form]:
            native.newton_schulz(iterated, coefficients, steps)
        return iterated if wide else iterated.mT
    for (a, b, c), steps in NEWTON_SCHULZ[form]:
        for _ in range(steps):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


def stacked_matrices(name: str, config: ModelConfig | None = None, per_head: bool = False) -> int:
    """How many matrices are stacked in a parameter along its rows, each orthogonalised by
    itself.
    """
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
    """Whether `learning_rate` is this parameter's, and Muon takes it: every matrix but the
    embedding and the head.
    """
    return _decays(name, parameter) and "embed_tokens" not in name and "lm_head" not in name


def _decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: not to norms and biases (V4's compressors have a bias with two
    axes).
    """
    return parameter.dim() >= 2 and not name.endswith("bias")


class Optimizer:
    """One optimizer over a model's named parameters; its state is addressed by their names.

    Where `layout` shards the model, parameters and state are this process's shards; whole matrices
    are put together for Newton-Schulz only.
    """

    def __init__(
        self, model: nn.Module, settings: OptimizerSettings, layout: Layout | None = None
    ) -> None:
        self.settings = settings
        self._named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        named = [(name, local(p)) for name, p in self._named]
        self.parameters: dict[str, Tensor] = dict(named)
        self._exchange = MatrixExchange(layout or Layout())
        self._shapes = {name: tuple(p.shape) for name, p in self._named}
        config = getattr(model, "config", None)
        self._stacked = {n: stacked_matrices(n, config, settings.per_head) for n, _ in named}
        self._matrices = [name for name, p in named if is_matrix(name, p)]
        self._rest = [name for name, p in named if not is_matrix(name, p)]
        self.steps = 0
        self.state: dict[str, Tensor] = {}
        for name, parameter in named:
            muon = settings.kind == "muon" and is_matrix(name, parameter)
            for moment in ("momentum",) if muon else ("mean", "square"):
                self.state[f"{moment}.{name}"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, learning_rate: float, rest_learning_rate: float | None = None) -> None:
        """Apply the gradients; parameters without one (an MTP layer without loss) stay as they are.

        `learning_rate` is that of the matrices (`is_matrix`), `rest_learning_rate` that of all
        others; None: the same. Both kinds of optimizer divide the parameters so.
        """
        self.steps += 1
        rest_rate = learning_rate if rest_learning_rate is None else rest_learning_rate
        gradients = {name: local(p.grad) for name, p in self._named if p.grad is not None}
        matrices = {name: gradients[name] for name in self._matrices if name in gradients}
        rest = {name: gradients[name] for name in self._rest if name in gradients}
        self._step_adam(rest, rest_rate)
        if self.settings.kind == "muon":
            self._step_muon(matrices, learning_rate)
        else:
            self._step_adam(matrices, learning_rate)

    def restart(self) -> None:
        """Forget all moments, so that parameters without gradients so far start like all others."""
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
        parameters = [self.parameters[name] for name in names]
        gradients = [gradient_of[name] for name in names]
        tensors = [*parameters, *gradients]
        if native.serves(*tensors) and all(tensor.is_contiguous() for tensor in tensors):
            self._step_adam_compiled(gradient_of, names, learning_rate)
            return
        rate, root = self._corrected(learning_rate)
        beta1, beta2 = self.settings.betas
        means = [self.state[f"mean.{name}"] for name in names]
        squares = [self.state[f"square.{name}"] for name in names]
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        decayed = [p for name, p in zip(names, parameters, strict=True) if _decays(name, p)]
        if decayed:
            torch._foreach_mul_(decayed, 1 - learning_rate * self.settings.weight_decay)
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_div_(denominators, root)
        torch._foreach_add_(denominators, self.settings.epsilon)
        torch._foreach_addcdiv_(parameters, means, denominators, -rate)

    def _step_adam_compiled(
        self, gradient_of: dict[str, Tensor], names: list[str], learning_rate: float
    ) -> None:
        rate, root = self._corrected(learning_rate)
        for name in names:
            parameter = self.parameters[name]
            decay = learning_rate * self.settings.weight_decay if _decays(name, parameter) else 0.0
            native.adamw(
                parameter,
                gradient_of[name],
                self.state[f"mean.{name}"],
                self.state[f"square.{name}"],
                rate=rate,
                betas=self.settings.betas,
                correction2=root,
                eps=self.settings.epsilon,
                decay=decay,
            )

    def _corrected(self, learning_rate: float) -> tuple[float, float]:
        """AdamW's bias corrections: the rate for the mean, and the root for the mean square."""
        beta1, beta2 = self.settings.betas
        return learning_rate / (1 - beta1**self.steps), (1 - beta2**self.steps) ** 0.5

    def _step_muon(self, gradient_of: dict[str, Tensor], learning_rate: float) -> None:
        dtype = self.settings.newton_schulz_dtype
        updates = {}
        for name, gradient in gradient_of.items():
            momentum = self.state[f"momentum.{name}"]
            momentum.lerp_(gradient, 1 - MUON_MOMENTUM)
            update = gradient.lerp(momentum, MUON_MOMENTUM)  # Nesterov
            updates[name] = update.to(dtype or update.dtype)
        directions = self._exchange.on_whole_matrices(updates, self._orthogonalised)
        kept = 1 - learning_rate * self.settings.weight_decay
        for name, direction in directions.items():
            rows, columns = self._shapes[name][-2:]
            rate = learning_rate * MUON_SCALE * max(rows // self._stacked[name], columns) ** 0.5
            self.parameters[name].mul_(kept).add_(direction, alpha=-rate)

    def _orthogonalised(self, updates: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each matrix of whole updates by itself; those of equal shape are computed together."""
        by_shape: dict[tuple[int, int], list[tuple[str, Tensor]]] = {}
        for name, update in updates.items():
            for matrices in _stacked(update).chunk(self._stacked[name], dim=1):
                shape = (matrices.shape[-2], matrices.shape[-1])
                by_shape.setdefault(shape, []).append((name, matrices))
        parts: dict[str, list[Tensor]] = {name: [] for name in updates}
        for found in by_shape.values():
            together = torch.cat([matrices for _, matrices in found])
            directions = orthogonalise(together, self.settings.newton_schulz)
            split = torch.split(directions, [len(matrices) for _, matrices in found])
            for (name, _), part in zip(found, split, strict=True):
                parts[name].append(part)
        return {
            name: torch.cat(found, dim=1).view_as(updates[name]) for name, found in parts.items()
        }


def _stacked(tensor: Tensor) -> Tensor:
    """A parameter as [n, rows, columns]."""
    return tensor if tensor.dim() == 3 else tensor[None]
