"""QK-clip: attention scores kept below a limit by scaling down the query and key projections, head
by head.

Kimi K2 (arXiv:2507.20534, section 2.1, MuonClip): after a step in which a head's largest score S
exceeded the limit t, with g = t / S the head's queries and keys without rotation are each scaled by
sqrt(g), and its rotated queries by g, since the rotated key is shared by all heads. V4 does not
need it: its queries and keys are normed.

Axes: H heads, A attention layers.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from xushi.model import Deepseek, ModelConfig
from xushi.model.attention import MultiHeadLatentAttention
from xushi.train.layout import Layout, local


def _attentions(model: Deepseek) -> dict[str, MultiHeadLatentAttention]:
    """The latent attentions by their names."""
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
    """Scale down the heads whose largest score, over all data processes, was above `limit`.

    Returns each layer's largest score before.
    """
    found = _attentions(model)
    if not found:
        return {}
    largest_AH = torch.stack(
        [attention.largest_H for attention in found.values() if attention.largest_H is not None]
    )
    if layout.data > 1:
        dist.all_reduce(largest_AH, dist.ReduceOp.MAX, layout.group("data"))
    figures = {}
    for (name, attention), largest_H in zip(found.items(), largest_AH, strict=True):
        figures[f"attention.{name.split('.')[2]}.largest_score"] = float(largest_H.max())
        factor_H1 = torch.where(largest_H > limit, limit / largest_H, 1.0)[:, None]
        for part, rows_HW in _row_factors(factor_H1, model.config).items():
            weight: Tensor = local(getattr(attention, part).weight)
            shard = layout.box(f"{name}.{part}.weight").slices[0]
            weight.mul_(rows_HW.flatten()[shard, None])
    return figures


def _row_factors(factor_H1: Tensor, config: ModelConfig) -> dict[str, Tensor]:
    """What the rows of the two projections are multiplied by, head by head; exactly 1 where a head
    is within the limit.
    """
    root_H1 = factor_H1.sqrt()
    plain_HN = root_H1.expand(-1, config.qk_nope_head_dim)
    rotated_HR = factor_H1.expand(-1, config.qk_rope_head_dim)
    values_HV = torch.ones_like(root_H1).expand(-1, config.v_head_dim)
    query = "q_b_proj" if config.q_lora_rank is not None else "q_proj"
    return {
        query: torch.cat([plain_HN, rotated_HR], 1),
        "kv_b_proj": torch.cat([plain_HN, values_HV], 1),
    }
