"""Training speed on this CPU: one whole optimizer step, where its time goes, and transformers beside it.

    python bench/train_cpu.py [SHAPE or RECIPE]... [--peers] [--fp32 | --bf16] [--rounds N]

Shapes are S and M (the default is both), or a recipe's TOML file for its model. The dtype is what training would choose
here. Every side is a process of its own that does one step when it is told to, so that rounds alternate and each side's
peak memory is its own: xushi (a recipe's model with the recipe's optimizer, S and M with AdamW), and beside it xushi
with PyTorch's forms of its ops; with --peers instead transformers 5.23 as it comes, and transformers with C's allocator
told to keep its memory ("tuned"), both with sdpa, grouped_mm and fused AdamW; bf16 by autocast. All take the same
random tokens. Prints tables and, last, one line of JSON.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import torch

from xushi.base.allocator import keep_freed_memory
from xushi.base.machine import best_training_dtype, inspect, measure_matrix_gflops, peak_memory_bytes
from xushi.model import Deepseek, ModelConfig, pretraining_loss, to_published
from xushi.ops import native
from xushi.plan import train_flops_per_token
from xushi.recipe import load_recipe
from xushi.train import set_compute_dtype
from xushi.train.balance import update_router_biases
from xushi.train.optimizer import Optimizer, clip_gradients

S = dict(vocab_size=4096, hidden_size=256, num_hidden_layers=6, num_attention_heads=8, intermediate_size=768,
         moe_intermediate_size=128, n_routed_experts=32, num_experts_per_tok=4, n_shared_experts=1, kv_lora_rank=64,
         q_lora_rank=128, qk_rope_head_dim=16, qk_nope_head_dim=32, v_head_dim=32, n_group=1, topk_group=1,
         first_k_dense_replace=1, max_position_embeddings=512)
M = dict(S, vocab_size=16384, hidden_size=512, num_hidden_layers=12, intermediate_size=1536, moe_intermediate_size=256,
         n_routed_experts=64, num_experts_per_tok=6, kv_lora_rank=128, q_lora_rank=256)
SHAPES = {"S": (S, 8, 512), "M": (M, 4, 512)}  # config, sequences, length
SETTINGS = {"xushi pytorch": {"XUSHI_OPS": "pytorch"},
            "transformers tuned": {"MALLOC_TRIM_THRESHOLD_": "2147483647", "MALLOC_TOP_PAD_": "67108864",
                                   "MALLOC_MMAP_THRESHOLD_": "2147483647"}}
PARTS = ("Linear", "Attention", "Experts", "CrossEntropy", "Norm", "Swiglu")


def shape(name: str) -> tuple[ModelConfig, int, int, str]:
    """A shape's config, sequences, length and optimizer."""
    if name in SHAPES:
        fields, rows, length = SHAPES[name]
        return ModelConfig.model_validate({**fields, "num_nextn_predict_layers": 0}), rows, length, "adamw"
    recipe = load_recipe(Path(name), [])
    config = recipe.model.model_copy(update={"vocab_size": recipe.tokenizer.vocab_size, "num_nextn_predict_layers": 0})
    length = recipe.data.sequence_length
    return config, recipe.pretrain.batch_tokens // length, length, recipe.pretrain.optimizer


def ours(config: ModelConfig, kind: str, dtype: str) -> Callable[[torch.Tensor], None]:
    """A step as training does it: autograd, segments, clipping, optimizer, router biases, metrics."""
    model = Deepseek(config).initialise(0)
    set_compute_dtype(model, dtype)
    optimizer = Optimizer(model, kind, (0.9, 0.95), 0.1, model.compute_dtype)

    def step(tokens: torch.Tensor) -> None:
        # One document a row, as the peer has it: more of them would be less attention to compute.
        batch = {"tokens": tokens, "targets": tokens.roll(-1, 1), "segments": torch.zeros_like(tokens),
                 "positions": torch.arange(tokens.shape[1]).expand_as(tokens),
                 "loss_mask": torch.ones_like(tokens) > 0}
        parts = pretraining_loss(model, batch, mtp_weight=0.3, balance_weight=1e-4)
        parts.total.backward()
        clip_gradients(model.parameters(), 1.0)
        optimizer.step(1e-6)
        optimizer.zero_grad()
        update_router_biases(model, parts.loads, 1e-3)
        float(parts.next_token)

    return step


