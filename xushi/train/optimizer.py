"""AdamW, and Muon for matrices with AdamW for the rest.

Muon (Jordan et al. 2024) with Nesterov momentum, orthogonalised by Newton-Schulz and scaled to AdamW's update size by
0.2 * sqrt(max(rows, columns)) (Moonlight, Liu et al. 2025, arXiv:2502.16982, section 2.2), so that one learning rate
and one weight decay serve both. Each expert's gate, up and down matrix is orthogonalised by itself.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from xushi.ops import native

MUON_MOMENTUM = 0.95
MUON_SCALE = 0.2
ADAM_EPS = 1e-8
# Muon's quintic (Jordan et al. 2024): it inflates small singular values fast and leaves all within about 0.7 to 1.2.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def orthogonalise(matrices_NRC: Tensor, steps: int = NEWTON_SCHULZ_STEPS) -> Tensor:
    """Approximately U V^T of each matrix's singular value decomposition, by Newton-Schulz: [N, R, C] to the same.

    Computed in the dtype that comes in. bfloat16 serves: singular values end between 0.7 and 1.2 in any case.
    """
    a, b, c = NEWTON_SCHULZ
    wide = matrices_NRC.shape[-2] <= matrices_NRC.shape[-1]
    x = matrices_NRC if wide else matrices_NRC.mT
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    if x.dtype == torch.float32 and native.serves(x):  # pairs of bfloat16 err more than PyTorch's form
        iterated: Tensor = x.contiguous()
        native.newton_schulz(iterated, NEWTON_SCHULZ, steps)
        return iterated if wide else iterated.mT
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon takes this parameter: every matrix but the embedding and the head."""
    return _decays(name, parameter) and "embed_tokens" not in name and "lm_head" not in name


def _decays(name: str, parameter: Tensor) -> bool:
    """Whether it is weight, not a norm or a bias; V4's compressors have a bias with two axes."""
    return parameter.dim() >= 2 and not name.endswith("bias")


class Optimizer:
    """One optimizer over a model's named parameters; its state is addressed by their names.

    kind: "muon" or "adamw". Weight decay is decoupled and falls on matrices, embedding and head, never on norms and
    biases. Newton-Schulz runs in `newton_schulz_dtype`, or in the parameters' own; all else is in their own.
    """

    def __init__(self, model: nn.Module, kind: str, betas: tuple[float, float], weight_decay: float,
                 newton_schulz_dtype: torch.dtype | None = None) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.parameters = dict(named)
        self.betas, self.weight_decay = betas, weight_decay
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
        """Apply the gradients; parameters without one (an MTP layer that has no loss) are left alone.

        `adamw_learning_rate` is for what AdamW takes; the same if None.
        """
        self.steps += 1
        self._step_adam([n for n in self._adam if self.parameters[n].grad is not None],
                        learning_rate if adamw_learning_rate is None else adamw_learning_rate)
        self._step_muon([n for n in self._muon if self.parameters[n].grad is not None], learning_rate)

    def restart(self) -> None:
        """Forget all moments: what had no gradient so far begins like everything else."""
        self.steps = 0
        for tensor in self.state.values():
            tensor.zero_()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def _step_adam(self, names: list[str], learning_rate: float) -> None:
        if not names:
            return
        beta1, beta2 = self.betas
        rate, root = learning_rate / (1 - beta1**self.steps), (1 - beta2**self.steps) ** 0.5
        parameters: list[Tensor] = [self.parameters[n] for n in names]
        gradients = [_gradient(p) for p in parameters]
        means = [self.state[f"mean.{n}"] for n in names]
        squares = [self.state[f"square.{n}"] for n in names]
        if native.serves(*parameters, *gradients) and all(t.is_contiguous() for t in (*parameters, *gradients)):
            for name, p, g, mean, square in zip(names, parameters, gradients, means, squares, strict=True):
                native.adamw(p, g, mean, square, rate=rate, betas=self.betas, correction2=root, eps=ADAM_EPS,
                             decay=learning_rate * self.weight_decay if _decays(name, p) else 0.0)
            return
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        decayed: list[Tensor] = [p for n, p in zip(names, parameters, strict=True) if _decays(n, p)]
        if decayed:
            torch._foreach_mul_(decayed, 1 - learning_rate * self.weight_decay)
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_div_(denominators, root)
        torch._foreach_add_(denominators, ADAM_EPS)
        torch._foreach_addcdiv_(parameters, means, denominators, -rate)

    def _step_muon(self, names: list[str], learning_rate: float) -> None:
        by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for name in names:
            parameter = self.parameters[name]
            gradient, momentum = _gradient(parameter), self.state[f"momentum.{name}"]
            momentum.lerp_(gradient, 1 - MUON_MOMENTUM)
            update = gradient.lerp(momentum, MUON_MOMENTUM)  # Nesterov
            for weight, direction in zip(_matrices(name, parameter), _matrices(name, update), strict=True):
                by_shape.setdefault((weight.shape[-2], weight.shape[-1]), []).append((weight, direction))
        for (rows, columns), pairs in by_shape.items():
            directions = torch.cat([direction for _, direction in pairs])
            updates = orthogonalise(directions.to(self.newton_schulz_dtype or directions.dtype))
            rate = learning_rate * MUON_SCALE * max(rows, columns) ** 0.5
            sizes = [weight.shape[0] for weight, _ in pairs]
            for (weight, _), update in zip(pairs, torch.split(updates, sizes), strict=True):
                weight.mul_(1 - learning_rate * self.weight_decay).add_(update, alpha=-rate)


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        raise RuntimeError("a parameter without a gradient was to be stepped")
    return parameter.grad


def _matrices(name: str, tensor: Tensor) -> Iterable[Tensor]:
    """Views [n, rows, columns] of the published matrices inside a parameter; fused gate and up are two."""
    if name.endswith("gate_up_proj"):
        return list(tensor.chunk(2, dim=1))
    return [tensor if tensor.dim() == 3 else tensor[None]]


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> float:
    """Scale all gradients so that their joint norm is at most `limit`; returns the norm before."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.stack(torch._foreach_norm(gradients)).norm()
    torch._foreach_mul_(gradients, float((limit / (norm + 1e-6)).clamp(max=1.0)))
    return float(norm)
