"""Attention in blocks against the reference in float64: different widths, segments, and sequences
longer than a block.
"""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from xushi.ops import (
    attention,
    causal_attention,
    causal_attention_reference,
    expand_heads,
    latent_attention,
    rotated_attention,
)
from xushi.ops.attention import segment_mask, segment_starts

pytestmark = pytest.mark.usefixtures("form")


def random_segments(rows: int, length: int, documents: int, g: torch.Generator) -> Tensor:
    """Documents one after another, and padding (-1) at the end of some rows."""
    segments = torch.randint(0, documents, (rows, length), generator=g).sort(1).values
    padding = torch.randint(0, length, (rows, 1), generator=g)
    return segments.where(
        (torch.arange(length) < padding) | (torch.rand(rows, 1, generator=g) < 0.5), -1
    )


def brute_force(q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None, scale: float) -> Tensor:
    """A loop over queries, each with only the keys that it may attend to."""
    batch, heads, length, _ = q.shape
    out = []
    for b in range(batch):
        for h in range(heads):
            for t in range(length):
                seen = [
                    s for s in range(t + 1) if segments is None or segments[b, s] == segments[b, t]
                ]
                out.append((k[b, h, seen] @ q[b, h, t] * scale).softmax(0) @ v[b, h, seen])
    return torch.stack(out).view(batch, heads, length, -1)


def check(
    form, q, k, v, d_out, segments, within, leaves, exact_form, dtype: torch.dtype = torch.float32
) -> None:
    scale = q.shape[-1] ** -0.5
    q, k, v, d_out = (t.to(dtype) for t in (q, k, v, d_out))
    fast, exact = leaves(dtype, q, k, v), leaves(torch.float64, q, k, v)
    mask = None if segments is None else segment_mask(segments)
    starts = None if segments is None else segment_starts(segments)
    got, want = form(*fast, mask, scale, starts), exact_form(*exact, mask, scale)
    got.backward(d_out)
    want.backward(d_out.double())
    # Every term made positive. p are the weights, dp their gradient, ds the scores' gradient.
    visible = torch.ones(q.shape[2], q.shape[2]).tril().bool() if mask is None else mask
    q_, k_, v_, do = (t.detach().double() for t in (q, k, v, d_out))
    p = (q_ @ k_.mT * scale).masked_fill(~visible, float("-inf")).softmax(-1)
    scores = (q_.abs() @ k_.abs().mT * scale).masked_fill(~visible, 0)
    dp = do.abs() @ v_.abs().mT
    ds = p * (dp + (p * dp).sum(-1, keepdim=True)) * scale
    sizes = (p @ v_.abs(), ds @ k_.abs(), ds.mT @ q_.abs(), p.mT @ do.abs())
    # A score's error is K roundings of its terms. A weight's relative error is twice that, from its
    # own score and from the sum. Then come sums over T (weights and outputs, forward and backward)
    # and over V.
    length, key, value = q.shape[2], q.shape[3], v.shape[3]
    roundings = 2 * key * float(scores.max()) + 4 * length + 2 * value + key + 16
    # Rounded to bfloat16 in the forward pass: weights and output. In the backward pass for q and k:
    # the output (in the mean of dp), ds and the gradient; for v: the weights and the gradient.
    for name, a, b, size, halves in zip(
        ("output", "q", "k", "v"),
        (got.detach(), *(t.grad for t in fast)),
        (want.detach(), *(t.grad for t in exact)),
        sizes,
        (2, 4, 4, 2),
        strict=True,
    ):
        within(name, a, b, size, roundings, halves if dtype == torch.bfloat16 else 0)


@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    length=st.integers(1, 45),
    key=st.integers(1, 21),
    value=st.integers(1, 21),
    documents=st.integers(1, 4),
    block=st.sampled_from([1, 7, 16, 128]),
    masked=st.booleans(),
    kept=st.sampled_from([0, 20, 256]),
)
def test_values_and_gradients(
    seed, batch, heads, length, key, value, documents, block, masked, kept, within, leaves
) -> None:
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(batch, heads, length, key, generator=g) for _ in range(2))
    v, d_out = (torch.randn(batch, heads, length, value, generator=g) for _ in range(2))
    segments = random_segments(batch, length, documents, g) if masked else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "QUERY_BLOCK", block)
        patch.setattr(attention, "KEEP_WEIGHTS", kept)
        check(
            causal_attention, q, k, v, d_out, segments, within, leaves, causal_attention_reference
        )


