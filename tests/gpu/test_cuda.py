"""The same code on a GPU: gradients, training, resume, sampling, and a whole run. Skipped where
there is none.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from xushi.base.tracking import Tracking
from xushi.engine import SamplingParams, generate_ids
from xushi.model import Batch, Deepseek, LossWeights, pretraining_loss
from xushi.ops import routed_experts, routed_experts_reference
from xushi.train import Data, Layout, LayoutConfig, join, latest_checkpoint

from ..train.conftest import train
from ..train.layouts import CONFIG, MODELS, ROWS, THIRD, batch, model_of

pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
ROOT = Path(__file__).parent.parent.parent
KINDS = [kind for kind in MODELS if not kind.endswith("deep")]


@pytest.fixture(scope="module")
def layout() -> Layout:
    return join(LayoutConfig(), THIRD, "cuda")


def gradients(model: Deepseek) -> dict[str, Tensor]:
    rows = batch(0, ROWS).to(model.device)
    pretraining_loss(model, rows, LossWeights(0.3, 0.01)).total.backward()
    return {
        name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_cpus(kind: str, layout: Layout) -> None:
    """In float64 to its rounding; in float32 no further from that than the CPU's are, within the
    design's 2e-6.
    """
    exact, own = gradients(model_of(kind).double()), gradients(model_of(kind))
    there, rounded = (
        gradients(model_of(kind).double().to("cuda")),
        gradients(model_of(kind).to("cuda")),
    )
    assert there.keys() == exact.keys()
    whole = torch.stack([g.norm() for g in exact.values()]).norm()
    for name, gradient in exact.items():
        size = gradient.norm() + 1e-3 * whole
        assert (there[name] - gradient).norm() <= 1e-12 * size, name
        assert (rounded[name] - gradient).norm() <= (own[name] - gradient).norm() + 2e-6 * size, (
            name
        )


@pytest.mark.parametrize("limit", [None, 1.0])
def test_grouped_products_are_the_references(limit: float | None, layout: Layout) -> None:
    """In bfloat16, an expert without rows included: no further from float64 than twice what the
    reference errs.
    """
    stream = torch.Generator().manual_seed(0)
    tokens, experts, top_k, hidden, width = 200, 6, 2, 64, 32
    shapes = (
        (tokens, hidden),
        (tokens, top_k),
        (experts, 2 * width, hidden),
        (experts, hidden, width),
    )
    drawn = [
        torch.randn(shape, generator=stream) * (1.0 if len(shape) == 2 else 0.1) for shape in shapes
    ]
    indices = torch.randint(0, experts - 1, (tokens, top_k), generator=stream)
    upstream = torch.randn(tokens, hidden, generator=stream)

    def run(form, device: str, dtype: torch.dtype) -> list[Tensor]:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        x = drawn[0].bfloat16().to(device, dtype).requires_grad_()
        weights, gate_up, down = (t.to(device, wide, copy=True).requires_grad_() for t in drawn[1:])
        out = form(x, indices.to(device), weights, gate_up, down, limit)
        out.backward(upstream.bfloat16().to(out.dtype).to(device))
        return [
            t.detach().double().cpu() for t in (out, x.grad, weights.grad, gate_up.grad, down.grad)
        ]

    exact = run(routed_experts_reference, "cpu", torch.float64)
    reference = run(routed_experts_reference, "cpu", torch.bfloat16)
    for found, own, wanted in zip(
        run(routed_experts, "cuda", torch.bfloat16), reference, exact, strict=True
    ):
        assert (found - wanted).norm() <= 2 * (own - wanted).norm()


def trained(layout: Layout, directory: Path, stops: int | None = None) -> None:
    def batches(cursor: int, count: int) -> Batch:
        if stops is not None and cursor // ROWS >= stops:
            raise KeyboardInterrupt
        return batch(cursor, count)

    config = CONFIG.model_copy(update={"dtype": "bf16"})
    train(
        "test",
        model_of("v3").to("cuda"),
        config,
        Data(batches, lambda _: ROWS),
        directory,
        Tracking(None),
        layout=layout,
    )


def test_the_same_run_and_a_resumed_one_have_the_same_bits(layout: Layout, tmp_path: Path) -> None:
    trained(layout, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(layout, tmp_path / "halved", 9)
    trained(layout, tmp_path / "halved")
    one, other = (latest_checkpoint(tmp_path / name) for name in ("whole", "halved"))
    assert one.step == other.step == CONFIG.steps
    for group, tensors in one.tensors.items():
        assert all(
            torch.equal(tensor, other.tensors[group][name]) for name, tensor in tensors.items()
        )


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_gives_the_cpus_tokens(kind: str, layout: Layout) -> None:
    """Greedy, in float64, where no tie is near enough to fall the other way."""
    prompts = [[3, 9, 27, 4], [5, 1], [8, 8, 2, 30, 11, 6, 7]]
    params = [SamplingParams(max_tokens=12, temperature=0.0) for _ in prompts]
    here, there = (
        generate_ids(model_of(kind).double().to(device), prompts, params, eos_id=0)
        for device in ("cpu", "cuda")
    )
    assert [a.token_ids for a in there] == [a.token_ids for a in here]


def test_a_whole_run(tmp_path: Path) -> None:
    """Data to export on the GPU, and a replayed step of it to the bit."""
    for words in (
        ["run", str(ROOT / "tests" / "miniature.toml"), "--out", str(tmp_path / "run")],
        ["replay", str(tmp_path / "run"), "--step", "150", "--json"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "xushi", *words], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["machine.device"] != "cpu" and results["machine.op_forms"] == "pytorch on cuda"
    assert results["evaluate.bits_per_byte"] < 3.4 and results["export.max_logit_difference"] == 0
    again = json.loads(done.stdout)
    assert again["loss"] == again["loss_logged"]
