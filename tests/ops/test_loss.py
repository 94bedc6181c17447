"""The chunked head and its losses against the references in float64, also across chunk borders."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from xushi.ops import (
    cross_entropy,
    cross_entropy_reference,
    loss,
    token_log_probabilities,
    token_log_probabilities_reference,
)

pytestmark = pytest.mark.usefixtures("form")


def case(
    seed: int, tokens: int, width: int, vocabulary: int, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [N, D], head [V, D], targets [N] and weights [N], a third of them zero as masked tokens
    are.
    """
    g = torch.Generator().manual_seed(seed)
    weights = torch.rand(tokens, generator=g) * (torch.rand(tokens, generator=g) > 0.3)
    return (
        torch.randn(tokens, width, generator=g) * scale,
        torch.randn(vocabulary, width, generator=g),
        torch.randint(0, vocabulary, (tokens,), generator=g),
        weights,
    )


def magnitudes(
    x: Tensor, head: Tensor, targets: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, float]:
    """The sizes of log p [N], of d x and of d head, and their numbers of roundings.

    A logit's error is D roundings of its terms, which are at most `logit`. The error of log p is
    twice that, plus the sum over V and its own rounding. The relative error of p = exp(log p) is
    the same.
    """
    x, head, weights = x.double(), head.double(), weights.double().abs()
    logit = float((x.abs() @ head.abs().T).max())
    log_p = (x @ head.T).log_softmax(-1)
    ones = torch.nn.functional.one_hot(targets, head.shape[0])
    d_logits = (log_p.exp() + ones) * weights[:, None]
    absolute = 2 * x.shape[1] * logit + head.shape[0] + 8
    chosen = log_p.gather(1, targets[:, None])[:, 0].abs() + 1
    return chosen, d_logits @ head.abs(), d_logits.T @ x.abs(), absolute


def check(tensors: tuple[Tensor, Tensor, Tensor, Tensor], within, leaves) -> None:
    x, head, targets, weights = tensors
    size, dx, d_head, absolute = magnitudes(*tensors)
    tokens, vocabulary = x.shape[0], head.shape[0]
    for form, reference, scalar in (
        (cross_entropy, cross_entropy_reference, True),
        (token_log_probabilities, token_log_probabilities_reference, False),
    ):
        fast, exact = leaves(torch.float32, x, head), leaves(torch.float64, x, head)
        if scalar:
            got, want = form(*fast, targets, weights), reference(*exact, targets, weights.double())
            (3 * got).backward()
            (3 * want).backward()
            within(
                "loss",
                got.detach(),
                want.detach(),
                (size * weights.double()).sum(),
                absolute + tokens,
            )
        else:
            got, want = form(*fast, targets), reference(*exact, targets)
            got.backward(3 * weights)
            want.backward(3 * weights.double())
            within("log p", got.detach(), want.detach(), size, absolute)
        within("gradient of x", fast[0].grad, exact[0].grad, 3 * dx, absolute + vocabulary + 4)
        within(
            "gradient of the head", fast[1].grad, exact[1].grad, 3 * d_head, absolute + tokens + 4
        )


@pytest.mark.usefixtures("compiled_bfloat16")
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 130),
    width=st.integers(1, 23),
    vocabulary=st.integers(1, 147),
    scale=st.sampled_from([0.1, 1.0]),
)
def test_compiled_bfloat16(seed, tokens, width, vocabulary, scale, within, leaves) -> None:
    """The head is rounded, which changes a logit by 2^-8 of its terms and p by twice that
    relatively. p and x's gradient are rounded too.
    """
    x, head, targets, weights = case(seed, tokens, width, vocabulary, scale)
    x = x.bfloat16()
    size, dx, d_head, absolute = magnitudes(x, head, targets, weights)
    logit = 2 * float((x.double().abs() @ head.double().abs().T).max())
    exact = leaves(torch.float64, x, head)
    log_p = token_log_probabilities_reference(*exact, targets)
    (-log_p * weights.double()).sum().backward()
    for form in (
        lambda *tensors: cross_entropy(*tensors, targets, weights),
        lambda *tensors: (-token_log_probabilities(*tensors, targets) * weights).sum(),
    ):
        fast = leaves(torch.bfloat16, x) + leaves(torch.float32, head)
        loss_ = form(*fast)
        loss_.backward()
        within(
            "loss",
            loss_.detach(),
            (-log_p.detach() * weights).sum(),
            (size * weights.double()).sum(),
            absolute + tokens,
            logit,
        )
        within(
            "gradient of x", fast[0].grad, exact[0].grad, dx, absolute + vocabulary + 4, 3 + logit
        )
        within(
            "gradient of the head",
            fast[1].grad,
            exact[1].grad,
            d_head,
            absolute + tokens + 4,
            1 + logit,
        )


