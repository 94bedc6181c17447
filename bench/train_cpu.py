"""Training speed on this CPU: one whole optimizer step, where its time goes, and transformers
beside it.

    python bench/train_cpu.py [SHAPE or RECIPE]... [--peers] [--fp32 | --bf16] [--rounds N]

Shapes are S and M (the default is both), or a recipe's TOML file for its model. The dtype is what
training would choose here. Every side is a process of its own that does one step when it is told
to, so that rounds alternate and each side's peak memory is its own: xushi (a recipe's model with
the recipe's optimizer, S and M with AdamW), and beside it xushi with PyTorch's forms of its ops;
with --peers instead transformers 5.23 as it comes, and transformers with C's allocator told to keep
its memory ("tuned"), both with sdpa, grouped_mm and fused AdamW; bf16 by autocast. All take the
same random tokens. Prints tables and, last, one line of JSON.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import torch

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

SETTINGS = {
    "xushi pytorch": {"XUSHI_OPS": "pytorch"},
    "transformers tuned": {
        "MALLOC_TRIM_THRESHOLD_": "2147483647",
        "MALLOC_TOP_PAD_": "67108864",
        "MALLOC_MMAP_THRESHOLD_": "2147483647",
    },
}


def shape_without_mtp(name: str) -> Shape:
    """The peer has no MTP layers."""
    shape = named_shape(name)
    return replace(shape, config=shape.config.model_copy(update={"num_nextn_predict_layers": 0}))


def peer(config: ModelConfig, dtype: str) -> Callable[[torch.Tensor], None]:
    """transformers' step; its whole rows are one document, and it neither clips nor balances."""
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
    """One step for each line read, of so many sequences; answers its seconds, or to "parts" where
    they go.
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
    """A worker process."""

    def __init__(self, side: str, name: str, dtype: str) -> None:
        self.side = side
        environment = {**os.environ, **SETTINGS.get(side, {})}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", side, name, dtype],
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
                f"{self.side} ended with {self.process.wait()}\n-9 is for want of memory, of "
                "which the "
                "three sides of M take 20 GiB; any other error stands above"
            ) from None


def measure(name: str, dtype: str, peers: bool, rounds: int) -> dict[str, float]:
    """One shape's table; returns its numbers."""
    shape = shape_without_mtp(name)
    rows, length = shape.sequences, shape.length
    names = ["xushi", *(["transformers", "transformers tuned"] if peers else ["xushi pytorch"])]
    sides = {side: Side(side, name, dtype) for side in names}
    seconds: dict[str, list[float]] = {side: [] for side in names}
    ceiling = measure_matrix_gflops(dtype)
    for _ in range(rounds + 1):
        for side, process in sides.items():
            seconds[side].append(float(process.ask(rows)))  # type: ignore[arg-type]
    ceiling = max(ceiling, measure_matrix_gflops(dtype))
    flops = train_flops_per_token(shape.config, length, mtp=False)
    print(
        f"\n{name}: {rows} sequences of {length}, {shape.settings.optimizer}, {dtype}, ceiling "
        f"{ceiling:.0f} "
        f"GFLOP/s; {sides['xushi'].ask('form')}"
    )
    rates = {}
    for side, times in seconds.items():
        ordered = sorted(rows * length / t for t in times[1:])
        rates[side] = median(ordered)
        memory = int(sides[side].ask("memory")) / 2**30  # type: ignore[call-overload]
        print(
            f"  {side:<20}{rates[side]:9,.0f} tok/s ({ordered[0]:,.0f} to {ordered[-1]:,.0f}), "
            f"{rates[side] * flops / ceiling / 1e9:4.0%} of the ceiling, peak {memory:.2f} GiB"
        )
    result = {
        f"tokens_per_second_{name}": rates["xushi"],
        f"share_of_ceiling_{name}": rates["xushi"] * flops / ceiling / 1e9,
    }
    if peers:
        result |= {
            f"ratio_{name}": rates["xushi"] / rates["transformers"],
            f"ratio_{name}_tuned": rates["xushi"] / rates["transformers tuned"],
        }
        print(
            f"  xushi to transformers {result[f'ratio_{name}']:.2f}, tuned "
            f"{result[f'ratio_{name}_tuned']:.2f}"
        )
    else:
        result[f"ratio_{name}_pytorch"] = rates["xushi"] / rates["xushi pytorch"]
        print(f"  compiled to PyTorch's forms {result[f'ratio_{name}_pytorch']:.2f}")
    own = sides["xushi"]
    sizes = sorted({max(1, rows // part) for part in (4, 2, 1)})
    points = [(n * length, median(float(own.ask(n)) for _ in range(3))) for n in sizes]  # type: ignore[arg-type]
    if len(points) > 1:
        fixed, slope = line_through(points)
        print(f"  t = {fixed * 1e3:.0f} ms + tokens * {slope * 1e6:.1f} us")
        result |= {f"fixed_seconds_{name}": fixed, f"seconds_per_token_{name}": slope}
    shares = own.ask("parts")
    assert isinstance(shares, dict)
    print("  time: " + ", ".join(f"{part} {share:.0%}" for part, share in shares.items()))
    for process in sides.values():
        process.process.terminate()
        process.process.wait()
    return result | {f"time_{part}_{name}": share for part, share in shares.items()}


def main() -> None:
    words = sys.argv[1:]
    if words[:1] == ["--worker"]:
        return worker(*words[1:])
    rounds = int(words.pop(words.index("--rounds") + 1)) if "--rounds" in words else 5
    dtype = (
        "fp32" if "--fp32" in words else "bf16" if "--bf16" in words else best_training_dtype()[0]
    )
    torch.set_num_threads(inspect().usable_cores)
    names = [word for word in words if not word.startswith("-")] or list(SHAPES)
    result: dict[str, float | str] = {"dtype": dtype}
    for name in names:
        result |= measure(name, dtype, "--peers" in words, rounds)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
