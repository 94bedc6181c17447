"""Cost of a training step on this CPU by width, depth, experts, sequence length and batch size.

    python bench/train_curves.py [--fp32 | --bf16] [--rounds N] [--draw FILE.svg]

Each series changes one size of the model S of `xushi bench train`. A step has 2,048 tokens in
sequences of 512, except where the length or the batch is varied. The figures are medians of the
rounds. The program prints a table, draws it with --draw, and prints the points as JSON last.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import typer

from xushi.base.allocator import keep_freed_memory
from xushi.model import ModelConfig
from xushi.report.numbers import escape
from xushi.run.benchmark import PARTS, Shape, benchmark_training, named_shape

NAMES = (*PARTS, "other")
COLOURS = ("#0067a5", "#b84a00", "#00704f", "#94477e", "#866000", "#6db9f0", "#8a867d")  # of NAMES
WIDE, HIGH, GAP = 44, 150, 96  # width and height of a bar, distance between panels, in pixels


def shapes() -> Iterator[tuple[str, int, Shape]]:
    """(axis, value, shape) of every point."""
    base = named_shape("S")

    def changed(sequences: int = 4, length: int = 512, **fields: Any) -> Shape:
        config = ModelConfig.model_validate(
            {**base.config.model_dump(), "max_position_embeddings": length, **fields}
        )
        return Shape(
            "curve",
            config,
            base.settings.model_copy(update={"batch_tokens": sequences * length}),
            length,
        )

    for width in (128, 256, 512, 768, 1024):
        yield (
            "width",
            width,
            changed(
                hidden_size=width,
                num_attention_heads=width // 32,
                intermediate_size=3 * width,
                moe_intermediate_size=width // 2,
                kv_lora_rank=width // 4,
                q_lora_rank=width // 2,
            ),
        )
    for layers in (2, 4, 6, 12, 24):
        yield "layers", layers, changed(num_hidden_layers=layers)
    for experts in (8, 16, 32, 64, 128, 256):
        yield "experts (4 chosen)", experts, changed(n_routed_experts=experts)
    for length in (512, 1024, 2048, 4096, 8192):
        yield "length (8,192 tokens)", length, changed(8192 // length, length)
    for sequences in (1, 2, 4, 8, 16):
        yield "tokens in a step", sequences * 512, changed(sequences)


def draw(points: list[dict[str, Any]], title: str) -> str:
    """An SVG with a panel for each axis and a bar for each value.

    The segments of a bar are shares of time; its labels are speed and share of the ceiling.
    """
    out = []
    y = 64
    for axis in dict.fromkeys(point["axis"] for point in points):
        out.append(f'<text x="20" y="{y - 34}" font-weight="600">{escape(axis)}</text>')
        for place, point in enumerate(p for p in points if p["axis"] == axis):
            out += bar(point, 20 + place * (WIDE + 62), y)
        y += HIGH + GAP
    for place, (name, colour) in enumerate(zip(NAMES, COLOURS, strict=True)):
        x = 20 + place * 96
        out.append(
            f'<rect x="{x}" y="{y - 52}" width="11" height="11" fill="{colour}"/>'
            f'<text x="{x + 15}" y="{y - 42}" class="s">{escape(name)}</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="700" height="{y - 20}" '
        f'viewBox="0 0 700 {y - 20}" role="img" aria-label="{escape(title)}">'
        "<style>text{font:13px system-ui,sans-serif;fill:#1d1c1a}"
        '.s{font-size:11px;fill:#5f5b53}</style><rect width="100%" height="100%" fill="#fbfaf7"/>'
        + "".join(out)
        + f'<text x="20" y="{y - 26}" class="s">{escape(title)}</text></svg>\n'
    )


def bar(point: dict[str, Any], x: int, y: int) -> list[str]:
    """The bar of one point with its labels; its top left corner is (x, y)."""
    out = [
        f'<text x="{x}" y="{y - 8}" class="s">{point["tokens_per_second"]:,.0f} tok/s</text>',
        f'<text x="{x}" y="{y + HIGH + 16}">{point["value"]:,}</text>',
        f'<text x="{x + WIDE + 4}" y="{y + HIGH}" class="s">{point["share_of_ceiling"]:.0%}</text>',
    ]
    top = float(y)
    for name, colour in zip(NAMES, COLOURS, strict=True):
        height = point["time"][name] * HIGH
        out.append(
            f'<rect x="{x}" y="{top:.1f}" width="{WIDE}" height="{height:.1f}" fill="{colour}"/>'
        )
        top += height
    return out


def main(
    fp32: Annotated[bool, typer.Option("--fp32")] = False,
    bf16: Annotated[bool, typer.Option("--bf16")] = False,
    rounds: int = 3,
    drawing: Annotated[Path | None, typer.Option("--draw", metavar="FILE.svg")] = None,
) -> None:
    """Time training steps of models of many sizes."""
    dtype = "fp32" if fp32 else "bf16" if bf16 else "auto"
    keep_freed_memory()
    points: list[dict[str, Any]] = []
    for axis, value, shape in shapes():
        found = benchmark_training(shape.but(dtype=dtype), rounds)
        time = {part: found[f"bench.time_{part.lower()}"] for part in NAMES}
        points.append(
            {
                "axis": axis,
                "value": value,
                "tokens_per_second": found["bench.tokens_per_second"],
                "share_of_ceiling": found["bench.share_of_ceiling"],
                "time": time,
            }
        )
        first, second = sorted(time, key=time.__getitem__, reverse=True)[:2]
        print(
            f"{axis:<22}{value:>7,} {found['bench.tokens_per_second']:>9,.0f} tok/s "
            f"{found['bench.share_of_ceiling']:>5.0%} of {found['bench.ceiling_gflops']:.0f} "
            f"GFLOP/s   {first} {time[first]:.0%}, {second} {time[second]:.0%}",
            flush=True,
        )
    if drawing is not None:
        title = (
            f"Share of time by part; beside each bar its share of PyTorch's matrix product. "
            f"{found['bench.dtype']}, {found['bench.op_forms']}, {found['bench.threads']} threads"
        )
        drawing.write_text(draw(points, title), encoding="utf-8")
    print(json.dumps({"dtype": found["bench.dtype"], "points": points}))


if __name__ == "__main__":
    typer.run(main)