@dataclass
class RotatedShapes:
    """What an example of `rotated_attention` draws besides its seed."""

    length: int
    nope: int
    rotated: int
    value: int
    documents: int
    interleaved: bool


def check_rotated(seed: int, shapes: RotatedShapes, within, leaves, dtype: torch.dtype) -> None:
    """Against the reference attention on heads assembled by PyTorch, in float64."""
    g = torch.Generator().manual_seed(seed)
    length, nope, rotated = shapes.length, shapes.nope, shapes.rotated
    # The shared key is a view of a wider tensor.
    widths = ((2, nope + rotated), (2, nope + shapes.value), (rotated + 3,))
    inputs = [torch.randn(2, length, *width, generator=g) for width in widths]
    d_out = torch.randn(2, length, 2, shapes.value, generator=g).to(dtype)
    inputs = [t.to(dtype) for t in inputs]
    angles = torch.rand(2, length, rotated // 2, generator=g, dtype=torch.float64) * 6
    cos, sin = angles.cos().float(), angles.sin().float()
    segments = random_segments(2, length, shapes.documents, g)
    mask, starts = segment_mask(segments), segment_starts(segments)
    scale = (nope + rotated) ** -0.5
    fast, exact = leaves(dtype, *inputs), leaves(torch.float64, *inputs)
    got = rotated_attention(
        fast[0], fast[1], fast[2][..., 3:], (cos, sin), shapes.interleaved, mask, scale, starts
    )
    heads = expand_heads(
        exact[0], exact[1], exact[2][..., 3:], (cos.double(), sin.double()), shapes.interleaved
    )
    want = causal_attention_reference(*heads, mask, scale).transpose(1, 2)
    got.backward(d_out)
    want.backward(d_out.double())
    sizes = rotated_sizes(
        [t.detach() for t in heads], d_out.double().transpose(1, 2), mask, scale, shapes
    )
    half = dtype == torch.bfloat16
    compare_rotated((got.detach(), fast), (want.detach(), exact), sizes, shapes, half, within)


@dataclass
class RotatedSizes:
    """The sums of absolute terms that errors are measured by: of the output, of the gradients of
    queries, keys and values by head, and of the largest score.
    """

    output: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    largest_score: float


def rotated_sizes(
    heads: list[Tensor], do: Tensor, mask: Tensor | None, scale: float, shapes: RotatedShapes
) -> RotatedSizes:
    q, k, v = heads
    length, nope, rotated = shapes.length, shapes.nope, shapes.rotated
    visible = torch.ones(length, length).tril().bool() if mask is None else mask
    p = (q @ k.mT * scale).masked_fill(~visible, float("-inf")).softmax(-1)

    # A rotated value has terms of both values of its pair, so its size is the pair's sum.
    def pair(x: Tensor) -> Tensor:
        turned = x[..., nope:].abs()
        both = turned + turned.roll(rotated // 2, -1)
        return torch.cat((x[..., :nope].abs(), both), -1)

    scores = (pair(q) @ pair(k).mT * scale).masked_fill(~visible, 0)
    dp = do.abs() @ v.abs().mT
    ds = p * (dp + (p * dp).sum(-1, keepdim=True)) * scale
    dq, dk, dv = ds @ pair(k), ds.mT @ pair(q), p.mT @ do.abs()
    return RotatedSizes((p @ v.abs()).transpose(1, 2), pair(dq), pair(dk), dv, float(scores.max()))


def compare_rotated(got, want, sizes: RotatedSizes, shapes: RotatedShapes, half, within) -> None:
    """`got` and `want` are (output, leaves with gradients)."""
    (got, fast), (want, exact) = got, want
    nope, rotated = shapes.nope, shapes.rotated
    roundings = (
        (2 * (nope + rotated) + 16) * sizes.largest_score
        + 4 * shapes.length
        + 2 * shapes.value
        + nope
        + rotated
        + 32
    )
    # Queries and keys are rounded to bfloat16 too. Each changes a score by 2^-8 of its terms, and
    # the weights by twice that. The gradients of rotated values are also rounded.
    moved = 4 * sizes.largest_score
    q, k = (x.abs().amax((1, 3), keepdim=True).transpose(1, 2) for x in (sizes.dq, sizes.dk))
    keys, exact_keys = fast[1].grad, exact[1].grad
    for name, found, expected, size, halves in (
        ("output", got, want, sizes.output, 2),
        ("q", fast[0].grad, exact[0].grad, q.expand_as(exact[0].grad).contiguous(), 6),
        (
            "k",
            keys[..., :nope],
            exact_keys[..., :nope],
            k.expand_as(exact_keys[..., :nope]).contiguous(),
            6,
        ),
        ("v", keys[..., nope:], exact_keys[..., nope:], sizes.dv.transpose(1, 2), 3),
        (
            "rotated k",
            fast[2].grad,
            exact[2].grad,
            k.sum(2).expand_as(exact[2].grad).contiguous(),
            6,
        ),
    ):
        within(name, found, expected, size, roundings, (halves + moved) * half)


ROTATED = given(
    seed=st.integers(0, 2**31),
    length=st.integers(1, 60),
    nope=st.integers(1, 20),
    pairs=st.integers(1, 9),
    value=st.integers(1, 21),
    documents=st.integers(1, 3),
    interleaved=st.booleans(),
)


@ROTATED
def test_heads_are_rotated(
    seed, length, nope, pairs, value, documents, interleaved, within, leaves
) -> None:
    shapes = RotatedShapes(length, nope, 2 * pairs, value, documents, interleaved)
    check_rotated(seed, shapes, within, leaves, torch.float32)


@pytest.mark.usefixtures("compiled_bfloat16")
@ROTATED
def test_heads_are_rotated_in_compiled_bfloat16(
    seed, length, nope, pairs, value, documents, interleaved, within, leaves
) -> None:
    shapes = RotatedShapes(length, nope, 2 * pairs, value, documents, interleaved)
    check_rotated(seed, shapes, within, leaves, torch.bfloat16)


@pytest.mark.usefixtures("compiled_bfloat16")
@given(
    seed=st.integers(0, 2**31),
    length=st.integers(1, 200),
    key=st.integers(1, 70),
    value=st.integers(1, 70),
    documents=st.integers(1, 4),
)
def test_compiled_bfloat16(seed, length, key, value, documents, within, leaves) -> None:
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(2, 2, length, key, generator=g) for _ in range(2))
    v, d_out = (torch.randn(2, 2, length, value, generator=g) for _ in range(2))
    check(
        causal_attention,
        q,
        k,
        v,
        d_out,
        random_segments(2, length, documents, g),
        within,
        leaves,
        causal_attention_reference,
        torch.bfloat16,
    )


@pytest.mark.parametrize("key, value", [(24, 16), (16, 24), (16, 16)])
@pytest.mark.parametrize(
    "length",
    [70, 600, attention.QUERY_BLOCK, 2 * attention.QUERY_BLOCK + 41, attention.KEEP_WEIGHTS + 1],
)
def test_more_than_one_block(key: int, value: int, length: int, within, leaves) -> None:
    g = torch.Generator().manual_seed(length + key)
    q, k = (torch.randn(2, 2, length, key, generator=g) for _ in range(2))
    v, d_out = (torch.randn(2, 2, length, value, generator=g) for _ in range(2))
    for segments in (None, random_segments(2, length, 3, g)):
        check(
            causal_attention, q, k, v, d_out, segments, within, leaves, causal_attention_reference
        )


@given(seed=st.integers(0, 2**31), length=st.integers(1, 9), documents=st.integers(1, 4))
def test_the_reference_is_attention_over_what_may_be_seen(
    seed: int, length: int, documents: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 1, length, 3, generator=g, dtype=torch.float64) for _ in range(3))
    segments = random_segments(2, length, documents, g)
    got = causal_attention_reference(q, k, v, segment_mask(segments), 0.7)
    torch.testing.assert_close(got, brute_force(q, k, v, segments, 0.7), rtol=1e-12, atol=1e-12)
    got = causal_attention_reference(q, k, v, None, 0.7)
    torch.testing.assert_close(got, brute_force(q, k, v, None, 0.7), rtol=1e-12, atol=1e-12)


