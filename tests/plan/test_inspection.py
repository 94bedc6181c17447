"""Counts from a config alone, against published totals and against the model that PyTorch would
build.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from xushi.model import PRESETS, Deepseek, preset, save_pretrained
from xushi.plan import group_layers, inspect_model
from xushi.plan.parameters import PARTS

from ..miniature import xushi_here

SCRIPT = (
    "import sys\nfrom xushi.cli import main\ntry:\n    main()\nexcept SystemExit as end:\n    "
    "code = end.code\n"
    "print('TORCH' if 'torch' in sys.modules else 'LIGHT', file=sys.stderr)\nsys.exit(code)"
)


def inspect(*arguments: str) -> subprocess.CompletedProcess:
    return xushi_here("inspect", *arguments)


# Totals from the papers, NVIDIA's two implementations and transformers' classes, to their printed
# digits.
@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("deepseek-v2", 235.741),
        ("deepseek-v2-lite", 15.706),
        ("deepseek-v3", 671.026),
        ("deepseek-v3.2", 671.878),
        ("deepseek-v4-flash", 284.332),
        ("deepseek-v4-pro", 1572.997),
    ],
)
def test_published_totals(name: str, billions: float) -> None:
    counted = inspect_model(preset(name), 4096, mtp=True)
    assert round(counted["parameters.total"] / 1e9, 3) == billions
    assert sum(counted[f"parameters.{part}"] for part in PARTS) == counted["parameters.total"]


@pytest.mark.parametrize("name", PRESETS)
def test_the_table_of_layers_adds_up(name: str) -> None:
    config, counted = preset(name), inspect_model(preset(name), 4096, mtp=True)
    trunk = counted["layers"][: config.num_hidden_layers]
    columns = ("attention", "feed_forward", "hyper_connections")
    in_layers = sum(layer[column] for layer in trunk for column in columns)
    head = config.hc_mult * (config.hc_mult * config.hidden_size + 1) + 1 if config.is_v4 else 0
    outside = (
        counted["parameters.embedding"]
        + counted["parameters.head"]
        + counted["parameters.norms"]
        + head
    )
    assert in_layers + outside == counted["parameters.total"]
    assert sum(layer["active"] for layer in trunk) + outside == counted["parameters.active"]
    assert all(len(layer["kind"]) <= 26 for layer in counted["layers"])
    assert [layer["layer"] for layer in counted["layers"] if "MTP" in layer["kind"]] == list(
        range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)
    )


def test_layers_are_named_by_what_they_do() -> None:
    def table(name: str) -> list[tuple[str, str]]:
        return [
            (span, layer["kind"])
            for span, layer in group_layers(inspect_model(preset(name), 1, True)["layers"])
        ]

    assert table("deepseek-v3.2") == [
        ("0 to 2", "DSA, dense"),
        ("3 to 60", "DSA, experts"),
        ("61", "DSA, experts, MTP"),
    ]
    assert table("deepseek-v4-flash") == [
        ("0 to 1", "SWA, hash-routed experts"),
        ("2", "CSA, hash-routed experts"),
        ("3 to 41 by 2", "HCA, experts"),
        ("4 to 42 by 2", "CSA, experts"),
        ("43", "SWA, experts, MTP"),
    ]
    assert (
        inspect_model(preset("deepseek-v4-pro"), 1, True)["architecture.attention_layers"]
        == "31 HCA, 30 CSA"
    )
    assert (
        inspect_model(preset("deepseek-v2"), 1, True)["architecture.feed_forward_layers"]
        == "1 dense, 59 experts"
    )


def test_equal_layers_are_one_line_wherever_they_stand() -> None:
    layers = [{"layer": index, "kind": kind} for index, kind in enumerate("abbacbbd")]
    assert [(span, table["kind"]) for span, table in group_layers(layers)] == [
        ("0, 3", "a"),
        ("1 to 2, 5 to 6", "b"),
        ("4", "c"),
        ("7", "d"),
    ]


def test_v3s_cache_and_arithmetic() -> None:
    with_mtp, without = (
        inspect_model(preset("deepseek-v3"), 4096, mtp=mtp) for mtp in (True, False)
    )
    assert with_mtp["kv_cache.bytes_per_token"] == 70272
    assert with_mtp["kv_cache.bytes_at_context"] == 70272 * 4096
    assert round(without["flops.train_per_token"] / 1e9, 2) == 250.45
    assert round(with_mtp["flops.train_per_token"] / 1e9, 2) == 260.64
    assert round(with_mtp["parameters.active"] / 1e9, 2) == 37.55
    assert round(with_mtp["parameters.active_without_embedding"] / 1e9, 2) == 36.63


@pytest.mark.parametrize("name", PRESETS)
def test_the_model_that_would_be_built_has_as_many(name: str) -> None:
    config, counted = preset(name), inspect_model(preset(name), 1, mtp=True)
    with torch.device("meta"):
        model = Deepseek(config)
    trunk = {
        n: p.numel()
        for n, p in model.named_parameters()
        if not any(
            n.startswith(f"model.layers.{config.num_hidden_layers + d}.")
            for d in range(config.num_nextn_predict_layers)
        )
    }
    assert sum(trunk.values()) == counted["parameters.total"]
    assert (
        sum(p.numel() for p in model.parameters())
        == counted["parameters.total"] + counted["parameters.mtp"]
    )


def test_the_command_waits_for_no_torch() -> None:
    asked = ("inspect", "deepseek-v3", "--json", "--no-mtp", "--context", "8192")
    done = subprocess.run([sys.executable, "-c", SCRIPT, *asked], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.strip() == "LIGHT", done.stderr
    counted = json.loads(done.stdout)
    assert counted == inspect_model(preset("deepseek-v3"), 8192, mtp=False)
    assert "to 60" in inspect("deepseek-v3").stdout


def test_the_printed_table_has_a_column_for_what_only_v4_has() -> None:
    flash, before = inspect("deepseek-v4-flash").stdout, inspect("deepseek-v3").stdout
    assert "hyper-connections" in flash and "hyper-connections" not in before
    lines = flash.splitlines()[-6:]
    assert "3 to 41 by 2" in lines[3] and "HCA, experts" in lines[3] and "786,486" in lines[3]
    assert len({len(line) for line in lines}) == 1  # columns are aligned


def test_v4s_cache_is_a_window_and_entries() -> None:
    counted = inspect_model(preset("deepseek-v4-flash"), 2**20, mtp=True)
    assert counted["kv_cache.bytes_per_token"] == 6880
    assert counted["kv_cache.bytes_at_context"] == 6880 * 2**20 + 43 * 128 * 512 * 2


def test_a_directory_is_read(tmp_path: Path) -> None:
    config = preset("deepseek-v2-lite").model_copy(
        update={
            "vocab_size": 32,
            "hidden_size": 16,
            "intermediate_size": 8,
            "moe_intermediate_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 1,
            "n_routed_experts": 6,
            "kv_lora_rank": 4,
        }
    )
    save_pretrained(Deepseek(config).initialise(0), tmp_path)
    (tmp_path / "model.safetensors").unlink()  # the config is enough
    done = inspect(str(tmp_path), "--json")
    assert json.loads(done.stdout) == inspect_model(config, 4096, mtp=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["deepseek-v9"], "the presets are deepseek-v2,"),
        (["deepseek-v3", "--context", "0"], "greater than or equal to 1"),
        (["deepseek-v3", "--context", "1" + "0" * 400], "--context"),
    ],
)
def test_what_cannot_be_counted_is_said_in_two_lines(arguments: list[str], said: str) -> None:
    done = inspect(*arguments)
    assert (
        done.returncode == 2 and said in done.stderr and len(done.stderr.strip().splitlines()) == 2
    )
