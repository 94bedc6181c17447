"""What is counted from a config alone: the published totals, and the model that PyTorch would build."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from xushi.model import PRESETS, Deepseek, preset, save_pretrained
from xushi.plan import inspect_model
from xushi.plan.inspection import PARTS

SCRIPT = ("import sys\nfrom xushi.cli import main\ntry:\n    main()\nexcept SystemExit as end:\n    code = end.code\n"
          "print('TORCH' if 'torch' in sys.modules else 'LIGHT', file=sys.stderr)\nsys.exit(code)")


def inspect(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", SCRIPT, "inspect", *arguments], capture_output=True, text=True)


# Totals and V3's figures as the papers and NVIDIA's two stacks give them, to the digits that are printed there.
@pytest.mark.parametrize(("name", "billions"), [("deepseek-v2", 235.741), ("deepseek-v2-lite", 15.706),
                                                ("deepseek-v3", 671.026)])
def test_published_totals(name: str, billions: float) -> None:
    counted = inspect_model(preset(name), 4096, mtp=True)
    assert round(counted["parameters.total"] / 1e9, 3) == billions
    assert sum(counted[f"parameters.{part}"] for part in PARTS) == counted["parameters.total"]
    layers = [layer for layer in counted["layers"] if "MTP" not in layer["kind"]]
    in_layers = sum(layer["attention"] + layer["feed_forward"] for layer in layers)
    outside = counted["parameters.embedding"] + counted["parameters.head"] + counted["parameters.norms"]
    assert in_layers + outside == counted["parameters.total"]


def test_v3s_cache_and_arithmetic() -> None:
    with_mtp, without = (inspect_model(preset("deepseek-v3"), 4096, mtp=mtp) for mtp in (True, False))
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
    trunk = {n: p.numel() for n, p in model.named_parameters()
             if not any(n.startswith(f"model.layers.{config.num_hidden_layers + d}.")
                        for d in range(config.num_nextn_predict_layers))}
    assert sum(trunk.values()) == counted["parameters.total"]
    assert sum(p.numel() for p in model.parameters()) == counted["parameters.total"] + counted["parameters.mtp"]


def test_the_command_waits_for_no_torch(tmp_path: Path) -> None:
    done = inspect("deepseek-v3", "--json", "--no-mtp", "--context", "8192")
    assert done.returncode == 0 and done.stderr.strip() == "LIGHT", done.stderr
    counted = json.loads(done.stdout)
    assert counted == inspect_model(preset("deepseek-v3"), 8192, mtp=False)
    assert "to 60" in inspect("deepseek-v3").stdout


def test_a_directory_is_read(tmp_path: Path) -> None:
    config = preset("deepseek-v2-lite").model_copy(update={
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 8, "moe_intermediate_size": 8, "num_hidden_layers": 2,
        "num_attention_heads": 1, "n_routed_experts": 6, "kv_lora_rank": 4})
    save_pretrained(Deepseek(config).initialise(0), tmp_path)
    (tmp_path / "model.safetensors").unlink()  # the config is enough
    done = inspect(str(tmp_path), "--json")
    assert json.loads(done.stdout) == inspect_model(config, 4096, mtp=True)


@pytest.mark.parametrize(("arguments", "said"), [(["deepseek-v9"], "the presets are deepseek-v2,"),
                                                 (["deepseek-v3", "--context", "0"], "give at least 1")])
def test_what_cannot_be_counted_is_said_in_two_lines(arguments: list[str], said: str) -> None:
    done = inspect(*arguments)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.strip().splitlines()) == 3
