"""QK-clip: attention scores kept below a limit by scaling down what makes queries and keys, head by
head.

Kimi K2 (arXiv:2507.20534, section 2.1, MuonClip): after a step in which a head's largest score S
went beyond the limit t, with g = t / S the head's queries and keys without rotation are each scaled
by sqrt(g), and its rotated queries by g, since the rotated key is shared by all heads. V4 has no
need of it: its queries and keys are normed.

Axes: H heads.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from xushi.model import Deepseek
from xushi.model.attention import MultiHeadLatentAttention
from xushi.train.layout import Layout, local


def _attentions(model: Deepseek) -> dict[str, MultiHeadLatentAttention]:
    """By their names."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, MultiHeadLatentAttention)
    }


def watch_scores(model: Deepseek) -> None:
    """Have every head remember its largest score from now on."""
    for attention in _attentions(model).values():
        weight = local(attention.o_proj.weight)
        attention.largest_H = torch.full(
            (model.config.num_attention_heads,),
            float("-inf"),
            dtype=weight.dtype,
            device=weight.device,
        )


@torch.no_grad()
def clip_scores(model: Deepseek, limit: float, layout: Layout) -> dict[str, float]:
    """Scale down the heads whose largest score, over all data processes, was above `limit`; each
    layer's largest.
    """
    config, found, figures = model.config, _attentions(model), {}
    if not found:
        return {}
    largest_AH = torch.stack(
        [attention.largest_H for attention in found.values() if attention.largest_H is not None]
    )
    if layout.data > 1:
        dist.all_reduce(largest_AH, dist.ReduceOp.MAX, layout.group("data"))
    for (name, attention), largest_H in zip(found.items(), largest_AH, strict=True):
        figures[f"attention.{name.split('.')[2]}.largest_score"] = float(largest_H.max())
        factor_H = torch.where(largest_H > limit, limit / largest_H, 1.0)[
            :, None
        ]  # exactly 1 for the others
        root_H = factor_H.sqrt()
        rotated = config.qk_rope_head_dim
        query = "q_b_proj" if config.q_lora_rank is not None else "q_proj"
        for part, rows_HW in (
            (
                query,
                torch.cat(
                    [root_H.expand(-1, config.qk_nope_head_dim), factor_H.expand(-1, rotated)], 1
                ),
            ),
            (
                "kv_b_proj",
                torch.cat(
                    [
                        root_H.expand(-1, config.qk_nope_head_dim),
                        torch.ones_like(root_H).expand(-1, config.v_head_dim),
                    ],
                    1,
                ),
            ),
        ):
            weight: Tensor = local(getattr(attention, part).weight)
            here = layout.box(f"{name}.{part}.weight").slices[0]
            weight.mul_(rows_HW.flatten()[here, None])
    return figures
