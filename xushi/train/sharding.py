"""Sharding a model as a layout says: FSDP2 over the data processes, experts shared out before.

The model stays as it was written for one process: FSDP2 gathers a layer's parameters around its
use and adds up gradients, and experts get a dispatch.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from xushi.model import Deepseek
from xushi.model.moe import Experts, MixtureOfExperts
from xushi.train.expert_parallel import ExpertDispatch
from xushi.train.fitting import expert_axis, needs_embedding_twice, stage_layers
from xushi.train.layout import Layout, local

if TYPE_CHECKING:
    from torch.distributed.tensor import Shard


def shard(model: Deepseek, layout: Layout) -> Deepseek:
    """Keep in `model` this process's layers and shards, and let it run as if it had all of them.

    Sets `layout.shapes` and `layout.shared_embedding`.
    """
    if layout.pipeline > 1:
        model.keep_layers(*stage_layers(model.config, layout.pipeline)[layout.stage])
    layout.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if layout.data > 1:
        _shard_over_data(model, layout)
        for name, parameter in model.named_parameters():
            assert tuple(local(parameter).shape) == layout.box(name).size, name
    shares = layout.pipeline > 1 and needs_embedding_twice(model.config)
    if shares and (model.begins or model.ends):
        layout.shared_embedding = model.get_parameter("model.embed_tokens.weight")
    return model


def _shard_over_data(model: Deepseek, layout: Layout) -> None:
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    data = layout.meshes["data"]
    # Microbatches of a pipeline follow each other: to gather parameters again for each would
    # cost more than the memory it saves.
    reshard = layout.pipeline == 1
    for layer in model.model.layers.values():
        if isinstance(layer.mlp, MixtureOfExperts):
            _shard_experts(layer.mlp.experts, layout, reshard)
        fully_shard(layer, mesh=data, reshard_after_forward=reshard)
        if hasattr(layer, "predict"):
            register_fsdp_forward_method(layer, "predict")
    fully_shard(model, mesh=data)
    register_fsdp_forward_method(model, "hidden")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The processes' losses add up to the batch's.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no sum that multiplies


def _shard_experts(experts: Experts, layout: Layout, reshard: bool) -> None:
    """Keep this process's experts, then shard them over the replicas."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    _share_out(experts, layout)
    cut = Shard(expert_axis(experts.gate_up_proj.shape[0], layout.replica))
    fully_shard(
        experts,
        mesh=layout.meshes["replica"],
        shard_placement_fn=_always(cut),
        reshard_after_forward=reshard,
    )


def _share_out(experts: Experts, layout: Layout) -> None:
    """Keep this process's experts of those of its group."""
    if layout.expert == 1:
        return
    each = experts.gate_up_proj.shape[0] // layout.expert
    first = layout.rank % layout.expert * each
    for name in ("gate_up_proj", "down_proj"):
        kept = getattr(experts, name).detach()[first : first + each].clone()
        setattr(experts, name, nn.Parameter(kept))
    experts.dispatch = ExpertDispatch(layout.group("expert"), each)


def _always(placement: "Shard") -> "Callable[[nn.Parameter], Shard]":
    return lambda _: placement
