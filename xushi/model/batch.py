"""The batch that training, evaluation and reinforcement learning share: five tensors of one shape.

Not here: how documents or examples become rows (data, train/examples).

Axes: B rows, T tokens of a row.
"""

from typing import NamedTuple

import torch
from torch import Tensor

PADDING_SEGMENT = -1  # of a place that belongs to no document


class Batch(NamedTuple):
    """All [B, T]; int64 except `loss_mask`, which is bool.

    `positions` restart at 0 with every segment. `segments` count from 0 in each row; padding has
    segment -1 and loss_mask False. Nothing looks across a segment border. The field names are the
    tensors' names in files and in hashes.
    """

    tokens: Tensor
    targets: Tensor
    loss_mask: Tensor
    positions: Tensor
    segments: Tensor

    @property
    def rows(self) -> int:
        """How many rows it has."""
        return self.tokens.shape[0]

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on another device."""
        return Batch(*(tensor.to(device) for tensor in self))

    def split(self, parts: int) -> "list[Batch]":
        """The rows in `parts` consecutive batches, nearly equal: the first ones have one row
        more.
        """
        columns = [tensor.tensor_split(parts) for tensor in self]
        return [Batch(*column) for column in zip(*columns, strict=True)]

    def padded(self, rows: int) -> "Batch":
        """With rows of padding below, so that there are `rows` at least."""
        missing = rows - self.rows
        if missing <= 0:
            return self
        fill = {"segments": PADDING_SEGMENT}
        return Batch(
            *(
                torch.cat([tensor, tensor.new_full((missing, tensor.shape[1]), fill.get(name, 0))])
                for name, tensor in self._asdict().items()
            )
        )

    def shard(self, rank: int, of: int) -> "Batch":
        """The rows of rank `rank` of `of`, as many for each; padded where they do not divide."""
        if of == 1:
            return self
        whole = self.padded(-(-self.rows // of) * of)
        return Batch(*(tensor.chunk(of)[rank] for tensor in whole))
