"""mHC's weights and mixing against loops over the equations; the mix's direction; gradients."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from xushi.ops import collapse_streams, expand_streams, sinkhorn, stream_weights


@given(
    seed=st.integers(0, 2**31),
    streams=st.integers(1, 4),
    iterations=st.integers(1, 5),
    eps=st.sampled_from([1e-6, 1e-2]),
)
def test_sinkhorn_against_loops(seed: int, streams: int, iterations: int, eps: float) -> None:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, streams, streams, generator=g, dtype=torch.float64) * 2
    got = sinkhorn(logits, iterations, eps)
    for b in range(2):
        m = [
            [float(logits[b, i].softmax(0)[j]) + eps for j in range(streams)]
            for i in range(streams)
        ]
        for step in range(2 * iterations - 1):
            if step % 2 == 0:
                sums = [sum(m[i][j] for i in range(streams)) + eps for j in range(streams)]
                m = [[m[i][j] / sums[j] for j in range(streams)] for i in range(streams)]
            else:
                m = [[x / (sum(row) + eps) for x in row] for row in m]
        torch.testing.assert_close(
            got[b], torch.tensor(m, dtype=torch.float64), rtol=1e-12, atol=1e-14
        )


def test_twenty_iterations_are_doubly_stochastic() -> None:
    mix = sinkhorn(
        torch.randn(5, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
        20,
        1e-6,
    )
    assert (mix.sum(-1) - 1).abs().max() < 1e-4 and (mix.sum(-2) - 1).abs().max() < 1e-4
    assert (mix - mix.mT).abs().max() > 0.05, "were it symmetric, the direction could not be tested"


def test_parts_scales_and_offsets() -> None:
    g = torch.Generator().manual_seed(2)
    projected, base = (torch.randn(15, generator=g, dtype=torch.float64) for _ in range(2))
    scale = torch.tensor([0.5, 2.0, -1.0], dtype=torch.float64)
    read, write, mix = stream_weights(projected, scale, base, 3, 4, 1e-3)
    # The weights for reading include eps, those for writing do not.
    torch.testing.assert_close(read, (projected[:3] * 0.5 + base[:3]).sigmoid() + 1e-3)
    torch.testing.assert_close(write, 2 * (projected[3:6] * 2.0 + base[3:6]).sigmoid())
    torch.testing.assert_close(mix, sinkhorn((base[6:] - projected[6:]).view(3, 3), 4, 1e-3))


def test_the_mix_is_used_transposed() -> None:
    """New stream k is the sum over j of mix[j, k] * stream j. Two well-known implementations had it
    the other way round.
    """
    streams = torch.tensor([[1.0, 2.0], [10.0, 20.0]], dtype=torch.float64)
    mix = torch.tensor([[0.0, 1.0], [0.25, 0.75]], dtype=torch.float64)
    zero = torch.zeros(2, dtype=torch.float64)
    got = expand_streams(streams, zero, zero, mix)
    assert got.tolist() == [[2.5, 5.0], [8.5, 17.0]]
    y, write = (
        torch.tensor([1.0, -1.0], dtype=torch.float64),
        torch.tensor([3.0, 4.0], dtype=torch.float64),
    )
    assert (expand_streams(streams, y, write, mix) - got).tolist() == [[3.0, -3.0], [4.0, -4.0]]


def test_collapse() -> None:
    streams = torch.tensor([[[1.0, 2.0], [10.0, 20.0]]])
    assert collapse_streams(streams, torch.tensor([[2.0, 0.5]])).tolist() == [[7.0, 14.0]]


def test_gradients() -> None:
    g = torch.Generator().manual_seed(3)
    inputs = [
        torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()
        for shape in ((2, 15), (3,), (15,), (2, 3, 4), (2, 4))
    ]

    def block(projected, scale, base, streams, y):
        read, write, mix = stream_weights(projected, scale, base, 3, 3, 1e-6)
        return expand_streams(streams, y + collapse_streams(streams, read), write, mix)

    assert torch.autograd.gradcheck(block, inputs)
