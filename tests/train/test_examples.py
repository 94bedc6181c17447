"""Packing of examples: every learned token is a target once, after exactly its own context."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from xushi.train import pack_examples

PAD = 999


@st.composite
def examples(draw: st.DrawFn) -> list[tuple[list[int], list[bool]]]:
    result = []
    for number in range(draw(st.integers(0, 8))):
        size = draw(st.integers(1, 12))
        ids = [100 * number + place for place in range(size)]  # every token of a batch is unique
        result.append((ids, draw(st.lists(st.booleans(), min_size=size, max_size=size))))
    return result


@given(given_=examples(), length=st.integers(1, 20))
def test_every_learned_token_is_a_target_once(given_, length) -> None:
    packed = pack_examples(given_, length, PAD)
    batch = packed.batch
    rows, width = batch.tokens.shape
    assert width == max([length, *(len(ids) - 1 for ids, _ in given_)])
    assert all(tensor.shape == (rows, width) for tensor in batch)

    learned = [
        token
        for ids, mask in given_
        for token, wanted in zip(ids[1:], mask[1:], strict=True)
        if wanted
    ]
    assert sorted(batch.targets[batch.loss_mask].tolist()) == sorted(learned)
    found: dict[
        int, list[int]
    ] = {}  # target -> what its place may see, itself included, in the order of positions
    for row in range(rows):
        for column in torch.where(batch.segments[row] >= 0)[0].tolist():
            seen = [
                c
                for c in range(column + 1)
                if batch.segments[row, c] == batch.segments[row, column]
            ]
            assert [int(batch.positions[row, c]) for c in seen] == list(range(len(seen)))
            found[int(batch.targets[row, column])] = batch.tokens[row, seen].tolist()
    assert found == {
        ids[place + 1]: ids[: place + 1] for ids, _ in given_ for place in range(len(ids) - 1)
    }


@given(given_=examples(), length=st.integers(1, 20))
def test_places_point_at_the_learned_targets_in_order(given_, length) -> None:
    packed = pack_examples(given_, length, PAD)
    targets, mask = packed.batch.targets.flatten(), packed.batch.loss_mask.flatten()
    assert len(packed.places) == len(given_)
    for places, (ids, learned) in zip(packed.places, given_, strict=True):
        assert targets[places].tolist() == [
            t for t, wanted in zip(ids[1:], learned[1:], strict=True) if wanted
        ]
        assert mask[places].all()


@given(given_=examples(), length=st.integers(1, 20))
def test_what_is_left_is_padding(given_, length) -> None:
    batch = pack_examples(given_, length, PAD).batch
    empty = batch.segments == -1
    assert (batch.tokens[empty] == PAD).all() and (batch.targets[empty] == PAD).all()
    assert not batch.loss_mask[empty].any() and not batch.positions[empty].any()
    assert not (batch.tokens[~empty] == PAD).any()
    assert int((~empty).sum()) == sum(len(ids) - 1 for ids, _ in given_)


def test_rows_are_filled_in_order() -> None:
    given_ = [
        (list(range(4)), [True] * 4),
        (list(range(3)), [True] * 3),
        (list(range(9)), [True] * 9),
    ]
    batch = pack_examples(given_, 6, PAD).batch
    assert batch.segments.tolist() == [
        [0, 0, 0, 1, 1, -1, -1, -1],
        [0] * 8,
    ]  # the longest sets the width
    assert {name: tensor.dtype for name, tensor in batch._asdict().items()} == {
        name: torch.bool if name == "loss_mask" else torch.int64 for name in batch._fields
    }


def test_a_row_is_filled_to_its_last_token() -> None:
    """Two examples of three inputs each are a whole row of six; a longer one begins the next."""
    example = ([1, 2, 3, 4], [False, True, True, True])
    packed = pack_examples([example, example, ([1, 2], [False, True])], 6, pad_id=0)
    assert packed.starts == [0, 3, 6]
    assert packed.batch.segments.tolist() == [[0, 0, 0, 1, 1, 1], [0, -1, -1, -1, -1, -1]]
