"""Training speed on one GPU, compared with transformers and with the speed of a matrix product.

    python bench/train_gpu.py [S | M | L]... [--rounds N] [--no-peer]

S and M are those of bench/train_cpu.py; L has 1.9 billion parameters and takes steps of 16
sequences of 1,024 tokens. All is bf16. transformers is used as installed, with sdpa, grouped_mm,
autocast and fused AdamW. The two take turns, one whole optimizer step each, and medians are
printed. The last line is JSON.
"""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Annotated

import torch
import typer

from xushi.base.machine import measure_matrix_gflops
from xushi.model import ModelConfig, to_published
from xushi.plan import count_parameters, train_flops_per_token
from xushi.run.benchmark import SHAPES, Shape, named_shape, training_step
from xushi.train import LayoutConfig, join

L = dict(
    SHAPES["M"][0],
    vocab_size=32768,
    hidden_size=1536,
    num_attention_heads=16,
    intermediate_size=4096,
    moe_intermediate_size=512,
    kv_lora_rank=256,
    q_lora_rank=512,
    qk_nope_head_dim=64,
    v_head_dim=64,
    qk_rope_head_dim=32,
    max_position_embeddings=1024,
)


def shape_of(name: str) -> Shape:
    """The named shape without MTP layers, which transformers does not have."""
    shape = named_shape("M" if name == "L" else name)
    if name == "L":
        settings = shape.settings.model_copy(update={"batch_tokens": 16 * 1024})
        shape = Shape("L", ModelConfig.model_validate(L), settings, 1024)
    return replace(shape, config=shape.config.model_copy(update={"num_nextn_predict_layers": 0}))


def peer(config: ModelConfig) -> Callable[[torch.Tensor], None]:
    """A training step of transformers."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    published = {
        key: value for key, value in to_published(config).items() if key != "architectures"
    }
    with torch.device("cuda"):
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**published)).train()
    model.set_experts_implementation("grouped_mm")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step(tokens: torch.Tensor) -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()

    return step


def measure(name: str, rounds: int, beside: bool) -> dict[str, float]:
    """Print one shape's table; returns its figures."""
    shape = shape_of(name)
    tokens = shape.tokens().to("cuda")
    join(LayoutConfig(), shape.config, "cuda")  # deterministic algorithms, as in a run
    sides = {"xushi": training_step(shape, "cuda")}
    if beside:
        sides["transformers"] = peer(shape.config)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    memory = {}
    for _ in range(rounds + 2):
        for side, step in sides.items():
            torch.use_deterministic_algorithms(side == "xushi")
            torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            step(tokens)
            seconds[side].append(time.perf_counter() - began)
            memory[side] = torch.cuda.max_memory_allocated()
    times = {side: found[2:] for side, found in seconds.items()}  # the first two steps warm up
    result = speeds(shape, times, memory)
    profile(sides["xushi"], tokens, median(times["xushi"]))
    return result


def speeds(
    shape: Shape, seconds: dict[str, list[float]], memory: dict[str, int]
) -> dict[str, float]:
    """Print a line for each side; returns tokens per second and shares of the ceiling."""
    ceiling = measure_matrix_gflops("bf16", 8192, device="cuda")
    flops = train_flops_per_token(shape.config, shape.length, mtp=False)
    tokens = shape.sequences * shape.length
    print(
        f"\n{shape.name}: {count_parameters(shape.config).total / 1e6:,.0f} M parameters, "
        f"{tokens:,} tokens a step, ceiling {ceiling / 1e3:.0f} TFLOP/s, "
        f"{torch.cuda.get_device_name()}"
    )
    result = {}
    for side, times in seconds.items():
        rate = tokens / median(times)
        share = rate * flops / ceiling / 1e9
        print(
            f"  {side:<14}{rate:12,.0f} tok/s ({tokens / max(times):,.0f} to "
            f"{tokens / min(times):,.0f}), {share:.1%} of the ceiling, "
            f"peak {memory[side] / 2**30:.1f} GiB (with the weights of all sides)"
        )
        result[f"{side}_tokens_per_second_{shape.name}"] = rate
        result[f"{side}_share_{shape.name}"] = share
    return result


def profile(step: Callable[[torch.Tensor], None], tokens: torch.Tensor, seconds: float) -> None:
    """Print the kernels that take the most time, and the time of all of them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        step(tokens)
    events = sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)
    for event in events[:12]:
        print(
            f"    {event.self_device_time_total / 1e3:9.1f} ms {event.count:6d} x {event.key[:90]}"
        )
    total = sum(event.self_device_time_total for event in events)
    print(f"    {total / 1e3:9.1f} ms on the GPU of {1e3 * seconds:.1f}")


def main(
    shapes: Annotated[list[str] | None, typer.Argument(help="S, M or L")] = None,
    rounds: Annotated[int, typer.Option(help="steps after the first two")] = 5,
    no_peer: Annotated[bool, typer.Option("--no-peer", help="without transformers")] = False,
) -> None:
    """Time training steps on a GPU."""
    result: dict[str, float] = {}
    for name in shapes or ["S", "M", "L"]:
        result |= measure(name, rounds, not no_peer)
        torch.cuda.empty_cache()
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
