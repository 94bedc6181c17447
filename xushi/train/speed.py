"""How fast a training goes: seconds and tokens, memory, and the share of the machine's
arithmetic.
"""

import time
from collections.abc import Mapping

import torch

from xushi.base.machine import measure_matrix_gflops, peak_memory_bytes
from xushi.train.layout import Layout
from xushi.train.state import TrainingState, chosen_dtype


class Speed:
    """Measures the steps of one start; all processes of a layout make one together."""

    def __init__(self, state: TrainingState) -> None:
        self._layout = state.layout
        self._ceiling = sum(state.layout.team.gather(_flops_per_second(state)))
        self._began = self._step_began = time.monotonic()
        self._tokens = 0.0

    def begin_step(self) -> None:
        """A step begins now."""
        self._step_began = time.monotonic()

    def figures(self, figures: Mapping[str, float], flops: float) -> dict[str, float]:
        """What to track of the step that ends now, by its own figures and its arithmetic.

        "mfu" is its arithmetic per second as a share of what the processes' own matrix products
        reach.
        """
        now = time.monotonic()
        seconds = now - self._step_began
        found = {"seconds": seconds, "memory_bytes": float(_memory_bytes(self._layout))}
        if "target_tokens" in figures:
            self._tokens += figures["target_tokens"]
            found["tokens_per_second"] = self._tokens / (now - self._began)
        if flops:
            found["mfu"] = flops / seconds / self._ceiling
        return found


def _flops_per_second(state: TrainingState) -> float:
    """What this process's matrix product reaches while the other processes run theirs."""
    device = state.layout.device
    bf16 = state.model.compute_dtype == torch.bfloat16 and chosen_dtype("auto", device) == "bf16"
    size = 8192 if device == "cuda" else 512
    return 1e9 * measure_matrix_gflops("bf16" if bf16 else "fp32", size, device=device)


def _memory_bytes(layout: Layout) -> int:
    """The most that this process has held so far, on the GPU if it trains there."""
    return torch.cuda.max_memory_allocated() if layout.device == "cuda" else peak_memory_bytes()