@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 60),
    width=st.integers(1, 23),
    vocabulary=st.integers(1, 47),
    chunk=st.sampled_from([1, 7, 16, 512]),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
)
def test_values_and_gradients(
    seed, tokens, width, vocabulary, chunk, scale, within, leaves
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "CHUNK", chunk)
        check(case(seed, tokens, width, vocabulary, scale), within, leaves)


def test_more_than_one_chunk(within, leaves) -> None:
    check(case(6, 2 * loss.CHUNK + 77, 5, 9, 1.0), within, leaves)


def test_the_references_are_log_softmax() -> None:
    x, head, targets, weights = (
        t.double() if t.is_floating_point() else t for t in case(7, 30, 6, 11, 1.0)
    )
    chosen = torch.stack(
        [(head @ row).log_softmax(0)[target] for row, target in zip(x, targets, strict=True)]
    )
    torch.testing.assert_close(token_log_probabilities_reference(x, head, targets), chosen)
    torch.testing.assert_close(
        cross_entropy_reference(x, head, targets, weights), -(chosen * weights).sum()
    )


def test_without_gradients_the_loss_is_the_same(within) -> None:
    x, head, targets, weights = case(8, 50, 6, 11, 1.0)
    with torch.no_grad():
        got = cross_entropy(x, head, targets, weights)
    want = cross_entropy_reference(x.double(), head.double(), targets, weights.double())
    size, _, _, absolute = magnitudes(x, head, targets, weights)
    within("loss", got, want, (size * weights.double()).sum(), absolute + 50)


@pytest.mark.parametrize("chunk", [64, 1024])
def test_bfloat16_is_no_further_than_the_plain_form(
    chunk: int, leaves, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x is bfloat16 and the head float32, as in training. Each chunk's part of the head's gradient
    is rounded to bfloat16 and added in float32; the plain form rounds the whole gradient. The
    factor 1.1 allows for chance.
    """
    monkeypatch.setattr(loss, "CHUNK", chunk)
    x, head, targets, weights = case(9, 300, 40, 90, 0.5)
    x = x.bfloat16()
    exact = leaves(torch.float64, x, head)
    want = cross_entropy_reference(*exact, targets, weights.double())
    want.backward()
    want_p = token_log_probabilities_reference(*(t.detach() for t in exact), targets)
    errors = []
    for form, per_token in (
        (cross_entropy, token_log_probabilities),
        (cross_entropy_reference, token_log_probabilities_reference),
    ):
        (x_,), (head_,) = leaves(torch.bfloat16, x), leaves(torch.float32, head)
        form(x_, head_, targets, weights).backward()
        first = [x_.grad, head_.grad]
        (x_,), (head_,) = leaves(torch.bfloat16, x), leaves(torch.float32, head)
        log_p = per_token(x_, head_, targets)
        log_p.backward(-weights)
        errors.append(
            torch.stack(
                [
                    (got.double() - truth).norm()
                    for got, truth in zip(
                        (log_p.detach(), *first, x_.grad, head_.grad),
                        (want_p, *(t.grad for t in exact * 2)),
                        strict=True,
                    )
                ]
            )
        )
    assert (errors[0] <= 1.1 * errors[1]).all(), (errors[0] / errors[1]).tolist()


def test_ten_runs_on_two_threads_give_the_same_bits(two_threads, leaves) -> None:
    x, head, targets, weights = case(10, 2500, 64, 300, 1.0)
    first: list[Tensor] = []
    for _ in range(10):
        x_, head_ = leaves(torch.float32, x, head)
        value = cross_entropy(x_, head_, targets, weights)
        log_p = token_log_probabilities(x_, head_, targets)
        (value + (log_p * weights).sum() * 0.5).backward()
        now = [value.detach(), log_p.detach(), x_.grad, head_.grad]
        first = first or now
        assert all(torch.equal(a, b) for a, b in zip(now, first, strict=True))
