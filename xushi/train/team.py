"""Processes that exchange small Python objects."""

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True)
class Team:
    """Processes that call the same methods in the same order; this one is `rank` of `size`.

    Objects are pickled on the way (torch.distributed), between the processes of one run only.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank; every process gets all of them."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast(self, value: Any) -> Any:
        """The value of rank 0."""
        return self.gather(value)[0]
