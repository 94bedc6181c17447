"""A synthetic run directory for edge cases: built in a moment, and of nothing but what a real run
writes.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xushi.base.tracking import Tracking

from .recorded import COMPLETION_FIELDS, SAMPLE_FIELDS, check_keys, check_metrics, sample

Build = Callable[[Path], Path]
Metrics = Mapping[str, Mapping[str, list[tuple[int, float]]]]

RECIPE = """# A small DeepSeek, from the text of installed packages.
seed = 1

[model]
hidden_size = 192
n_routed_experts = 16

[pretrain]
steps = 120
"""

RESULTS: dict[str, Any] = {
    "run.name": "demo",
    "run.seed": 1,
    "run.version": "0.1.0",
    "run.without": "",
    "run.recipe_hash": "9f2c61d0a7be4415c0d98e3b77a1f2044f8c2d71c3a5ee90b16dd2f3c4a5b6c7",
    "machine.cpu": "Intel(R) Xeon(R) Platinum 8481C @ 2.70GHz",
    "machine.cores": 2,
    "machine.threads": 2,
    "machine.memory_bytes": 25190846464,
    "machine.torch": "2.13.0+cpu",
    "machine.device": "cpu",
    "machine.dtype": "bf16",
    "data.bytes": 24113408,
    "data.documents": 3812,
    "data.heldout_bytes": 1468392,
    "data.heldout_fraction": 0.06089,
    "data.heldout_rule": "groups",
    "data.heldout_overlap": 0.0012,
    "data.heldout_groups": 2,
    "data.heldout_groups_named": "python/click, python/idna",
    "data.train_tokens": 6421337,
    "data.sha256": "5c0f7a0c1b6d2d0e4e1f90a1b2c3d4e5f60718293a4b5c6d7e8f901a2b3c4d5e",
    "tokenizer.vocab_size": 4096,
    "tokenizer.bytes_per_token": 3.5271,
    "model.parameters_total": 5218304,
    "model.parameters_active": 2391040,
    "model.parameters_mtp": 611200,
    "model.kv_cache_bytes_per_token": 1152,
    "pretrain.steps": 120,
    "pretrain.tokens": 983040,
    "pretrain.tokens_per_second": 18432.7,
    "pretrain.loss": 3.3127,
    "sft.steps": 80,
    "sft.loss": 0.2816,
    "rl.steps": 60,
    "rl.tasks": 256,
    "rl.tasks_are": "riddles of 6 to 8 lines",
    "rl.longer_tasks_are": "riddles of 9 lines",
    "evaluate.bits_per_byte": 1.5213,
    "evaluate.bits_per_byte_gzip": 1.9264,
    "evaluate.bits_per_byte_xz": 1.5861,
    "evaluate.bits_per_byte_zstd": 1.6427,
    "evaluate.bits_per_byte_xz_primed": 1.2411,
    "rl.greedy_before": 0.11718,
    "rl.greedy_before_low": 0.0833,
    "rl.greedy_before_high": 0.1624,
    "rl.greedy_after": 0.9921875,
    "rl.greedy_after_low": 0.9719,
    "rl.greedy_after_high": 0.9979,
    "rl.avg4_before": 0.2617,
    "rl.avg4_after": 0.9834,
    "rl.pass4_before": 0.8828,
    "rl.pass4_before_low": 0.8378,
    "rl.pass4_before_high": 0.9166,
    "rl.pass4_after": 1.0,
    "rl.forced_before": 0.9648,
    "rl.sft_equal_flops": 0.1211,
    "rl.longer_greedy_before": 0.1094,
    "rl.longer_greedy_after": 0.4375,
    "rl.length_before": 5.37,
    "rl.length_after": 22.81,
    "seconds.data": 6.81,
    "seconds.tokenizer": 4.12,
    "seconds.pretrain": 281.4,
    "seconds.sft": 88.9,
    "seconds.rl": 62.3,
    "seconds.evaluate": 71.2,
    "seconds.export": 1.93,
    "seconds.total": 516.66,
    "memory.peak_bytes": 2104819712,
    "export.max_logit_difference": 2.86e-06,
}


def write_run(
    directory: Path,
    results: Mapping[str, Any] = RESULTS,
    metrics: Metrics | None = None,
    samples: Mapping[str, Any] | None = None,
) -> Path:
    """Fill a directory as a run would and return it. Refuses what no run writes."""
    check_keys(results)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "results.json").write_text(json.dumps(results), encoding="utf-8")
    (directory / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    if samples is not None:
        for name, entries in samples.items():
            fields = COMPLETION_FIELDS if name == "base" else SAMPLE_FIELDS
            assert all(set(entry) <= fields for entry in entries)
        (directory / "samples.json").write_text(json.dumps(samples), encoding="utf-8")
    tracking = Tracking(directory / "tracking.sqlite")
    for stage, series in (metrics or {}).items():
        check_metrics(stage, series)
        tracking.event(stage, "started")
        steps: dict[int, dict[str, float]] = {}
        for name, points in series.items():
            for step, value in points:
                steps.setdefault(step, {})[name] = float(value)
        for step in sorted(steps):
            tracking.metrics(stage, step, steps[step])
    tracking.close()
    return directory


@pytest.fixture(scope="session")
def _full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(0)
    metrics = {"pretrain": pretraining(random), "sft": _fine_tuning(random), "rl": _rl(random)}
    return write_run(tmp_path_factory.mktemp("report") / "demo", RESULTS, metrics, _samples())


@pytest.fixture
def full_run(_full: Path) -> Build:
    """A builder: fill a directory as a full run would and return it."""
    return lambda directory: Path(shutil.copytree(_full, directory))


def pretraining(
    random: np.random.Generator, steps: int = 120
) -> dict[str, list[tuple[int, float]]]:
    """Metrics of pretraining with five routers of 16 experts."""

    def loss(step: int) -> float:
        return 3.0 + 5.3 * math.exp(-step / 8) + 1.35 * math.exp(-step / 60)

    every = range(1, steps + 1)
    metrics = {
        "loss": [(s, loss(s) + 0.13 * random.normal()) for s in every],
        "mtp_loss": [(s, loss(s) + 0.55 + 0.13 * random.normal()) for s in every],
        "balance_loss": [(s, 1.0 + 0.4 * math.exp(-s / 20)) for s in every],
        "learning_rate": [(s, 3e-3 * min(1, s / 10)) for s in every],
        "gradient_norm": [(s, 0.6 + 3 * math.exp(-s / 20)) for s in every],
        "tokens_per_second": [(s, 18400 + 500 * random.normal()) for s in every],
        "target_tokens": [(s, 4096.0 + 100 * min(s, 40)) for s in every],  # the batch grows
        "heldout_bits_per_byte": [(s, loss(s) / 2.4446 + 0.12) for s in range(10, steps + 1, 10)],
    }
    for layer in range(1, 6):
        for step in range(10, steps + 1, 10):
            weight = np.exp(math.exp(-step / 60) * random.normal(size=16))
            if layer == 3 and step < 40:
                weight[11] = 0.0
            share = weight / weight.sum()
            router = {f"load.{expert}": share[expert] for expert in range(16)}
            router["max_violation"] = share.max() * 16 - 1
            router["dead_experts"] = float((share == 0).sum())
            for name, value in router.items():
                metrics.setdefault(f"router.{layer}.{name}", []).append((step, float(value)))
    return metrics


def _fine_tuning(random: np.random.Generator) -> dict[str, list[tuple[int, float]]]:
    return {
        "loss": [(s, 0.27 + 2.2 * math.exp(-s / 40) + 0.02 * random.normal()) for s in range(1, 81)]
    }


def _rl(random: np.random.Generator) -> dict[str, list[tuple[int, float]]]:
    rise = {s: 1 / (1 + math.exp(-(s - 22) / 4)) for s in range(1, 61)}
    return {
        "reward": [
            (s, min(1.0, 0.26 + 0.72 * r + 0.03 * random.normal())) for s, r in rise.items()
        ],
        "length": [(s, 5.4 + 17.4 * r) for s, r in rise.items()],
        "entropy": [(s, 0.5 * (1 - r) + 0.04) for s, r in rise.items()],
        "truncated": [(s, 0.0) for s in rise],
        "with_signal": [(s, 1 - r) for s, r in rise.items()],
        "logprob_difference": [(s, 1e-8 * random.random()) for s in rise],
        "loss": [(s, 0.02 * random.normal()) for s in rise],
    }


def _samples() -> dict[str, list[dict[str, Any]]]:
    numbers = range(10)
    before = [sample(f"riddle {i}", "9" if i == 4 else "no", i == 4, str(i + 5)) for i in numbers]
    after = [sample(f"riddle {i}", str(i + 5), True, str(i + 5), f"think {i}") for i in numbers]
    base = [{"prompt": "import os\nimport ", "completion": "sys\nimport time\n"}]
    return {"before": before, "after": after, "base": base}
