"""Short examples packed into batches: demonstrations for fine-tuning, sampled episodes for
reinforcement learning.

Axes: B rows, T tokens of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from xushi.model import Batch
from xushi.model.batch import PADDING_SEGMENT

Example = tuple[Sequence[int], Sequence[bool]]  # token ids, and which of them are learned


@dataclass(frozen=True)
class PackedExamples:
    """A batch, and where each example lies in it, as flat indices (row * T + column).

    Example i begins at `starts[i]`; `places[i]` are where its learned tokens are targets, in order.
    """

    batch: Batch
    starts: list[int]
    places: list[list[int]]


def pack_examples(examples: Sequence[Example], length: int, pad_id: int) -> PackedExamples:
    """Lay examples one after another into rows of `length` tokens, each its own segment.

    A row takes examples as long as they fit whole; an example longer than a row gets a row as long
    as itself, and then all rows are that long. Inputs are all ids but the last, targets all but the
    first; only learned targets are in the loss mask.
    """
    length = max([length, *(len(ids) - 1 for ids, _ in examples)])
    rows = _rows(examples, length)
    batch = _empty(len(rows), length, pad_id)
    starts = [0] * len(examples)
    places: list[list[int]] = [[] for _ in examples]
    for row, members in enumerate(rows):
        start = 0
        for segment, index in enumerate(members):
            ids, learned = examples[index]
            end = start + len(ids) - 1
            batch.tokens[row, start:end] = torch.tensor(ids[:-1])
            batch.targets[row, start:end] = torch.tensor(ids[1:])
            batch.positions[row, start:end] = torch.arange(end - start)
            batch.segments[row, start:end] = segment
            batch.loss_mask[row, start:end] = torch.tensor(learned[1:])
            starts[index] = row * length + start
            places[index] = [starts[index] + i for i, wanted in enumerate(learned[1:]) if wanted]
            start = end
    return PackedExamples(batch, starts, places)


def _rows(examples: Sequence[Example], length: int) -> list[list[int]]:
    """The indices of each row's examples: in order, as many as fit."""
    rows: list[list[int]] = []
    left = 0
    for index, (ids, _) in enumerate(examples):
        if not rows or len(ids) - 1 > left:
            rows.append([])
            left = length
        rows[-1].append(index)
        left -= len(ids) - 1
    return rows


def _empty(rows: int, length: int, pad_id: int) -> Batch:
    """A batch of padding."""
    shape = (rows, length)
    return Batch(
        tokens=torch.full(shape, pad_id, dtype=torch.int64),
        targets=torch.full(shape, pad_id, dtype=torch.int64),
        loss_mask=torch.zeros(shape, dtype=torch.bool),
        positions=torch.zeros(shape, dtype=torch.int64),
        segments=torch.full(shape, PADDING_SEGMENT, dtype=torch.int64),
    )
