"""Training speed on this CPU, compared with PyTorch's forms of the ops or with transformers.

    python bench/train_cpu.py [SHAPE or RECIPE]... [--peers] [--fp32 | --bf16] [--rounds N]

A shape is S or M (the default is both), or a recipe's TOML file for its model. The dtype is the one
that training would choose on this machine. What is compared:

- xushi: a recipe's model with the recipe's optimizer, S and M with AdamW;
- without --peers: xushi with PyTorch's forms of its ops;
- with --peers: transformers 5.23 as installed, and transformers with glibc's allocator set to keep
  freed memory ("tuned"); both with sdpa, grouped_mm, fused AdamW, and autocast for bf16.

Each of these is a process of its own, called a side. A side takes one whole optimizer step when it
is asked to, so that the sides take turns and each has its own peak memory. All take the same random
tokens. The program prints tables, and one line of JSON last.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Annotated

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import torch
import typer

from xushi.base.allocator import keep_freed_memory
from xushi.base.machine import (
    best_training_dtype,
    inspect,
    measure_matrix_gflops,
    peak_memory_bytes,
)
from xushi.model import ModelConfig, to_published
from xushi.ops import native
from xushi.plan import train_flops_per_token
from xushi.run.benchmark import (
    SHAPES,
    Shape,
    line_through,
    named_shape,
    shares_of_time,
    training_step,
)

WORKER = "--worker"  # the first argument of a side's process
SETTINGS = {
    "xushi pytorch": {"XUSHI_OPS": "pytorch"},
    "transformers tuned": {
        "MALLOC_TRIM_THRESHOLD_": "2147483647",
        "MALLOC_TOP_PAD_": "67108864",
        "MALLOC_MMAP_THRESHOLD_": "2147483647",
    },
}


def shape_without_mtp(name: str) -> Shape:
    """The named shape without MTP layers, which transformers does not have."""
    shape = named_shape(name)
    return replace(shape, config=shape.config.model_copy(update={"num_nextn_predict_layers": 0}))


def peer(config: ModelConfig, dtype: str) -> Callable[[torch.Tensor], None]:
    """A training step of transformers. Each row is one document; no clipping, no router biases."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    published = {
        key: value for key, value in to_published(config).items() if key != "architectures"
    }
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**published)).train()
    model.set_experts_implementation("grouped_mm")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step(tokens: torch.Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def worker(side: str, name: str, dtype: str) -> None:
    """A side's process: answer each line of standard input with one line of JSON.

    A number n asks for one step of n sequences and is answered with its seconds; "parts" with the
    shares of time of a step, "memory" with the peak memory in bytes, "form" with the forms of the
    ops in use.
    """
    torch.set_num_threads(inspect().usable_cores)
    shape = shape_without_mtp(name)
    tokens = shape.tokens()
    if side.startswith("xushi"):
        keep_freed_memory()
        step = training_step(shape.but(dtype=dtype))
    else:
        step = peer(shape.config, dtype)
    for line in sys.stdin:
        answer: object
        if line == "parts\n":
            answer = shares_of_time(lambda: step(tokens))
        elif line == "memory\n":
            answer = peak_memory_bytes()
        elif line == "form\n":
            answer = native.status(dtype)
        else:
            began = time.perf_counter()
            step(tokens[: int(line)])
            answer = time.perf_counter() - began
        print(json.dumps(answer), flush=True)


class Side:
    """One of the processes that are compared."""

    def __init__(self, side: str, name: str, dtype: str) -> None:
        self.side = side
        environment = {**os.environ, **SETTINGS.get(side, {})}
        self.process = subprocess.Popen(
            [sys.executable, __file__, WORKER, side, name, dtype],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )

    def ask(self, question: object) -> object:
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(f"{question}\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            raise SystemExit(
                f"{self.side} exited with status {self.process.wait()}\n-9 means too little "
                "memory (the three sides of M need 20 GiB); other errors are printed above"
            ) from None

    def seconds(self, sequences: int) -> float:
        answer = self.ask(sequences)
        assert isinstance(answer, float)
        return answer


def measure(name: str, dtype: str, peers: bool, rounds: int) -> dict[str, float]:
    """Print one shape's table; returns its figures."""
    shape = shape_without_mtp(name)
    names = ["xushi", *(["transformers", "transformers tuned"] if peers else ["xushi pytorch"])]
    sides = {side: Side(side, name, dtype) for side in names}
    seconds: dict[str, list[float]] = {side: [] for side in names}
    before = measure_matrix_gflops(dtype)
    for _ in range(rounds + 1):
        for side, process in sides.items():
            seconds[side].append(process.seconds(shape.sequences))
    ceiling = max(before, measure_matrix_gflops(dtype))
    print(
        f"\n{name}: {shape.sequences} sequences of {shape.length}, {shape.settings.optimizer}, "
        f"{dtype}, ceiling {ceiling:.0f} GFLOP/s; {sides['xushi'].ask('form')}"
    )
    rates = speeds(shape, sides, seconds, ceiling)
    flops = train_flops_per_token(shape.config, shape.length, mtp=False)
    result = {
        f"tokens_per_second_{name}": rates["xushi"],
        f"share_of_ceiling_{name}": rates["xushi"] * flops / ceiling / 1e9,
        **ratios(name, rates),
        **cost(name, shape, sides["xushi"]),
    }
    for process in sides.values():
        process.process.terminate()
        process.process.wait()
    return result


def speeds(
    shape: Shape, sides: dict[str, Side], seconds: dict[str, list[float]], ceiling: float
) -> dict[str, float]:
    """Print a line for each side; returns tokens per second, without the first step."""
    flops = train_flops_per_token(shape.config, shape.length, mtp=False)
    rates = {}
    for side, times in seconds.items():
        ordered = sorted(shape.sequences * shape.length / t for t in times[1:])
        rates[side] = median(ordered)
        memory = sides[side].ask("memory")
        assert isinstance(memory, int)
        print(
            f"  {side:<20}{rates[side]:9,.0f} tok/s ({ordered[0]:,.0f} to {ordered[-1]:,.0f}), "
            f"{rates[side] * flops / ceiling / 1e9:4.0%} of the ceiling, "
            f"peak {memory / 2**30:.2f} GiB"
        )
    return rates


def ratios(name: str, rates: dict[str, float]) -> dict[str, float]:
    """Print and return xushi's speed divided by that of the other sides."""
    if "xushi pytorch" in rates:
        ratio = rates["xushi"] / rates["xushi pytorch"]
        print(f"  compiled to PyTorch's forms {ratio:.2f}")
        return {f"ratio_{name}_pytorch": ratio}
    ratio = rates["xushi"] / rates["transformers"]
    tuned = rates["xushi"] / rates["transformers tuned"]
    print(f"  xushi to transformers {ratio:.2f}, tuned {tuned:.2f}")
    return {f"ratio_{name}": ratio, f"ratio_{name}_tuned": tuned}


def cost(name: str, shape: Shape, side: Side) -> dict[str, float]:
    """Print and return seconds per step and per token, and the share of time of each part."""
    result: dict[str, float] = {}
    sizes = sorted({max(1, shape.sequences // part) for part in (4, 2, 1)})
    points = [(n * shape.length, median(side.seconds(n) for _ in range(3))) for n in sizes]
    if len(points) > 1:
        fixed, slope = line_through(points)
        print(f"  t = {fixed * 1e3:.0f} ms + tokens * {slope * 1e6:.1f} us")
        result |= {f"fixed_seconds_{name}": fixed, f"seconds_per_token_{name}": slope}
    shares = side.ask("parts")
    assert isinstance(shares, dict)
    print("  time: " + ", ".join(f"{part} {share:.0%}" for part, share in shares.items()))
    return result | {f"time_{part}_{name}": share for part, share in shares.items()}


def main(
    shapes: Annotated[list[str] | None, typer.Argument(help="S, M or recipe files")] = None,
    peers: Annotated[bool, typer.Option("--peers", help="compare with transformers")] = False,
    fp32: Annotated[bool, typer.Option("--fp32")] = False,
    bf16: Annotated[bool, typer.Option("--bf16")] = False,
    rounds: Annotated[int, typer.Option(help="steps after the first")] = 5,
) -> None:
    """Time training steps on this CPU."""
    dtype = "fp32" if fp32 else "bf16" if bf16 else best_training_dtype()[0]
    torch.set_num_threads(inspect().usable_cores)
    result: dict[str, float | str] = {"dtype": dtype}
    for name in shapes or list(SHAPES):
        result |= measure(name, dtype, peers, rounds)
    print(json.dumps(result))


if __name__ == "__main__":
    if sys.argv[1:2] == [WORKER]:
        worker(*sys.argv[2:])
    else:
        typer.run(main)
