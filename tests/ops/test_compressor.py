"""Pooling of a window by a softmax over its slots for each channel, against loops."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from xushi.ops import compress_windows


@given(
    seed=st.integers(0, 2**31),
    slots=st.integers(1, 5),
    width=st.integers(1, 4),
    windows=st.integers(0, 3),
)
def test_against_loops(seed: int, slots: int, width: int, windows: int) -> None:
    g = torch.Generator().manual_seed(seed)
    values, gates = (
        torch.randn(2, windows, slots, width, generator=g, dtype=torch.float64) for _ in range(2)
    )
    valid = torch.rand(2, windows, slots, generator=g) < 0.6
    valid[..., -1] = True
    got = compress_windows(values, gates, valid)
    assert got.shape == (2, windows, width)
    for b in range(2):
        for w in range(windows):
            exist = [m for m in range(slots) if valid[b, w, m]]
            for c in range(width):
                total = sum(gates[b, w, m, c].exp() for m in exist)
                want = sum(gates[b, w, m, c].exp() / total * values[b, w, m, c] for m in exist)
                torch.testing.assert_close(got[b, w, c], want, rtol=1e-12, atol=1e-14)


def test_a_slot_that_does_not_exist_gives_and_gets_nothing() -> None:
    values = torch.tensor([[[9.0], [2.0]]], dtype=torch.float64, requires_grad=True)
    gates = torch.tensor([[[50.0], [0.0]]], dtype=torch.float64, requires_grad=True)
    entry = compress_windows(values, gates, torch.tensor([[False, True]]))
    assert entry.item() == 2.0
    entry.sum().backward()
    assert values.grad.flatten().tolist() == [0.0, 1.0] and not gates.grad.any()


def test_bfloat16_gates_are_weighed_in_float32() -> None:
    """For two gates that are neighbours in bfloat16, the softmax is computed in float32 and only
    then rounded.
    """
    gates = torch.tensor([[8.0], [8.0625]]).bfloat16()
    got = compress_windows(torch.tensor([[1.0], [0.0]]).bfloat16(), gates)
    assert got.item() == torch.tensor([8.0, 8.0625]).softmax(0)[0].bfloat16().item()
