"""How fast this machine trains a model: whole optimizer steps, where their time goes, and what they
cost per token.
"""

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
SHAPES = {
    "S": (_S, 8),
    "M": (_M, 4),
}  # 20 and 307 million parameters, and sequences of 512 tokens in a step
PARTS = ("Linear", "Attention", "Experts", "CrossEntropy", "Norm", "Swiglu")


@dataclass(frozen=True)
class Shape:
    """A model and a step of its training."""

    name: str
    config: ModelConfig
    settings: PretrainConfig
    length: int  # tokens of a sequence

    @property
    def sequences(self) -> int:
        """In a step."""
        return self.settings.batch_tokens // self.length

    def but(self, **settings: Any) -> "Shape":
        """The same with other settings."""
        return replace(self, settings=self.settings.model_copy(update=settings))

    def tokens(self) -> Tensor:
        """Random ones for a step, the same each time: [sequences, length]."""
        stream = torch.Generator().manual_seed(0)
        return torch.randint(
            0, self.config.vocab_size, (self.sequences, self.length), generator=stream
        )


def named_shape(name: str) -> Shape:
    """S, M (both with AdamW), or the model and settings of a recipe's file."""
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
    config = recipe.model.model_copy(update={"vocab_size": recipe.tokenizer.vocab_size})
    return Shape(recipe.name, config, recipe.pretrain, recipe.data.sequence_length)


def training_step(shape: Shape, device: str = "cpu") -> Callable[[Tensor], None]:
    """A step of a new model on tokens [B, T], with all that training does: clipping, optimizer,
    biases, metrics.

    One document a row. The learning rate is next to nothing: a step may be timed any number of
    times.
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
    """Share of a step's time in each kind of compiled op, forward and backward, and in everything
    else.
    """
    with torch.profiler.profile() as profile:
        step()
    shares = dict.fromkeys((*PARTS, "other"), 0.0)
    for event in profile.key_averages():
        part = next(
            (
                p
                for p in PARTS
                if event.key.removesuffix("Backward") in (f"Native{p}", f"NativeLatent{p}")
            ),
            "other",
        )
        shares[part] += event.self_cpu_time_total
    total = sum(shares.values())
    return {part: time_ / total for part, time_ in shares.items()}


def line_through(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Least squares: (fixed, slope) of t = fixed + slope * x."""
    mean_x, mean_t = (sum(p[i] for p in points) / len(points) for i in (0, 1))
    slope = sum((x - mean_x) * (t - mean_t) for x, t in points) / sum(
        (x - mean_x) ** 2 for x, _ in points
    )
    return mean_t - slope * mean_x, slope


def benchmark_training(shape: Shape, rounds: int = 5) -> dict[str, Any]:
    """Tokens per second, their share of the machine's measured matrix product, time per part, and
    cost per token.

    Medians of `rounds` steps after one that warms up, with the slowest and the fastest. Flat keys
    under `bench`.
    """
    threads, dtype = inspect().usable_cores, chosen_dtype(shape.settings.dtype)
    torch.set_num_threads(threads)
    step, tokens = training_step(shape), shape.tokens()

    def seconds(sequences: int) -> float:
        began = time.perf_counter()
        step(tokens[:sequences])
        return time.perf_counter() - began

    say(f"{shape.name}: {rounds + 1} steps of {shape.sequences} sequences of {shape.length} tokens")
    seconds(shape.sequences)
    ceiling, times = measure_matrix_gflops(dtype), []
    for done in range(rounds):
        times.append(seconds(shape.sequences))
        say(f"step {done + 1} of {rounds}: {shape.settings.batch_tokens / times[-1]:,.0f} tok/s")
    ceiling = max(
        ceiling, measure_matrix_gflops(dtype)
    )  # before and after: a shared machine changes meanwhile
    rate = shape.settings.batch_tokens / median(times)
    flops = train_flops_per_token(shape.config, shape.length, mtp=bool(shape.settings.mtp_weight))
    result = {
        "bench.shape": shape.name,
        "bench.dtype": dtype,
        "bench.op_forms": native.form(dtype),
        "bench.threads": threads,
        "bench.optimizer": shape.settings.optimizer,
        "bench.tokens_per_second": rate,
        "bench.tokens_per_second_slowest": shape.settings.batch_tokens / max(times),
        "bench.tokens_per_second_fastest": shape.settings.batch_tokens / min(times),
        "bench.ceiling_gflops": ceiling,
        "bench.share_of_ceiling": rate * flops / ceiling / 1e9,
    }
    sizes = sorted({max(1, shape.sequences // part) for part in (4, 2, 1)})
    if len(sizes) > 1:
        points = [(n * shape.length, median(seconds(n) for _ in range(3))) for n in sizes]
        result["bench.fixed_seconds"], result["bench.seconds_per_token"] = line_through(points)
    shares = shares_of_time(lambda: step(tokens))
    result |= {f"bench.time_{part.lower()}": share for part, share in shares.items()}
    return result | {"memory.peak_bytes": peak_memory_bytes()}


def sentences(result: dict[str, Any]) -> str:
    """The figures of `benchmark_training`, to be read."""
    r = {key.removeprefix("bench."): value for key, value in result.items()}
    lines = [
        f"{r['shape']}, {r['optimizer']}, {r['dtype']} by {r['op_forms']}, {r['threads']} threads",
        f"{r['tokens_per_second']:,.0f} tokens a second ({r['tokens_per_second_slowest']:,.0f} to "
        f"{r['tokens_per_second_fastest']:,.0f})",
        f"{r['share_of_ceiling']:.0%} of {r['ceiling_gflops']:.0f} GFLOP/s, PyTorch's matrix "
        "product here",
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
