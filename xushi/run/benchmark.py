"""Training speed on this machine: the time of whole optimizer steps, by part and per token."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from xushi.base.machine import inspect, measure_matrix_gflops, peak_memory_bytes
from xushi.base.progress import say
from xushi.model import Batch, Deepseek, ModelConfig
from xushi.ops import native
from xushi.plan import train_flops_per_token
from xushi.run.recipe import load_recipe
from xushi.train import PretrainConfig, TrainingState, chosen_dtype
from xushi.train import training_step as one_step

_S = dict(
    vocab_size=4096,
    hidden_size=256,
    num_hidden_layers=6,
    num_attention_heads=8,
    intermediate_size=768,
    moe_intermediate_size=128,
    n_routed_experts=32,
    num_experts_per_tok=4,
    n_shared_experts=1,
    kv_lora_rank=64,
    q_lora_rank=128,
    qk_rope_head_dim=16,
    qk_nope_head_dim=32,
    v_head_dim=32,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    max_position_embeddings=512,
    num_nextn_predict_layers=0,
)
_M = dict(
    _S,
    vocab_size=16384,
    hidden_size=512,
    num_hidden_layers=12,
    intermediate_size=1536,
    moe_intermediate_size=256,
    n_routed_experts=64,
    num_experts_per_tok=6,
    kv_lora_rank=128,
    q_lora_rank=256,
)
# The model and how many sequences of 512 tokens a step takes. S has 20 million parameters, M has
# 307 million.
SHAPES = {"S": (_S, 8), "M": (_M, 4)}
PARTS = ("Linear", "Attention", "Experts", "CrossEntropy", "Norm", "Swiglu")


@dataclass(frozen=True)
class Shape:
    """A model and the settings and size of its training step."""

    name: str
    config: ModelConfig
    settings: PretrainConfig
    length: int  # of a sequence, in tokens

    @property
    def sequences(self) -> int:
        """How many sequences a step takes."""
        return self.settings.batch_tokens // self.length

    def but(self, **settings: Any) -> "Shape":
        """The same shape with some settings changed."""
        return replace(self, settings=self.settings.model_copy(update=settings))

    def tokens(self) -> Tensor:
        """Random tokens for one step, [sequences, length]; the same in every call."""
        stream = torch.Generator().manual_seed(0)
        return torch.randint(
            0, self.config.vocab_size, (self.sequences, self.length), generator=stream
        )


def named_shape(name: str) -> Shape:
    """The shape S or M (both with AdamW), or that of the recipe in the file `name`."""
    if name in SHAPES:
        fields, sequences = SHAPES[name]
        return Shape(
            name,
            ModelConfig.model_validate(fields),
            PretrainConfig(
                steps=1, learning_rate=1e-3, optimizer="adamw", batch_tokens=sequences * 512
            ),
            512,
        )
    recipe = load_recipe(Path(name), [])
    return Shape(recipe.name, recipe.sized_model, recipe.pretrain, recipe.data.sequence_length)


def training_step(shape: Shape, device: str = "cpu") -> Callable[[Tensor], None]:
    """A function that takes one training step on tokens [B, T] with a new model.

    It includes everything that a step does: clipping, the optimizer, router biases and metrics.
    Each row is one document. The learning rate is so small that any number of steps may be timed.
    """
    model = Deepseek(shape.config).initialise(0).to(device)
    settings = shape.settings.model_copy(
        update={
            "learning_rate": 1e-9,
            "adamw_learning_rate": None,
            "warmup_steps": 0,
            "indexer_warmup_steps": 0,
        }
    )
    state = TrainingState.begin(model, settings)

    def step(tokens: Tensor) -> None:
        batch = Batch(
            tokens,
            targets=tokens.roll(-1, 1),
            loss_mask=torch.ones_like(tokens, dtype=torch.bool),
            positions=torch.arange(tokens.shape[1]).expand_as(tokens),
            segments=torch.zeros_like(tokens),
        )
        one_step(state, settings, 0, batch)
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def shares_of_time(step: Callable[[], None]) -> dict[str, float]:
    """The share of a step's CPU time in each kind of compiled op, forward plus backward, by name.

    "other" is the time outside the compiled ops.
    """
    with torch.profiler.profile() as profile:
        step()
    seconds = dict.fromkeys((*PARTS, "other"), 0.0)
    for event in profile.key_averages():
        name = event.key.removesuffix("Backward")
        found = [part for part in PARTS if name in (f"Native{part}", f"NativeLatent{part}")]
        seconds[found[0] if found else "other"] += event.self_cpu_time_total
    total = sum(seconds.values())
    return {part: value / total for part, value in seconds.items()}


def line_through(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(fixed, slope) of the line t = fixed + slope * x through (x, t) points, by least squares."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_t = sum(t for _, t in points) / len(points)
    slope = sum((x - mean_x) * (t - mean_t) for x, t in points) / sum(
        (x - mean_x) ** 2 for x, _ in points
    )
    return mean_t - slope * mean_x, slope


def benchmark_training(shape: Shape, rounds: int = 5) -> dict[str, Any]:
    """Time `rounds` training steps after one that warms up; the results have keys `bench.*`.

    They are: tokens per second (median, slowest, fastest), the share of the speed of PyTorch's
    matrix product on this machine, the share of time of each part, and the cost per token.
    """
    threads = inspect().usable_cores
    dtype = chosen_dtype(shape.settings.dtype)
    torch.set_num_threads(threads)
    step = training_step(shape)
    tokens = shape.tokens()

    def seconds(sequences: int) -> float:
        began = time.perf_counter()
        step(tokens[:sequences])
        return time.perf_counter() - began

    say(f"{shape.name}: {rounds + 1} steps of {shape.sequences} sequences of {shape.length} tokens")
    seconds(shape.sequences)
    # Measured before and after the steps, since the speed of a shared machine changes.
    before = measure_matrix_gflops(dtype)
    times = []
    for done in range(rounds):
        times.append(seconds(shape.sequences))
        say(f"step {done + 1} of {rounds}: {shape.settings.batch_tokens / times[-1]:,.0f} tok/s")
    ceiling = max(before, measure_matrix_gflops(dtype))
    result = {
        "bench.shape": shape.name,
        "bench.dtype": dtype,
        "bench.op_forms": native.form(dtype),
        "bench.threads": threads,
        "bench.optimizer": shape.settings.optimizer,
        **_rates(shape, times, ceiling),
        **_cost_per_token(shape, seconds),
    }
    shares = shares_of_time(lambda: step(tokens))
    result |= {f"bench.time_{part.lower()}": share for part, share in shares.items()}
    return result | {"memory.peak_bytes": peak_memory_bytes()}


def _rates(shape: Shape, times: Sequence[float], ceiling: float) -> dict[str, float]:
    """Speed from the seconds of each step; `ceiling` in GFLOP/s."""
    rate = shape.settings.batch_tokens / median(times)
    flops = train_flops_per_token(shape.config, shape.length, mtp=bool(shape.settings.mtp_weight))
    return {
        "bench.tokens_per_second": rate,
        "bench.tokens_per_second_slowest": shape.settings.batch_tokens / max(times),
        "bench.tokens_per_second_fastest": shape.settings.batch_tokens / min(times),
        "bench.ceiling_gflops": ceiling,
        "bench.share_of_ceiling": rate * flops / ceiling / 1e9,
    }


def _cost_per_token(shape: Shape, seconds: Callable[[int], float]) -> dict[str, float]:
    """The line through the times of a quarter, a half and a whole step; empty if those are one."""
    sizes = sorted({max(1, shape.sequences // part) for part in (4, 2, 1)})
    if len(sizes) == 1:
        return {}
    points = [(n * shape.length, median(seconds(n) for _ in range(3))) for n in sizes]
    fixed, slope = line_through(points)
    return {"bench.fixed_seconds": fixed, "bench.seconds_per_token": slope}


def sentences(result: dict[str, Any]) -> str:
    """The results of `benchmark_training` as text."""
    r = {key.removeprefix("bench."): value for key, value in result.items()}
    lines = [
        f"{r['shape']}, {r['optimizer']}, {r['dtype']} by {r['op_forms']}, {r['threads']} threads",
        f"{r['tokens_per_second']:,.0f} tokens a second ({r['tokens_per_second_slowest']:,.0f} to "
        f"{r['tokens_per_second_fastest']:,.0f})",
        f"{r['share_of_ceiling']:.0%} of {r['ceiling_gflops']:.0f} GFLOP/s, the speed of PyTorch's "
        "matrix product on this machine",
    ]
    if "fixed_seconds" in r:
        lines.append(
            f"a step of n tokens takes {r['fixed_seconds'] * 1e3:.0f} ms + n * "
            f"{r['seconds_per_token'] * 1e6:.0f} us"
        )
    lines += [
        "time: "
        + ", ".join(f"{part} {r[f'time_{part.lower()}']:.0%}" for part in (*PARTS, "other")),
        f"peak memory {r['memory.peak_bytes'] / 2**30:.2f} GiB",
    ]
    return "\n".join(lines)
