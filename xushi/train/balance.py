"""Router biases that keep experts equally busy, and figures that tell whether they do.

Axes: E experts.
"""

import torch
from torch import Tensor

from xushi.model import Deepseek


@torch.no_grad()
def update_router_biases(model: Deepseek, loads: dict[str, Tensor], speed: float) -> None:
    """Once per optimizer step: b_e += speed * sign(mean load - load_e), then the mean is taken off.

    The rule is V3's (arXiv:2412.19437, section 2.1.2) on the batch's global counts; without
    centring the biases would drift together, since the signs need not sum to zero. Routers without
    a bias (V2's) are left to the balance loss.
    """
    routers = model.routers()
    for name, load_E in loads.items():
        bias_E = routers[name].e_score_correction_bias
        if bias_E is None:
            continue
        bias_E += speed * torch.sign(load_E.mean() - load_E)
        bias_E -= bias_E.mean()


def router_health(model: Deepseek, loads: dict[str, Tensor]) -> dict[str, float]:
    """Per MoE layer: the share of each expert, the maximal violation, the number of experts that no
    token chose, and the largest bias.

    Maximal violation is (largest load - mean) / mean (Wang et al. 2024, arXiv:2408.15664, eq. 4).
    """
    routers = model.routers()
    values: dict[str, float] = {}
    for name, load_E in loads.items():
        load_E = load_E.cpu()  # once, not for each figure
        mean = float(load_E.mean())
        values[f"router.{name}.max_violation"] = (
            (float(load_E.max()) - mean) / mean if mean else 0.0
        )
        values[f"router.{name}.dead_experts"] = float((load_E == 0).sum())
        if (bias_E := routers[name].e_score_correction_bias) is not None:
            values[f"router.{name}.bias_drift"] = float(bias_E.abs().max())
        share = (load_E / load_E.sum().clamp(min=1)).tolist()
        values |= {f"router.{name}.load.{expert}": value for expert, value in enumerate(share)}
    return values
