"""Boxes: the parts along an axis are those of torch.chunk, and blocks meet where their slices do."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from xushi.train.boxes import Box


@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 7), st.integers(0, 1))
def test_parts_are_those_of_chunk(rows: int, columns: int, parts: int, axis: int) -> None:
    tensor = torch.arange(rows * columns).view(rows, columns)
    boxes = [Box.whole(tensor.shape).along(axis, parts, number) for number in range(parts)]
    chunks = torch.chunk(tensor, parts, dim=axis)
    for number, box in enumerate(boxes):
        found = tensor[box.slices]
        if number < len(chunks):
            assert torch.equal(found, chunks[number])
        else:
            assert found.numel() == 0


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    """A block of a tensor of shape [7, 5]."""
    start = (draw(st.integers(0, 6)), draw(st.integers(0, 4)))
    size = (draw(st.integers(1, 7 - start[0])), draw(st.integers(1, 5 - start[1])))
    return Box((7, 5), start, size)


@given(boxes(), boxes())
def test_what_two_blocks_share(one: Box, other: Box) -> None:
    tensor = torch.arange(35).view(7, 5)
    numbers = set(tensor[one.slices].flatten().tolist()) & set(
        tensor[other.slices].flatten().tolist()
    )
    common = one.common(other)
    if common is None:
        assert not numbers
        return
    assert set(tensor[common.slices].flatten().tolist()) == numbers
    assert torch.equal(tensor[one.slices][common.within(one)], tensor[common.slices])
