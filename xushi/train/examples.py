"""Short examples packed into batches: demonstrations for fine-tuning, sampled answers for
reinforcement learning.

Axes: B rows, T tokens of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from xushi.model import Batch


@dataclass(frozen=True)
class PackedExamples:
    """A batch, and where each example lies in it, as flat indices (row * T + column).

    Example i begins at `starts[i]`; `places[i]` are where its learned tokens are targets, in order.
    """

    batch: Batch
    starts: list[int]
    places: list[list[int]]


def pack_examples(
    examples: Sequence[tuple[Sequence[int], Sequence[bool]]], length: int, pad_id: int
) -> PackedExamples:
    """Lay (ids, learned) examples one after another into rows of `length` tokens, each its own
    segment.

    A row takes examples as long as they fit whole; an example longer than a row gets a row as long
    as itself, and then all rows are that long. Inputs are all ids but the last, targets all but the
    first; only learned targets are in the loss mask.
    """
    length = max([length, *(len(ids) - 1 for ids, _ in examples)])
    rows: list[list[int]] = []  # indices of the examples of each row
    room = 0
    for index, (ids, _) in enumerate(examples):
        if not rows or len(ids) - 1 > room:
            rows.append([])
            room = length
        rows[-1].append(index)
        room -= len(ids) - 1
    shape = (len(rows), length)
    tokens = torch.full(shape, pad_id, dtype=torch.int64)
    targets = torch.full(shape, pad_id, dtype=torch.int64)
    positions, segments = (
        torch.zeros(shape, dtype=torch.int64),
        torch.full(shape, -1, dtype=torch.int64),
    )
    mask = torch.zeros(shape, dtype=torch.bool)
    starts = [0] * len(examples)
    places: list[list[int]] = [[] for _ in examples]
    for row, members in enumerate(rows):
        start = 0
        for segment, index in enumerate(members):
            ids, learned = examples[index]
            end = start + len(ids) - 1
            tokens[row, start:end] = torch.tensor(ids[:-1])
            targets[row, start:end] = torch.tensor(ids[1:])
            positions[row, start:end] = torch.arange(end - start)
            segments[row, start:end] = segment
            mask[row, start:end] = torch.tensor(learned[1:])
            starts[index] = row * length + start
            places[index] = [
                starts[index] + i for i, is_learned in enumerate(learned[1:]) if is_learned
            ]
            start = end
    return PackedExamples(Batch(tokens, targets, mask, positions, segments), starts, places)
