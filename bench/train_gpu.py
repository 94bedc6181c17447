"""Training speed on one GPU: whole optimizer steps beside transformers', and the share of the
measured matrix product.

    python bench/train_gpu.py [S | M | L]... [--rounds N] [--no-peer]

S and M are those of bench/train_cpu.py, L has 1.9 billion parameters and steps of 16 sequences of
1,024. bf16, fused AdamW for the peer (transformers as it is installed: sdpa, grouped_mm, autocast).
Steps alternate; medians. The last line is JSON.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch

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
    if name != "L":
        return named_shape(name)
    settings = named_shape("M").settings.model_copy(update={"batch_tokens": 16 * 1024})
    return Shape("L", ModelConfig.model_validate(L), settings, 1024)


def peer(config: ModelConfig) -> Callable[[torch.Tensor], None]:
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
    shape = shape_of(name)
    shape = replace(shape, config=shape.config.model_copy(update={"num_nextn_predict_layers": 0}))
    tokens = shape.tokens().to("cuda")
    join(LayoutConfig(), shape.config, "cuda")  # deterministic algorithms, as a run has them
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
    ceiling = measure_matrix_gflops("bf16", 8192, device="cuda")
    flops, result = train_flops_per_token(shape.config, shape.length, mtp=False), {}
    print(
        f"\n{name}: {count_parameters(shape.config).total / 1e6:,.0f} M parameters, "
        f"{tokens.numel():,} tokens a "
        f"step, ceiling {ceiling / 1e3:.0f} TFLOP/s, {torch.cuda.get_device_name()}"
    )
    for side, times in seconds.items():
        rate = tokens.numel() / median(times[2:])
        print(
            f"  {side:<14}{rate:12,.0f} tok/s ({tokens.numel() / max(times[2:]):,.0f} to "
            f"{tokens.numel() / min(times[2:]):,.0f}), {rate * flops / ceiling / 1e9:.1%} of the "
            "ceiling, peak "
            f"{memory[side] / 2**30:.1f} GiB of both"
        )
        result |= {
            f"{side}_tokens_per_second_{name}": rate,
            f"{side}_share_{name}": rate * flops / ceiling / 1e9,
        }
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        sides["xushi"](tokens)
    for event in sorted(profile.key_averages(), key=lambda e: -e.self_device_time_total)[:12]:
        print(
            f"    {event.self_device_time_total / 1e3:9.1f} ms {event.count:6d} x {event.key[:90]}"
        )
    print(
        f"    {sum(e.self_device_time_total for e in profile.key_averages()) / 1e3:9.1f} ms on "
        "the GPU of "
        f"{1e3 * median(seconds['xushi'][2:]):.1f}"
    )
    return result


def main() -> None:
    words = sys.argv[1:]
    rounds = int(words.pop(words.index("--rounds") + 1)) if "--rounds" in words else 5
    result: dict[str, float] = {}
    for name in [word for word in words if not word.startswith("-")] or ["S", "M", "L"]:
        result |= measure(name, rounds, "--no-peer" not in words)
        torch.cuda.empty_cache()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
