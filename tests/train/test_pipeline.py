"""Stages of a pipeline, in one process: which layers they get, and that one after the other they
are the whole model. The processes themselves are in test_layouts.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xushi.model import Deepseek, LossCounts, LossWeights, pretraining_loss
from xushi.train import Layout
from xushi.train.fitting import stage_layers
from xushi.train.pipeline import microbatches

from .layouts import MODELS, ROWS, batch, model_of


@given(st.integers(1, 40), st.integers(2, 8))
def test_pieces_are_the_batch_in_order(rows: int, stages: int) -> None:
    whole = batch(0, rows)
    pieces = microbatches(whole, Layout(pipeline=stages))
    assert all(
        torch.equal(torch.cat(parts), tensor)
        for parts, tensor in zip(zip(*pieces, strict=True), whole, strict=True)
    )
    sizes = [piece.rows for piece in pieces]
    assert len(pieces) == min(rows, 4 * stages) and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind.endswith("deep")])
@pytest.mark.parametrize("stages", [2, 4])
def test_stages_one_after_the_other_are_the_whole_model(kind: str, stages: int) -> None:
    """The residual goes from one to the next and its gradient back, to the bit; losses add up to
    the whole's.
    """
    rows = batch(0, ROWS)
    counts = LossCounts.of(rows, MODELS[kind].num_nextn_predict_layers)
    whole = model_of(kind)
    wanted = pretraining_loss(whole, rows, LossWeights(0.3, 0.01), counts=counts)
    wanted.total.backward()
    residual, parts, taken, models = None, [], [], []
    for first, end in stage_layers(MODELS[kind], stages):
        model: Deepseek = model_of(kind)
        model.keep_layers(first, end)
        found = pretraining_loss(
            model, rows, LossWeights(0.3, 0.01), counts=counts, residual=residual
        )
        residual = None if found.residual is None else found.residual.detach().requires_grad_()
        parts.append(found)
        taken.append(residual)
        models.append(model)
    assert parts[-1].residual is None and torch.equal(parts[-1].next_token, wanted.next_token)
    assert {name: loads.tolist() for part in parts for name, loads in part.loads.items()} == {
        name: loads.tolist() for name, loads in wanted.loads.items()
    }
    for name in ("total", "balance", "indexer"):
        total = sum(float(getattr(part, name).detach()) for part in parts)
        assert total == pytest.approx(float(getattr(wanted, name).detach()), rel=1e-6)
    for part, passed_on in reversed(list(zip(parts, taken, strict=True))):
        if part.total.requires_grad:  # a stage of dense layers has no loss of its own
            part.total.backward(retain_graph=True)
        if part.residual is not None:
            part.residual.backward(passed_on.grad)
    held: dict[str, list[torch.Tensor]] = {}
    for model in models:
        for name, parameter in model.named_parameters():
            held.setdefault(name, []).append(parameter.grad)
    for name, parameter in whole.named_parameters():
        gradients = [gradient for gradient in held.pop(name) if gradient is not None]
        assert (parameter.grad is None) == (not gradients)
        if gradients:  # the embedding's is the sum of two
            assert torch.allclose(sum(gradients), parameter.grad, rtol=1e-5, atol=1e-7), name
    assert not held