def peer(config: ModelConfig, dtype: str) -> Callable[[torch.Tensor], None]:
    """transformers' step; its whole rows are one document, and it neither clips nor balances."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    published = {key: value for key, value in to_published(config).items() if key != "architectures"}
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
    """One step for each line read, of so many sequences; answers its seconds, or to "parts" where they go."""
    torch.set_num_threads(inspect().usable_cores)
    config, rows, length, optimizer = shape(name)
    tokens = torch.randint(0, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    if side.startswith("xushi"):
        keep_freed_memory()
        step = ours(config, optimizer, dtype)
    else:
        step = peer(config, dtype)
    for line in sys.stdin:
        answer: object
        if line == "parts\n":
            answer = parts_of(lambda: step(tokens))
        elif line == "memory\n":
            answer = peak_memory_bytes()
        elif line == "form\n":
            answer = native.status()
        else:
            began = time.perf_counter()
            step(tokens[:int(line)])
            answer = time.perf_counter() - began
        print(json.dumps(answer), flush=True)


def parts_of(step: Callable[[], None]) -> dict[str, float]:
    """Share of a step's time in each kind of kernel, forward and backward, and in everything else."""
    with torch.profiler.profile() as profile:
        step()
    shares = dict.fromkeys((*PARTS, "other"), 0.0)
    for event in profile.key_averages():
        part = next((p for p in PARTS if event.key in (f"Native{p}", f"Native{p}Backward")), "other")
        shares[part] += event.self_cpu_time_total
    total = sum(shares.values())
    return {part: time_ / total for part, time_ in shares.items()}


class Side:
    """A worker process."""

    def __init__(self, side: str, name: str, dtype: str) -> None:
        self.side = side
        environment = {**os.environ, **SETTINGS.get(side, {})}
        self.process = subprocess.Popen([sys.executable, __file__, "--worker", side, name, dtype], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    def ask(self, question: object) -> object:
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(f"{question}\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            raise SystemExit(f"{self.side} ended with {self.process.wait()}\n-9 is for want of memory, of which the "
                             "three sides of M take 20 GiB; any other error stands above") from None


def line_through(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Least squares: t = fixed + slope * x."""
    mean_x, mean_t = (sum(p[i] for p in points) / len(points) for i in (0, 1))
    slope = sum((x - mean_x) * (t - mean_t) for x, t in points) / sum((x - mean_x) ** 2 for x, _ in points)
    return mean_t - slope * mean_x, slope


def measure(name: str, dtype: str, peers: bool, rounds: int) -> dict[str, float]:
    """One shape's table; returns its numbers."""
    config, rows, length, optimizer = shape(name)
    names = ["xushi", *(["transformers", "transformers tuned"] if peers else ["xushi pytorch"])]
    sides = {side: Side(side, name, dtype) for side in names}
    seconds: dict[str, list[float]] = {side: [] for side in names}
    ceiling = measure_matrix_gflops(dtype)
    for _ in range(rounds + 1):
        for side, process in sides.items():
            seconds[side].append(float(process.ask(rows)))  # type: ignore[arg-type]
    ceiling = max(ceiling, measure_matrix_gflops(dtype))
    flops = train_flops_per_token(config, length, mtp=False)
    print(f"\n{name}: {rows} sequences of {length}, {optimizer}, {dtype}, ceiling {ceiling:.0f} GFLOP/s; "
          f"{sides['xushi'].ask('form')}")
    rates = {}
    for side, times in seconds.items():
        ordered = sorted(rows * length / t for t in times[1:])
        rates[side] = median(ordered)
        memory = int(sides[side].ask("memory")) / 2**30  # type: ignore[call-overload]
        print(f"  {side:<20}{rates[side]:9,.0f} tok/s ({ordered[0]:,.0f} to {ordered[-1]:,.0f}), "
              f"{rates[side] * flops / ceiling / 1e9:4.0%} of the ceiling, peak {memory:.2f} GiB")
    result = {f"tokens_per_second_{name}": rates["xushi"],
              f"share_of_ceiling_{name}": rates["xushi"] * flops / ceiling / 1e9}
    if peers:
        result |= {f"ratio_{name}": rates["xushi"] / rates["transformers"],
                   f"ratio_{name}_tuned": rates["xushi"] / rates["transformers tuned"]}
        print(f"  xushi to transformers {result[f'ratio_{name}']:.2f}, tuned {result[f'ratio_{name}_tuned']:.2f}")
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
    dtype = "fp32" if "--fp32" in words else "bf16" if "--bf16" in words else best_training_dtype()[0]
    torch.set_num_threads(inspect().usable_cores)
    names = [word for word in words if not word.startswith("-")] or list(SHAPES)
    result: dict[str, float | str] = {"dtype": dtype}
    for name in names:
        result |= measure(name, dtype, "--peers" in words, rounds)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