@given(seed=st.integers(0, 2**31), length=st.integers(1, 12), documents=st.integers(1, 5))
def test_segment_mask(seed: int, length: int, documents: int) -> None:
    segments = random_segments(3, length, documents, torch.Generator().manual_seed(seed))
    mask = segment_mask(segments)
    expected = torch.tensor(
        [
            [[s <= t and row[s] == row[t] for s in range(length)] for t in range(length)]
            for row in segments.tolist()
        ]
    )
    if mask is None:
        assert (expected == torch.ones(length, length).tril().bool()).all()
    else:
        assert torch.equal(mask[:, 0], expected)
    assert expected.any(-1).all(), "a query that sees nothing would be not a number"


@given(rows=st.lists(st.lists(st.integers(-1, 2), min_size=6, max_size=6), min_size=1, max_size=3))
def test_segment_starts(rows: list[list[int]]) -> None:
    """The first position of each token's document; None if a document is split by another one."""
    pieces = [[b for a, b in zip([None, *row], row, strict=False) if a != b] for row in rows]
    got = segment_starts(torch.tensor(rows))
    if any(len(set(piece)) != len(piece) for piece in pieces):
        assert got is None
    else:
        assert got is not None and got.tolist() == [[row.index(s) for s in row] for row in rows]


def test_bfloat16_is_no_further_than_the_plain_form(leaves) -> None:
    """Both forms round the scores to bfloat16, so only chance decides which one is closer."""
    g = torch.Generator().manual_seed(4)
    q, k = (torch.randn(2, 4, 150, 24, generator=g).bfloat16() for _ in range(2))
    v, d_out = (torch.randn(2, 4, 150, 16, generator=g).bfloat16() for _ in range(2))
    mask = segment_mask(random_segments(2, 150, 3, g))
    exact = leaves(torch.float64, q, k, v)
    want = causal_attention_reference(*exact, mask, 0.2)
    want.backward(d_out.double())
    errors = []
    for form in (causal_attention, causal_attention_reference):
        inputs = leaves(torch.bfloat16, q, k, v)
        got = form(*inputs, mask, 0.2)
        got.backward(d_out)
        errors.append(
            torch.stack(
                [
                    (a.double() - b).norm()
                    for a, b in zip(
                        (got.detach(), *(t.grad for t in inputs)),
                        (want.detach(), *(t.grad for t in exact)),
                        strict=True,
                    )
                ]
            )
        )
    assert (errors[0] <= 1.1 * errors[1]).all(), (errors[0] / errors[1]).tolist()


