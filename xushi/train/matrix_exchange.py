"""Whole matrices from shards that are spread over processes: each is put together in one process,
worked on, and its shards are sent back. So Newton-Schulz is computed once per matrix, and the work
is shared.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from xushi.train.boxes import Box
from xushi.train.fitting import expert_axis
from xushi.train.layout import Layout


class MatrixExchange:
    """For parameters by name; every process must hold shards of the same ones."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def on_whole_matrices(
        self, parts: dict[str, Tensor], work: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Apply `work` to whole matrices, to this process's share of them.

        `parts` are this process's shards; returned are the same shards of the results.
        """
        own = {name: part for name, part in parts.items() if self._has_whole_matrices(name)}
        shared = {
            axis: [
                name
                for name in parts
                if name not in own and (".experts." in name) == (axis == "replica")
            ]
            for axis in ("data", "replica")
        }
        owners = {axis: self._owners(names, axis) for axis, names in shared.items()}
        whole = dict(own)
        for axis, names in shared.items():
            if names:
                whole |= self._gather(axis, {name: parts[name] for name in names}, owners[axis])
        results = work({name: whole[name] for name in parts if name in whole}) if whole else {}
        found = {name: results[name] for name in own}
        for axis, names in shared.items():
            if names:
                found |= self._scatter(
                    axis,
                    {name: results[name] for name in names if name in results},
                    {name: parts[name] for name in names},
                    owners[axis],
                )
        return found

    def _has_whole_matrices(self, name: str) -> bool:
        """Whether every process holds whole matrices of a parameter; all give the same answer."""
        layout = self.layout
        if layout.data == 1:
            return True
        return (
            ".experts." in name
            and expert_axis(layout.shapes[name][0] // layout.expert, layout.replica) == 0
        )

    def _members(self, axis: str) -> list[int]:
        """The ranks of this process's group along an axis, in order."""
        layout = self.layout
        if axis == "data":
            return list(range(layout.data))
        return list(range(layout.rank % layout.expert, layout.data, layout.expert))

    def _owners(self, names: list[str], axis: str) -> dict[str, int]:
        """Which member of the group puts each matrix together.

        The largest matrix comes first; each goes to the member with the least work so far.
        """
        load = [0] * len(self._members(axis))
        owners = {}
        for name in sorted(
            names, key=lambda name: (-torch.Size(self.layout.shapes[name]).numel(), name)
        ):
            owners[name] = load.index(min(load))
            load[owners[name]] += torch.Size(self.layout.shapes[name]).numel()
        return owners

    def _gather(
        self, axis: str, parts: dict[str, Tensor], owners: dict[str, int]
    ) -> dict[str, Tensor]:
        members = self._members(axis)
        me = members.index(self.layout.rank)
        mine = [name for name in parts if owners[name] == me]
        outgoing = [
            [parts[name] for name in parts if owners[name] == other]
            for other in range(len(members))
        ]
        incoming = [[self._group_box(name, rank) for name in mine] for rank in members]
        received = self._swap(
            axis, outgoing, [[box.size for box in boxes] for boxes in incoming], parts
        )
        whole = {}
        for place, name in enumerate(mine):
            whole[name] = next(iter(parts.values())).new_empty(self._group_shape(name))
            for boxes, shards in zip(incoming, received, strict=True):
                whole[name][boxes[place].slices] = shards[place]
        return whole

    def _scatter(
        self, axis: str, whole: dict[str, Tensor], parts: dict[str, Tensor], owners: dict[str, int]
    ) -> dict[str, Tensor]:
        members = self._members(axis)
        me = members.index(self.layout.rank)
        mine = [name for name in parts if owners[name] == me]
        outgoing = [
            [whole[name][self._group_box(name, rank).slices] for name in mine] for rank in members
        ]
        wanted = [
            [name for name in parts if owners[name] == other] for other in range(len(members))
        ]
        received = self._swap(
            axis,
            outgoing,
            [[tuple(parts[name].shape) for name in names] for names in wanted],
            parts,
        )
        return {
            name: shard
            for names, shards in zip(wanted, received, strict=True)
            for name, shard in zip(names, shards, strict=True)
        }

    def _swap(
        self,
        axis: str,
        outgoing: list[list[Tensor]],
        shapes: list[list[tuple[int, ...]]],
        like: dict[str, Tensor],
    ) -> list[list[Tensor]]:
        """Send each member its tensors; returns what the members sent, cut into these shapes."""
        example = next(iter(like.values()))
        sizes = [[torch.Size(shape).numel() for shape in group] for group in shapes]
        flat = torch.cat(
            [example.new_empty(0), *(tensor.flatten() for group in outgoing for tensor in group)]
        )
        result = example.new_empty(sum(map(sum, sizes)))
        dist.all_to_all_single(
            result,
            flat,
            [sum(group) for group in sizes],
            [sum(tensor.numel() for tensor in group) for group in outgoing],
            group=self.layout.group(axis),
        )
        chunks = iter(torch.split(result, [size for group in sizes for size in group]))
        return [[next(chunks).view(shape) for shape in group] for group in shapes]

    def _group_shape(self, name: str) -> tuple[int, ...]:
        """The shape of the parameter that a group holds: of stacked experts, only the group's."""
        shape = self.layout.shapes[name]
        return (shape[0] // self.layout.expert, *shape[1:]) if ".experts." in name else shape

    def _group_box(self, name: str, rank: int) -> Box:
        """A member's shard of that parameter."""
        box, shape = self.layout.box(name, rank), self._group_shape(name)
        return Box(
            shape,
            (box.start[0] % shape[0] if ".experts." in name else box.start[0], *box.start[1:]),
            box.size,
        )
