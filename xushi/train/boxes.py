"""Where a shard lies in its whole tensor."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Box:
    """A block of a tensor: where it starts along each axis of the whole tensor, and its size."""

    shape: tuple[int, ...]  # of the whole tensor
    start: tuple[int, ...]
    size: tuple[int, ...]

    @classmethod
    def whole(cls, shape: torch.Size | tuple[int, ...]) -> "Box":
        """The block that is all of a tensor of this shape."""
        return cls(tuple(shape), (0,) * len(shape), tuple(shape))

    def along(self, axis: int, parts: int, number: int) -> "Box":
        """Part `number` of `parts` along an axis, cut as torch.chunk and FSDP2 cut.

        All parts are as long as the first, except that the last ones may be shorter or empty.
        """
        length = -(-self.size[axis] // parts)
        begin = min(number * length, self.size[axis])
        start = list(self.start)
        size = list(self.size)
        start[axis] += begin
        size[axis] = min(length, self.size[axis] - begin)
        return Box(self.shape, tuple(start), tuple(size))

    @property
    def slices(self) -> tuple[slice, ...]:
        """Its slices of the whole tensor."""
        return tuple(slice(a, a + n) for a, n in zip(self.start, self.size, strict=True))

    def common(self, other: "Box") -> "Box | None":
        """The block that lies in both, None if there is none."""
        start = tuple(map(max, self.start, other.start))
        ends = zip(self.start, self.size, other.start, other.size, strict=True)
        end = tuple(min(a + n, b + m) for a, n, b, m in ends)
        size = tuple(e - a for a, e in zip(start, end, strict=True))
        return Box(self.shape, start, size) if all(n > 0 for n in size) else None

    def within(self, outer: "Box") -> tuple[slice, ...]:
        """Its slices of a tensor that holds the block `outer`."""
        return tuple(
            slice(a - b, a - b + n)
            for a, n, b in zip(self.start, self.size, outer.start, strict=True)
        )
