"""The batch: its rows shared out, padded and cut are the same rows in the same order."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from xushi.model import Batch


def made(rows: int, width: int = 3) -> Batch:
    """Every value of `tokens` is unique; nothing in it looks like padding."""
    tokens = torch.arange(1, rows * width + 1).view(rows, width)
    return Batch(tokens, tokens + 1, tokens > 0, tokens - 1, torch.zeros_like(tokens))


def joined(parts: list[Batch]) -> Batch:
    return Batch(*map(torch.cat, zip(*parts, strict=True)))


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


@given(st.integers(1, 20), st.integers(1, 9))
def test_shards_are_the_rows_and_padding_below(rows: int, of: int) -> None:
    whole = made(rows)
    shards = [whole.shard(rank, of) for rank in range(of)]
    assert len({shard.rows for shard in shards}) == 1
    back = joined(shards)
    assert same(Batch(*(tensor[:rows] for tensor in back)), whole) and back.rows - rows < of
    assert (back.segments[rows:] == -1).all() and not back.loss_mask[rows:].any()
    assert not back.tokens[rows:].any() and not back.positions[rows:].any()


@given(st.integers(1, 20), st.integers(1, 9))
def test_split_is_nearly_equal_and_in_order(rows: int, parts: int) -> None:
    pieces = made(rows).split(min(rows, parts))
    sizes = [piece.rows for piece in pieces]
    assert same(joined(pieces), made(rows)) and max(sizes) - min(sizes) <= 1


def test_padding_adds_rows_only_where_they_are_missing() -> None:
    whole = made(4)
    assert whole.padded(3) is whole and whole.padded(4) is whole and whole.padded(6).rows == 6


def test_the_names_are_those_of_files_and_hashes() -> None:
    assert Batch._fields == ("tokens", "targets", "loss_mask", "positions", "segments")
    assert all(tensor.device.type == "meta" for tensor in made(1).to("meta"))
