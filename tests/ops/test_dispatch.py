"""XUSHI_OPS=reference makes every op run its reference and nothing else."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from xushi.base.errors import BadInput
from xushi.ops import attention, experts, loss, native, use_reference
from xushi.ops.dispatch import asked_form

G = torch.Generator().manual_seed(0)
X, HEAD, TARGETS = torch.randn(6, 4, generator=G), torch.randn(9, 4, generator=G), torch.arange(6)
HEADS = torch.randn(3, 1, 2, 6, 4, generator=G)
EXPERTS = (
    X,
    torch.tensor([[0, 1]] * 6),
    torch.rand(6, 2, generator=G),
    torch.randn(3, 8, 4, generator=G),
    torch.randn(3, 4, 4, generator=G),
)

# op, the names of its reference and its fast form in its module, arguments
OPS = [
    (experts, "routed_experts", "_RoutedExperts", EXPERTS),
    (loss, "token_log_probabilities", "_TokenLogProbabilities", (X, HEAD, TARGETS)),
    (
        loss,
        "cross_entropy",
        "_CrossEntropy",
        (X.clone().requires_grad_(), HEAD, TARGETS, torch.ones(6)),
    ),
    (attention, "causal_attention", "_CausalAttention", (*HEADS, None, 0.5)),
]


class Used(Exception):
    """The fast form was used."""


class Refuse:
    """Replaces the fast form's autograd function, or the functions that it calls."""

    def __getattr__(self, name: str) -> Callable[..., Tensor]:
        raise Used


@pytest.mark.parametrize("module, name, fast, arguments", OPS, ids=[name for _, name, _, _ in OPS])
def test_references_are_forced(
    module, name, fast, arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    op, reference = getattr(module, name), getattr(module, f"{name}_reference")
    expected = reference(*arguments)
    monkeypatch.setenv("XUSHI_OPS", "pytorch")
    monkeypatch.setattr(module, fast, Refuse())
    with pytest.raises(Used):
        op(*arguments)
    monkeypatch.setenv("XUSHI_OPS", "reference")
    assert use_reference() and torch.equal(op(*arguments), expected)


@pytest.mark.parametrize("value", [None, "", "pytorch"])
def test_only_the_word_reference_asks_for_them(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XUSHI_OPS", raising=False)
    if value is not None:
        monkeypatch.setenv("XUSHI_OPS", value)
    assert not use_reference() and asked_form() == (value or None)


@pytest.mark.parametrize("value", ["fast", "Reference", "native"])
def test_a_form_that_does_not_exist_is_refused(value: str, monkeypatch) -> None:
    """Anything else in the variable would look as if it had been obeyed."""
    monkeypatch.setenv("XUSHI_OPS", value)
    for asks in (asked_form, native.form, native.status):
        with pytest.raises(BadInput, match=f"XUSHI_OPS='{value}'"):
            asks()