def test_ten_runs_on_two_threads_give_the_same_bits(two_threads, leaves) -> None:
    g = torch.Generator().manual_seed(5)
    inputs = [torch.randn(4, 4, 300, width, generator=g) for width in (24, 24, 16)]
    segments = random_segments(4, 300, 3, g)
    mask, starts = segment_mask(segments), segment_starts(segments)
    first: list[Tensor] = []
    for _ in range(10):
        q, k, v = leaves(torch.float32, *inputs)
        out = causal_attention(q, k, v, mask, 0.2, starts)
        out.square().sum().backward()
        now = [out.detach(), q.grad, k.grad, v.grad]
        first = first or now
        assert all(torch.equal(a, b) for a, b in zip(now, first, strict=True))


def test_attention_on_latents_is_attention_on_what_they_expand_to() -> None:
    """Expanding every cached latent to keys W_k c and values W_v c must equal the expansion
    absorbed into query and output.
    """
    g = torch.Generator().manual_seed(21)
    heads, nope, rope, latent, value, length = 2, 3, 4, 5, 6, 7
    w_key, w_value = (
        torch.randn(heads, n, latent, generator=g, dtype=torch.float64) for n in (nope, value)
    )
    q = torch.randn(3, 2, heads, nope + rope, generator=g, dtype=torch.float64)
    context = torch.randn(3, length, latent + rope, generator=g, dtype=torch.float64)
    allowed = torch.rand(3, 2, length, generator=g) < 0.6
    allowed[..., 0] = True
    absorbed = torch.cat((torch.einsum("sqhk,hkc->sqhc", q[..., :nope], w_key), q[..., nope:]), -1)
    got = torch.einsum(
        "sqhc,hvc->sqhv", latent_attention(absorbed, context, allowed, 0.3, latent), w_value
    )
    keys = torch.cat(
        (
            torch.einsum("slc,hkc->slhk", context[..., :latent], w_key),
            context[..., None, latent:].expand(3, length, heads, rope),
        ),
        -1,
    )
    values = torch.einsum("slc,hvc->slhv", context[..., :latent], w_value)
    scores = torch.einsum("sqhk,slhk->sqhl", q, keys) * 0.3
    shares = scores.masked_fill(~allowed[:, :, None], float("-inf")).softmax(-1)
    torch.testing.assert_close(
        got, torch.einsum("sqhl,slhv->sqhv", shares, values), rtol=1e-12, atol=1e-12
    )
