"""How training is laid out over processes: which rows of a batch and which shard of each parameter
a process has.

Processes form a grid of `pipeline` x `data`. A grid row is one pipeline stage, which holds some of
the layers; the processes of a grid column work on the same rows of the batch. Within a stage a
group of `expert` neighbours shares out the experts; `replica` = data / expert such groups hold the
same ones. Parameters of experts are sharded over the replicas, all others over all of `data`.

Not here: which layouts are possible (fitting), starting one (joining), sharding a model (sharding),
and how shards become files (checkpoint).
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from xushi.model import Batch
from xushi.train.boxes import Box
from xushi.train.fitting import expert_axis
from xushi.train.team import Team

if TYPE_CHECKING:  # a second of imports that one process alone does without
    from torch.distributed.device_mesh import DeviceMesh


@dataclass
class Layout:
    """One process's view: rank `rank` of `data` in stage `stage` of `pipeline`; `expert` neighbours
    share out the experts. The default is one process alone.

    `team` is all processes, for small objects; `writers` is the same for the threads that write
    checkpoints. `meshes` have one axis each: "data", "replica", "expert". `stage_groups` carry what
    goes to the next stage (1) and to the one before (-1). Once a model is sharded, `shapes` are
    those of its whole parameters. Where the last stage needs the embedding too,
    `shared_embedding` is this process's copy, and `embedding_group` is the first and the last
    stage, which add up its gradients.
    """

    data: int = 1
    pipeline: int = 1
    expert: int = 1
    rank: int = 0
    stage: int = 0
    device: str = "cpu"  # "cuda": this process's GPU
    meshes: "dict[str, DeviceMesh]" = field(default_factory=dict)
    stage_groups: dict[int, dist.ProcessGroup] = field(default_factory=dict)
    embedding_group: dist.ProcessGroup | None = None
    shared_embedding: nn.Parameter | None = None
    team: Team = field(default_factory=Team)
    writers: Team = field(default_factory=Team)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def replica(self) -> int:
        """How many groups hold the same experts."""
        return self.data // self.expert

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that speaks and writes for all."""
        return self.rank == 0 and self.stage == 0

    def neighbour(self, direction: int) -> int:
        """The global rank that has the same rows in the next stage (1) or the one before (-1)."""
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

    def rows(self, batch: Batch) -> Batch:
        """This process's rows of a whole batch, with rows of padding where they do not divide."""
        return batch.shard(self.rank, self.data)

    def box(self, name: str, rank: int | None = None) -> Box:
        """The shard of a parameter that this process (or rank `rank` of its stage) holds."""
        box = Box.whole(self.shapes[name])
        rank = self.rank if rank is None else rank
        if self.data == 1:
            return box
        if ".experts." not in name:
            return box.along(0, self.data, rank)
        box = box.along(0, self.expert, rank % self.expert)
        return box.along(expert_axis(box.size[0], self.replica), self.replica, rank // self.expert)

    @torch.no_grad()
    def add_shared_gradients(self) -> None:
        """Give the first and the last stage the sum of their gradients of the embedding.

        Where neither has a gradient, none is made.
        """
        embedding = self.shared_embedding
        if embedding is None:
            return
        has_gradient = embedding.grad is not None
        if embedding.grad is None:
            embedding.grad = torch.zeros_like(embedding)
        gradient = local(embedding.grad)
        both = torch.cat([gradient.flatten(), gradient.new_full((1,), float(has_gradient))])
        dist.all_reduce(both, group=self.embedding_group)
        gradient.copy_(both[:-1].view_as(gradient))
        if not both[-1]:
            embedding.grad = None


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, sharing its memory."""
    if not hasattr(tensor, "to_local"):  # only a DTensor has it
        return tensor
    with torch.no_grad():
        shard: Tensor = tensor.to_local()
    return shard
