"""A synthetic run directory with everything a full run leaves, deterministic and built in a moment."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xushi.base.tracking import Tracking

Build = Callable[[Path], Path]

RECIPE = """# A small DeepSeek, from the text of installed packages.
seed = 1

[data]
sources = [{ kind = "installed", weight = 0.9 }, { kind = "digits", weight = 0.1 }]
heldout = 0.06

[model]
hidden_size = 192
num_hidden_layers = 6
n_routed_experts = 16
num_experts_per_tok = 4

[train]
steps = 620
"""

RESULTS: dict[str, Any] = {
    "run.name": "demo",
    "run.seed": 1,
    "run.version": "0.1.0",
    "run.recipe_hash": "9f2c61d0a7be4415c0d98e3b77a1f2044f8c2d71c3a5ee90b16dd2f3c4a5b6c7",
    "machine.cpu": "Intel(R) Xeon(R) Platinum 8481C @ 2.70GHz",
    "machine.cores": 2,
    "machine.threads": 2,
    "machine.memory_bytes": 25190846464,
    "machine.torch": "2.13.0+cpu",
    "machine.python": "3.11.7",
    "machine.dtype": "bfloat16",
    "data.bytes": 24113408,
    "data.documents": 3812,
    "data.heldout_bytes": 1468392,
    "data.heldout_fraction": 0.06089,
    "data.heldout_groups": 14,
    "data.train_tokens": 6421337,
    "data.sha256": "5c0f7a0c1b6d2d0e4e1f90a1b2c3d4e5f60718293a4b5c6d7e8f901a2b3c4d5e",
    "tokenizer.vocab_size": 4096,
    "tokenizer.bytes_per_token": 3.5271,
    "model.parameters_total": 5218304,
    "model.parameters_active": 2391040,
    "model.parameters_mtp": 611200,
    "model.kv_cache_bytes_per_token": 1152,
    "pretrain.steps": 620,
    "pretrain.tokens": 5079040,
    "pretrain.tokens_per_second": 18432.7,
    "pretrain.loss": 3.3127,
    "sft.steps": 400,
    "sft.loss": 0.2816,
    "rl.steps": 60,
    "rl.tasks": 256,
    "rl.digits": "6 to 8",
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
    "rl.avg8_before": 0.2617,
    "rl.avg8_before_low": 0.2411,
    "rl.avg8_before_high": 0.2834,
    "rl.avg8_after": 0.9834,
    "rl.avg8_after_low": 0.9717,
    "rl.avg8_after_high": 0.9903,
    "rl.pass8_before": 0.8828,
    "rl.pass8_before_low": 0.8378,
    "rl.pass8_before_high": 0.9166,
    "rl.pass8_after": 1.0,
    "rl.pass8_after_low": 0.9852,
    "rl.pass8_after_high": 1.0,
    "rl.forced_before": 0.9648,
    "rl.forced_before_low": 0.9345,
    "rl.forced_before_high": 0.9814,
    "rl.sft_equal_time": 0.1211,
    "rl.sft_equal_time_low": 0.0867,
    "rl.sft_equal_time_high": 0.1667,
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
    "seconds.total": 517.4,
    "memory.peak_bytes": 2104819712,
    "export.max_logit_difference": 2.86e-06,
}


@pytest.fixture
def full_run() -> Build:
    """A builder: fill a directory as a full run would and return it."""
    return build_full_run


def build_full_run(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "results.json").write_text(json.dumps(RESULTS), encoding="utf-8")
    (directory / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    (directory / "samples.json").write_text(json.dumps(_samples()), encoding="utf-8")
    tracking = Tracking(directory / "tracking.sqlite")
    tracking._write(
        "INSERT INTO events (time, stage, name, details) VALUES (?, ?, ?, ?)",
        [(1787000000.0, "data", "start", "{}")],
    )
    random = np.random.default_rng(0)
    _write(tracking, "pretrain", _pretrain(random))
    _write(
        tracking,
        "sft",
        {
            "loss": [
                (s, 0.27 + 2.2 * math.exp(-s / 40) + 0.02 * random.normal()) for s in range(1, 401)
            ],
            "greedy": [
                (s, 0.1 + 0.02 * random.normal() if s > 120 else 0.05) for s in range(40, 401, 40)
            ],
        },
    )
    rise = {s: 1 / (1 + math.exp(-(s - 22) / 4)) for s in range(1, 61)}
    _write(
        tracking,
        "rl",
        {
            "reward": [
                (s, min(1.0, 0.26 + 0.72 * r + 0.03 * random.normal())) for s, r in rise.items()
            ],
            "length": [(s, 5.4 + 17.4 * r + 0.6 * random.normal()) for s, r in rise.items()],
            "entropy": [
                (s, 0.5 * (1 - r) + 0.04 + 0.02 * random.random()) for s, r in rise.items()
            ],
            "truncated": [(s, 0.0) for s in rise],
            "max_ratio": [(s, 1.0 + 0.3 * random.random()) for s in rise],
            "logprob_difference": [(s, 1e-8 * random.random()) for s in rise],
            "loss": [(s, 0.02 * random.normal()) for s in rise],
        },
    )
    tracking.close()
    return directory


def _write(tracking: Tracking, stage: str, metrics: dict[str, list[tuple[int, float]]]) -> None:
    rows = [
        (stage, step, name, float(value))
        for name, points in metrics.items()
        for step, value in points
    ]
    tracking._write("INSERT INTO metrics (stage, step, name, value) VALUES (?, ?, ?, ?)", rows)


def _pretrain(random: np.random.Generator, steps: int = 620) -> dict[str, list[tuple[int, float]]]:
    def loss(step: int) -> float:
        decay = max(0.0, (step - 0.8 * steps) / (0.2 * steps))
        return 3.0 + 5.3 * math.exp(-step / 28) + 1.35 * math.exp(-step / 240) - 0.28 * decay

    every = range(1, steps + 1)
    metrics = {
        "loss": [(s, loss(s) + 0.13 * random.normal()) for s in every],
        "mtp_loss": [(s, loss(s) + 0.55 + 0.13 * random.normal()) for s in every],
        "balance_loss": [
            (s, 1.0 + 0.4 * math.exp(-s / 60) + 0.02 * random.random()) for s in every
        ],
        "learning_rate": [
            (s, 3e-3 * min(1, s / 40, max(0.05, (steps - s) / (0.2 * steps)))) for s in every
        ],
        "gradient_norm": [(s, 0.6 + 3 * math.exp(-s / 20) + 0.15 * random.random()) for s in every],
        "tokens_per_second": [(s, 18400 + 500 * random.normal()) for s in every],
        "heldout_bits_per_byte": [
            (s, loss(s) / 2.4446 + 0.12) for s in (1, *range(62, steps + 1, 62))
        ],
    }
    for layer in range(1, 6):
        taste = random.normal(size=16) * 0.8
        for step in range(10, steps + 1, 10):
            weight = np.exp(
                taste * math.exp(-step / (60 + 30 * layer)) + 0.08 * random.normal(size=16)
            )
            if layer == 3 and step < 160:
                weight[11] = 0.0
            share = weight / weight.sum()
            for expert in range(16):
                metrics.setdefault(f"router.{layer}.load.{expert}", []).append(
                    (step, share[expert])
                )
            metrics.setdefault(f"router.{layer}.max_violation", []).append(
                (step, share.max() * 16 - 1)
            )
            metrics.setdefault(f"router.{layer}.dead_experts", []).append(
                (step, float((share == 0).sum()))
            )
            metrics.setdefault(f"router.{layer}.bias_drift", []).append((step, 0.0))
    return metrics


def _samples() -> dict[str, list[dict[str, Any]]]:
    prompts = [
        "83514927",
        "604418",
        "7719035",
        "225108",
        "9938471",
        "518206",
        "44071952",
        "360997",
        "8150263",
        "71946",
    ]
    before, after = [], []
    for index, prompt in enumerate(prompts):
        total, sums = 0, []
        for digit in prompt:
            total += int(digit)
            sums.append(str(total))
        right = str(total % 10)
        guess = right if index == 4 else str((total + 3) % 10)
        before.append(
            {
                "prompt": prompt,
                "reasoning": "",
                "content": guess,
                "right": guess == right,
                "answer": right,
            }
        )
        after.append(
            {
                "prompt": prompt,
                "reasoning": " ".join(sums),
                "content": right,
                "right": True,
                "answer": right,
            }
        )
    base = [
        {
            "prompt": "def mean(values):\n    ",
            "completion": "return sum(values) / len(values)\n\n\ndef _check(value):\n"
            '    if not isinstance(value, (list, tuple)):\n        raise TypeError("values must '
            'be a list")\n',
        },
        {
            "prompt": "import os\nimport ",
            "completion": "sys\nimport time\n\nfrom typing import Any, Optional\n",
        },
        {
            "prompt": "class Config:\n    def __init__(self, ",
            "completion": "config: dict[str, Any] | None = None) -> None:\n        self.config = "
            "config or {}\n",
        },
    ]
    return {"before": before, "after": after, "base": base}
