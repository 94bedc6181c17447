"""How training is spread over processes: which rows of a batch and which part of each parameter a
process has.

The model stays as it was written for one: FSDP2 gathers a layer's parameters around its use and
adds up gradients, and experts get a dispatch. Everything else asks the layout. Not here: the loop,
and how parts become files (checkpoint).

Processes stand in `pipeline` rows of `data`: a row is a stage, which has some of the layers, and a
column shares the rows of its part of the batch. Within a stage a group of `expert` neighbours
shares out the experts; `replica` = data / expert such groups hold the same ones. Parameters of
experts are sharded over the replicas, all others over all of data.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from xushi.base.errors import BadInput
from xushi.model import Batch, Deepseek, ModelConfig
from xushi.model.moe import Experts, MixtureOfExperts
from xushi.train.config import LayoutConfig
from xushi.train.expert_parallel import ExpertDispatch

if TYPE_CHECKING:  # a second of imports that one process alone does without
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard

SECONDS_TO_WAIT = 24 * 3600  # for another process: one of them may be reading a corpus


@dataclass(frozen=True)
class Box:
    """The part of a tensor that a process holds: where it starts along each axis, and its size."""

    shape: tuple[int, ...]  # of the whole tensor
    start: tuple[int, ...]
    size: tuple[int, ...]

    @classmethod
    def whole(cls, shape: torch.Size | tuple[int, ...]) -> "Box":
        """All of it."""
        return cls(tuple(shape), (0,) * len(shape), tuple(shape))

    def along(self, axis: int, parts: int, number: int) -> "Box":
        """Part `number` of `parts` along an axis, as torch.chunk and FSDP2 cut: all as long as the
        first but the last ones.
        """
        length = -(-self.size[axis] // parts)
        begin = min(number * length, self.size[axis])
        start, size = list(self.start), list(self.size)
        start[axis] += begin
        size[axis] = min(length, self.size[axis] - begin)
        return Box(self.shape, tuple(start), tuple(size))

    @property
    def slices(self) -> tuple[slice, ...]:
        """Of the whole tensor."""
        return tuple(slice(a, a + n) for a, n in zip(self.start, self.size, strict=True))

    def common(self, other: "Box") -> "Box | None":
        """What lies in both, or None."""
        start = tuple(map(max, self.start, other.start))
        size = tuple(
            min(a + n, b + m) - s
            for a, n, b, m, s in zip(
                self.start, self.size, other.start, other.size, start, strict=True
            )
        )
        return Box(self.shape, start, size) if all(n > 0 for n in size) else None

    def within(self, outer: "Box") -> tuple[slice, ...]:
        """Its slices of a tensor that holds `outer`."""
        return tuple(
            slice(a - b, a - b + n)
            for a, n, b in zip(self.start, self.size, outer.start, strict=True)
        )


@dataclass(frozen=True)
class Team:
    """Processes that do something together, in the same order: this one is `rank` of `size`."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def gather(self, value: Any) -> list[Any]:
        """What each process gave, in their order."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast(self, value: Any) -> Any:
        """What the first process gave."""
        return self.gather(value)[0]


@dataclass
class Layout:
    """One process's view: `rank` of `data` in stage `stage` of `pipeline`; experts are shared by
    groups of `expert`. Alone, nothing is spread.
    """

    data: int = 1
    pipeline: int = 1
    expert: int = 1
    rank: int = 0
    stage: int = 0
    device: str = "cpu"  # "cuda": this process's GPU
    meshes: "dict[str, DeviceMesh]" = field(
        default_factory=dict
    )  # of one axis each: "data", "replica", "expert"
    ways: dict[int, dist.ProcessGroup] = field(
        default_factory=dict
    )  # for what goes on a stage (1) and back (-1)
    # The first and the last stage both have the embedding, where the last needs it, and add up its
    # gradients here.
    sharers: dist.ProcessGroup | None = None
    shared: nn.Parameter | None = None
    team: Team = field(default_factory=Team)  # all of them, for small things
    writers: Team = field(default_factory=Team)  # the same, for the threads that write checkpoints
    shapes: dict[str, tuple[int, ...]] = field(
        default_factory=dict
    )  # of the whole parameters, once a model is spread

    @property
    def replica(self) -> int:
        """How many groups hold the same experts."""
        return self.data // self.expert

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that speaks and writes for all."""
        return self.rank == 0 and self.stage == 0

    def neighbour(self, direction: int) -> int:
        """The process that has the same rows in the next stage (1) or the one before (-1)."""
        return (self.stage + direction) * self.data + self.rank

    def group(self, axis: str) -> dist.ProcessGroup:
        """The processes along an axis: "data", "replica" or "expert"."""
        return self.meshes[axis].get_group()

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of the tensors of the data processes, of one stage."""
        if self.data == 1:
            return tensor
        result = tensor.clone()
        dist.all_reduce(result, group=self.group("data"))
        return result

    def grand_total(self, tensor: Tensor) -> Tensor:
        """The sum of all processes' tensors."""
        if self.pipeline == 1:
            return self.total(tensor)
        result = tensor.clone()
        dist.all_reduce(result)
        return result

    def add_shared_gradients(self) -> None:
        """Give the first and the last stage the sum of their gradients of the embedding, if either
        has one.
        """
        if self.shared is None:
            return
        with torch.no_grad():
            if (there := self.shared.grad is not None) is False:
                self.shared.grad = torch.zeros_like(self.shared)
            gradient = local(self.shared.grad)  # type: ignore[arg-type]
            both = torch.cat([gradient.flatten(), gradient.new_full((1,), float(there))])
            dist.all_reduce(both, group=self.sharers)
            gradient.copy_(both[:-1].view_as(gradient))
            if not both[-1]:
                self.shared.grad = None

    def rows(self, batch: Batch) -> Batch:
        """This process's rows of a whole batch; rows of padding are put below where they do not
        divide.
        """
        return batch.shard(self.rank, self.data)

    def box(self, name: str, rank: int | None = None) -> Box:
        """The part of a parameter that this process (or another) holds."""
        box = Box.whole(self.shapes[name])
        rank = self.rank if rank is None else rank
        if self.data == 1:
            return box
        if ".experts." not in name:
            return box.along(0, self.data, rank)
        box = box.along(0, self.expert, rank % self.expert)
        return box.along(expert_axis(box.size[0], self.replica), self.replica, rank // self.expert)

    def spread(self, model: Deepseek) -> Deepseek:
        """Leave in `model` this process's part of each parameter, and let it run as if all were
        there.
        """
        if self.pipeline > 1:
            model.keep_layers(*stage_layers(model.config, self.pipeline)[self.stage])
        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        if self.data > 1:
            self._shard(model)
        if (
            self.pipeline > 1
            and needs_embedding_twice(model.config)
            and (model.begins or model.ends)
        ):
            self.shared = model.get_parameter("model.embed_tokens.weight")
        return model

    def _shard(self, model: Deepseek) -> None:
        """By FSDP2; experts are shared out before."""
        from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
        from torch.distributed.tensor import Shard

        data, replica = self.meshes["data"], self.meshes["replica"]
        # A pipeline's pieces follow each other: gathering parameters anew for each would cost more
        # than it saves.
        reshard = self.pipeline == 1
        for layer in model.model.layers.values():
            if isinstance(layer.mlp, MixtureOfExperts):
                self._share_out(layer.mlp.experts)
                cut = Shard(expert_axis(layer.mlp.experts.gate_up_proj.shape[0], self.replica))
                fully_shard(
                    layer.mlp.experts,
                    mesh=replica,
                    shard_placement_fn=_always(cut),
                    reshard_after_forward=reshard,
                )
            fully_shard(layer, mesh=data, reshard_after_forward=reshard)
            if hasattr(layer, "predict"):
                register_fsdp_forward_method(layer, "predict")
        fully_shard(model, mesh=data)
        register_fsdp_forward_method(model, "hidden")
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(
                    1.0
                )  # the processes' losses add up to the batch's
                module.set_force_sum_reduction_for_comms(True)  # gloo has no sum that multiplies
        for name, parameter in model.named_parameters():
            assert tuple(local(parameter).shape) == self.box(name).size, name

    def _share_out(self, experts: Experts) -> None:
        """Keep this process's experts."""
        if self.expert == 1:
            return
        here = experts.gate_up_proj.shape[0] // self.expert
        first = self.rank % self.expert * here
        for name in ("gate_up_proj", "down_proj"):
            setattr(
                experts,
                name,
                nn.Parameter(getattr(experts, name).detach()[first : first + here].clone()),
            )
        experts.dispatch = ExpertDispatch(self.group("expert"), here)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that is here, sharing its memory."""
    if not hasattr(tensor, "to_local"):  # a DTensor's
        return tensor
    with torch.no_grad():
        here: Tensor = tensor.to_local()
    return here


def _always(placement: "Shard") -> "Callable[[nn.Parameter], Shard]":
    return lambda _: placement


def expert_axis(experts: int, replica: int) -> int:
    """The axis along which replicas cut stacked experts: whole experts where they divide, else
    their rows.
    """
    return 0 if experts % replica == 0 else 1


def started_processes() -> tuple[int, int]:
    """(rank, how many) by the environment that torchrun sets; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def stage_layers(model: ModelConfig, stages: int) -> list[tuple[int, int]]:
    """(first, end) of each stage's layers of the trunk: as even as can be, MTP layers and the head
    counting as layers of the last stage; each has one at least.
    """
    depth, behind = model.num_hidden_layers, model.num_nextn_predict_layers + 1
    ends = [
        min(
            max(round((depth + behind) * (stage + 1) / stages), stage + 1),
            depth - (stages - 1 - stage),
        )
        for stage in range(stages)
    ]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def needs_embedding_twice(model: ModelConfig) -> bool:
    """Whether a last stage needs the embedding, for MTP layers or as the head."""
    return model.num_nextn_predict_layers > 0 or model.tie_word_embeddings


def check_layout(config: LayoutConfig, model: ModelConfig, processes: int, rows: int = 0) -> None:
    """Raise a `XushiError` with the nearest layout that works if this one does not fit processes,
    model or batch.

    `rows` of a whole batch must divide, or some processes would wait for others at each step;
    `fewest` allows that.
    """
    if processes < (config.fewest or 1):
        raise BadInput(
            f"layout.fewest={config.fewest} and {processes} processes were started",
            f"start {config.fewest}, or set layout.fewest={processes}",
        )
    stages, depth = config.pipeline, model.num_hidden_layers
    if stages > depth:
        raise BadInput(
            f"layout.pipeline={stages} has more stages than the model's {depth} layers",
            f"set layout.pipeline={depth} or less",
        )
    if processes % stages:
        divisor = min(
            (n for n in range(1, min(depth, processes) + 1) if processes % n == 0),
            key=lambda n: (abs(n - stages), n),
        )
        raise BadInput(
            f"layout.pipeline={stages} does not divide the {processes} processes that were started",
            f"set layout.pipeline={divisor}, or start a multiple of {stages}",
        )
    data = config.data or processes // stages
    if data * stages != processes:
        raise BadInput(
            f"layout.data={data} times layout.pipeline={stages} is {data * stages}, and "
            f"{processes} "
            "processes were started",
            f"start {data * stages} (torchrun --nproc-per-node {data * stages})"
            f", or set layout.data={processes // stages}",
        )
    if rows % data and config.fewest is None:
        divisor = min(
            (n for n in range(1, rows + 1) if rows % n == 0), key=lambda n: (abs(n - data), n)
        )
        raise BadInput(
            f"a batch of {rows} rows does not divide among layout.data={data} processes",
            f"start {divisor * stages} processes, take {-(-rows // data) * data} rows "
            "(pretrain.batch_tokens), or set layout.fewest, which allows unequal shares",
        )
    experts = (
        model.n_routed_experts if any(map(model.is_moe, range(model.num_hidden_layers))) else 1
    )
    fitting = [
        n
        for n in range(1, data + 1)
        if data % n == 0 and experts % n == 0 and _divides(model, experts // n, data // n)
    ]
    if config.expert not in fitting:
        nearest = min(fitting, key=lambda n: (abs(n - config.expert), n)) if fitting else None
        remedy = (
            f"set layout.expert={nearest}"
            if nearest is not None
            else "start a number of processes that divides the experts or their width"
        )
        raise BadInput(
            f"layout.expert={config.expert} does not work with layout.data={data} and {experts} "
            "experts "
            f"of width {model.moe_intermediate_size}",
            remedy,
        )


def _divides(model: ModelConfig, here: int, replica: int) -> bool:
    """Whether `here` experts can be cut for so many replicas: FSDP2 cuts other axes than the first
    evenly only.
    """
    return here % replica == 0 or not (
        2 * model.moe_intermediate_size % replica or model.hidden_size % replica
    )


def join(config: LayoutConfig, model: ModelConfig, device: str = "cpu", rows: int = 0) -> Layout:
    """The layout of the processes that were started, this one among them; alone where there is but
    one.

    Raises `XushiError` as `check_layout` does, and for more processes than GPUs.
    """
    rank, processes = started_processes()
    check_layout(config, model, processes, rows)
    if device == "cuda":
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # so that products have the same bits each time
        torch.use_deterministic_algorithms(True)
        number, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if number >= there:
            raise BadInput(
                f"process {rank} is number {number} of its machine (from 0), which has {there} "
                "GPUs",
                'start one process for each GPU, or set device = "cpu"',
            )
        torch.cuda.set_device(number)
    if processes == 1:
        return Layout(device=device)
    if not dist.is_initialized():
        dist.init_process_group(
            "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl",
            timeout=timedelta(seconds=SECONDS_TO_WAIT),
        )
    from torch.distributed.device_mesh import init_device_mesh

    stages, forever = config.pipeline, timedelta(seconds=SECONDS_TO_WAIT)
    data = processes // stages
    stage, place = divmod(rank, data)
    trunk = init_device_mesh(device, (stages, data), mesh_dim_names=("stage", "data"))
    experts = init_device_mesh(
        device,
        (stages, data // config.expert, config.expert),
        mesh_dim_names=("stage", "replica", "expert"),
    )
    meshes = {"data": trunk["data"], "replica": experts["replica"], "expert": experts["expert"]}
    # Objects travel by gloo on any device, and the writing threads must not meet the training's own
    # calls.
    talk, write = (
        Team(rank, processes, dist.new_group(backend="gloo", timeout=forever)) for _ in range(2)
    )
    layout = Layout(
        data, stages, config.expert, place, stage, device, meshes, team=talk, writers=write
    )
    if stages > 1:
        layout.ways = {way: dist.new_group(timeout=forever) for way in (-1, 1)}
        for column in range(data):
            sharers = dist.new_group([column, (stages - 1) * data + column], timeout=forever)
            if column == place:
                layout.sharers = sharers
    return layout
