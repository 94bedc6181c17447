"""Tokens per second of one optimizer step of a recipe's model, beside transformers on the same shape and the measured
matrix ceiling: python bench/train_step.py [RECIPE] [--fp32] [--peer]

Both sides take the same random tokens, compute in the dtype that training would choose here (--fp32: in that) and step
AdamW with C's allocator told to keep its memory; the peer has bf16 by autocast. Rounds alternate between them. Prints a
table and, last, one line of JSON. The peer needs transformers 5.23.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import torch

from xushi.base.allocator import keep_freed_memory
from xushi.base.machine import best_training_dtype, inspect, measure_matrix_gflops
from xushi.model import Deepseek, pretraining_loss, to_published
from xushi.plan import train_flops_per_token
from xushi.recipe import load_recipe
from xushi.train import set_compute_dtype
from xushi.train.optimizer import Optimizer

ROUNDS = 7


def ours(config, tokens: torch.Tensor, kind: str, dtype: str) -> Callable[[], None]:
    model = Deepseek(config).initialise(0)
    set_compute_dtype(model, dtype)
    optimizer = Optimizer(model, kind, (0.9, 0.95), 0.1, model.compute_dtype)
    batch = {"tokens": tokens, "targets": tokens.roll(-1, 1), "segments": torch.zeros_like(tokens),
             "positions": torch.arange(tokens.shape[1]).expand_as(tokens), "loss_mask": torch.ones_like(tokens) > 0}

    def step() -> None:
        pretraining_loss(model, batch, mtp_weight=0.3, balance_weight=1e-4).total.backward()
        optimizer.step(1e-6)
        optimizer.zero_grad()

    return step


def peer(config, tokens: torch.Tensor, dtype: str) -> Callable[[], None]:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    published = {key: value for key, value in to_published(config).items() if key != "architectures"}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**published)).train()
    model.set_experts_implementation("grouped_mm")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    paths = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    recipe = load_recipe(Path(paths[0] if paths else "recipes/demo.toml"), [])
    torch.set_num_threads(inspect().usable_cores)
    config = recipe.model.model_copy(update={"vocab_size": recipe.tokenizer.vocab_size, "num_nextn_predict_layers": 0})
    length = recipe.data.sequence_length
    tokens = torch.randint(0, config.vocab_size, (recipe.pretrain.batch_tokens // length, length),
                           generator=torch.Generator().manual_seed(0))
    dtype = "fp32" if "--fp32" in sys.argv else best_training_dtype()[0]
    sides = {"xushi, AdamW": ours(config, tokens, "adamw", dtype), "xushi, Muon": ours(config, tokens, "muon", dtype)}
    if "--peer" in sys.argv:
        sides["transformers, AdamW"] = peer(config, tokens, dtype)
    keep_freed_memory()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    ceiling = measure_matrix_gflops(dtype)
    for _ in range(ROUNDS + 1):
        for name, step in sides.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    flops = train_flops_per_token(config, length, mtp=False)
    result: dict[str, float | str] = {"dtype": dtype, "matrix_gflops": ceiling, "flops_per_token": flops}
    for name, times in seconds.items():
        rates = sorted(tokens.numel() / second for second in times[1:])
        result[name] = median(rates)
        print(f"{name:<22} {median(rates):8,.0f} tok/s  ({rates[0]:,.0f} to {rates[-1]:,.0f}),  "
              f"{median(rates) * flops / ceiling / 1e9:.0%} of {ceiling:.0f} GFLOP/s {dtype}")
    if "transformers, AdamW" in result:
        result["ratio"] = result["xushi, AdamW"] / result["transformers, AdamW"]
        print(f"ratio, AdamW on both sides: {result['ratio']:.2f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
