"""What a real run records: the keys of results.json, the metrics, the fields of a sample.

`test_real_run.py` compares these lists with the miniature run; `run_of` and the builder of
`conftest.py` refuse anything else. So no test of the report is about numbers that no run writes.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from xushi.base.messages import Message
from xushi.data.left_out import REASONS
from xushi.report.read import Run


def _interval(*names: str) -> set[str]:
    return {f"{name}{end}" for name in names for end in ("", "_low", "_high")}


# Keys whose value the page shows outside of "Every number"; K is the number of samples.
SHOWN = {
    *(f"control.{name}" for name in ("steps",)),
    *(f"data.{name}" for name in ("bytes", "documents", "heldout_bytes", "heldout_fraction")),
    *(f"data.{name}" for name in ("heldout_rule", "heldout_overlap", "sha256", "train_tokens")),
    *(f"data.heldout_groups{name}" for name in ("", "_named")),
    *(f"data.left_out.{reason}" for reason in REASONS),
    *(f"evaluate.bits_per_byte{name}" for name in ("", "_gzip", "_xz", "_zstd", "_xz_primed")),
    "evaluate.xz_primed_training_bytes",
    "export.max_logit_difference",
    *(f"machine.{name}" for name in ("cores", "cpu", "device", "dtype", "memory_bytes")),
    *(f"machine.{name}" for name in ("op_forms", "python", "system", "threads", "torch")),
    "memory.peak_bytes",
    "memory.peak_children_bytes",
    "model.kv_cache_bytes_per_token",
    *(f"model.parameters_{name}" for name in ("total", "active", "mtp")),
    *(f"pretrain.{name}" for name in ("epochs", "loss", "mtp_loss", "steps", "tokens")),
    "pretrain.tokens_per_second",
    *(f"rl.{name}" for name in ("answers", "max_logprob_difference", "reward", "steps")),
    *(f"rl.{name}" for name in ("tasks", "tasks_are", "longer_tasks_are")),
    *_interval("rl.greedy_before", "rl.greedy_after", "rl.avgK_before", "rl.avgK_after"),
    *_interval("rl.passK_before", "rl.passK_after", "rl.forced_before", "rl.sft_equal_flops"),
    *_interval("rl.longer_greedy_before", "rl.longer_greedy_after"),
    *(f"rl.{name}" for name in ("length_before", "length_after")),
    *(f"rl.{name}" for name in ("thinking_before", "thinking_after")),
    *(f"run.{name}" for name in ("name", "recipe_hash", "seed", "version", "without")),
    *(f"seconds.{name}" for name in ("data", "tokenizer", "pretrain", "sft", "rl", "control")),
    *(f"seconds.{name}" for name in ("evaluate", "export", "total")),
    *(f"sft.{name}" for name in ("examples", "loss", "steps")),
    "tokenizer.bytes_per_token",
    "tokenizer.vocab_size",
}
# Keys that are in "Every number" alone.
NUMBERS_ONLY = {
    "data.heldout_groups_sha256",
    "data.files",
    "data.heldout_tokens",
    "evaluate.ratio_to_xz",
    "export.models",
    "rl.verifier_errors_after",
    "rl.verifier_errors_before",
    "model.parameters_active_without_embedding",
    "seconds.this_start",
    "tokenizer.sha256",
}
# Metrics that the tests use; N is a number.
METRICS = {
    "pretrain": {
        *("loss", "mtp_loss", "balance_loss", "learning_rate", "gradient_norm", "target_tokens"),
        *("tokens_per_second", "heldout_bits_per_byte"),
        *(f"router.N.{name}" for name in ("load.N", "max_violation", "dead_experts", "bias_drift")),
    },
    "sft": {"loss"},
    "rl": {
        *("reward", "length", "entropy", "truncated", "with_signal", "logprob_difference", "loss"),
    },
}
SAMPLE_FIELDS = {"prompt", "reasoning", "content", "verdict", "answer", "transcript"}
COMPLETION_FIELDS = {"prompt", "completion"}


def key_pattern(key: str) -> str:
    """The key as `SHOWN` has it: avg8 is avgK."""
    return re.sub(r"^rl\.(avg|pass)\d+_", r"rl.\1K_", key)


def metric_pattern(name: str) -> str:
    """The metric as `METRICS` has it: router.3.load.11 is router.N.load.N."""
    return re.sub(r"\d+", "N", name)


def check_keys(keys: Iterable[str]) -> None:
    """Refuse keys that no run writes."""
    unknown = {key_pattern(key) for key in keys} - SHOWN - NUMBERS_ONLY
    assert not unknown, f"no run writes {unknown}"


def check_metrics(stage: str, names: Iterable[str]) -> None:
    """Refuse metrics that no run writes."""
    unknown = {metric_pattern(name) for name in names} - METRICS[stage]
    assert not unknown, f"no run writes {unknown} of {stage}"


def run_of(results: Mapping[str, Any]) -> Run:
    """A run that holds nothing but these results."""
    check_keys(results)
    return Run(Path("runs/x"), dict(results), {}, "", None)


def sample(prompt: str, content: str, right: bool, answer: str, reasoning: str = "") -> Any:
    """An episode of one turn as samples.json has it."""
    messages = [Message("user", prompt), Message("assistant", content, reasoning or None)]
    return {
        "prompt": prompt,
        "reasoning": reasoning or None,
        "content": content,
        "verdict": "right" if right else "wrong",
        "answer": answer,
        "transcript": [message.to_dict() for message in messages],
    }


def plain(text: str) -> str:
    """With ordinary spaces."""
    return text.replace("\u202f", " ").replace("\u00a0", " ")
