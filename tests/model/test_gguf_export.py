"""GGUF files: every tensor, every key and the tokenizer, read back with gguf. Models that llama.cpp
cannot express are refused.

Running the files in llama.cpp is in test_gguf_llama_cpp.py.
"""

import ast
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file
from torch import Tensor

import xushi
from xushi.base.errors import XushiError
from xushi.cli import guarded
from xushi.cli.models import export as export_command
from xushi.model import ModelConfig, RopeScaling, gguf_export, save_pretrained
from xushi.model.gguf_export import export_gguf
from xushi.tokenizer import Tokenizer

from .gguf_models import MODELS, V2, Make


def published(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = json.loads((directory / "config.json").read_text())
    return config, load_file(directory / "model.safetensors")


def in_pairs(matrix: Tensor, config: dict[str, Any], heads: int) -> Tensor:
    """A loop over rows: pairs (i, i + R/2) become (2i, 2i + 1)."""
    if config.get("rope_interleave", True):
        return matrix
    rotated, head = config["qk_rope_head_dim"], matrix.shape[0] // heads
    order = []
    for first in range(0, matrix.shape[0], head):
        order += range(first, first + head - rotated)
        for i in range(rotated // 2):
            order += [first + head - rotated + i, first + head - rotated // 2 + i]
    return matrix[order]


NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}


def expected_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """The expected GGUF tensors, computed from the published ones."""
    config, weights = published(directory)
    heads, nope, value = (
        config[key] for key in ("num_attention_heads", "qk_nope_head_dim", "v_head_dim")
    )
    yield "token_embd.weight", weights["model.embed_tokens.weight"]
    yield "output_norm.weight", weights["model.norm.weight"]
    if not config["tie_word_embeddings"]:
        yield "output.weight", weights["lm_head.weight"]
    for layer in range(config["num_hidden_layers"]):
        place, block = f"model.layers.{layer}.", f"blk.{layer}."
        for theirs, ours in NAMES.items():
            if (matrix := weights.get(f"{place}{theirs}.weight")) is None:
                continue
            if ours in ("attn_q", "attn_q_b"):
                matrix = in_pairs(matrix, config, heads)
            elif ours == "attn_kv_a_mqa":
                matrix = in_pairs(matrix, config, 1)
            yield f"{block}{ours}.weight", matrix
        kv_b = weights[f"{place}self_attn.kv_b_proj.weight"]
        starts = [head * (nope + value) for head in range(heads)]
        yield f"{block}attn_k_b.weight", torch.stack([kv_b[s : s + nope].T for s in starts])
        yield (
            f"{block}attn_v_b.weight",
            torch.stack([kv_b[s + nope : s + nope + value] for s in starts]),
        )
        if layer >= config["first_k_dense_replace"]:
            if config["model_type"] == "deepseek_v3":
                yield (
                    f"{block}exp_probs_b.bias",
                    weights[f"{place}mlp.gate.e_score_correction_bias"],
                )
            for part in ("gate", "up", "down"):
                yield (
                    f"{block}ffn_{part}_exps.weight",
                    torch.stack(
                        [
                            weights[f"{place}mlp.experts.{i}.{part}_proj.weight"]
                            for i in range(config["n_routed_experts"])
                        ]
                    ),
                )


@pytest.mark.parametrize("kind", gguf_export.KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_is_there(name: str, kind: str, directory: Make, tmp_path: Path) -> None:
    source = directory(**MODELS[name])
    figures = export_gguf(source, tmp_path / "model.gguf", kind)
    written = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    expected = dict(expected_tensors(source))
    assert written.keys() == expected.keys() and figures["tensors"] == len(expected)
    kept = 0
    for name, wanted in expected.items():
        found, stored = written[name], written[name].tensor_type
        assert list(reversed(found.shape.tolist())) == list(wanted.shape), name
        values = torch.from_numpy(np.array(gguf.dequantize(found.data, stored))).view(wanted.shape)
        if wanted.dim() == 1 or name.endswith("ffn_gate_inp.weight"):
            assert stored == Type.F32 and torch.equal(values, wanted), name
        elif kind == "bf16" or wanted.shape[-1] % 32:
            assert stored == Type.BF16 and torch.equal(values, wanted.bfloat16().float()), name
            kept += kind == "q8_0"
        else:
            # Half a step, which is 1/127 of the largest of 32 values, plus float16's rounding of
            # the step: 2^-11 of up to 127 steps.
            blocks = wanted.reshape(-1, 32)
            step = blocks.abs().amax(1, keepdim=True) / 127
            assert (
                stored == Type.Q8_0
                and ((values.view_as(blocks) - blocks).abs() <= 0.57 * step).all()
            ), name
    assert figures["kept_bf16"] == kept and (kept > 0) == (kind == "q8_0")


@pytest.mark.parametrize("name", MODELS)
def test_every_key_is_there(
    name: str, directory: Make, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    source = directory(**MODELS[name])
    figures = export_gguf(source, tmp_path / "model.gguf", "q8_0")
    fields = {
        key: field.contents()
        for key, field in gguf.GGUFReader(tmp_path / "model.gguf").fields.items()
    }
    config, _ = published(source)
    is_v3, rank, rope = (
        config["model_type"] == "deepseek_v3",
        config["kv_lora_rank"],
        config["qk_rope_head_dim"],
    )
    expected = {
        "block_count": 3,
        "context_length": 64,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "vocab_size": 300,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": config["q_lora_rank"] or 0,
        "attention.kv_lora_rank": rank,
        "attention.key_length": rank + rope,
        "attention.value_length": rank,
        "attention.key_length_mla": config["qk_nope_head_dim"] + rope,
        "attention.value_length_mla": 24,
        "rope.dimension_count": rope,
        "rope.freq_base": 10000.0,
        "leading_dense_block_count": 1,
        "expert_count": 8,
        "expert_used_count": 2,
        "expert_shared_count": config["n_shared_experts"],
        "expert_feed_forward_length": 32,
        "expert_weights_scale": config["routed_scaling_factor"],
        "expert_weights_norm": config["norm_topk_prob"],
        "expert_gating_func": 2 if is_v3 else 1,
    }
    if config["rope_scaling"]:
        expected |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 32,
            "rope.scaling.yarn_log_multiplier": pytest.approx(0.0707),
        }
    if is_v3 and config["n_group"] > 1:
        expected |= {"expert_group_count": 2, "expert_group_used_count": 1}
    written = {
        key.removeprefix("deepseek2."): value
        for key, value in fields.items()
        if key.startswith("deepseek2.")
    }
    assert written == expected
    assert fields["general.architecture"] == "deepseek2" and fields["general.file_type"] == 7
    assert fields["general.name"] == "model" and fields["general.quantization_version"] == 2
    assert figures["bytes"] == (tmp_path / "model.gguf").stat().st_size


def test_the_tokenizer_is_there(directory: Make, tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = directory()
    figures = export_gguf(source, tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    fields = {
        key.removeprefix("tokenizer.ggml."): field.contents()
        for key, field in reader.fields.items()
    }
    table = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    assert fields["model"] == "gpt2" and fields["pre"] == figures["pre_tokenizer"] == "deepseek-v3"
    assert fields["tokens"][:290] == sorted(
        table["model"]["vocab"], key=table["model"]["vocab"].get
    )
    assert fields["tokens"][290:] == [f"[PAD{i}]" for i in range(290, 300)]
    control, normal, unused = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL, gguf.TokenType.UNUSED
    assert fields["token_type"] == [control] * 7 + [normal] * 283 + [unused] * 10
    assert [tuple(merge.split(" ")) for merge in fields["merges"]] == [
        tuple(m) for m in table["model"]["merges"]
    ]
    assert (fields["bos_token_id"], fields["eos_token_id"], fields["padding_token_id"]) == (0, 1, 2)
    assert fields["add_bos_token"] is True and fields["add_eos_token"] is False
    settings = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert fields["tokenizer.chat_template"] == settings["chat_template"]


def grouped(scaling: dict[str, float]) -> dict[str, Any]:
    return {
        "rope_scaling": RopeScaling(
            **({"factor": 4.0, "original_max_position_embeddings": 32} | scaling)
        )
    }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (V2 | {"topk_method": "group_limited_greedy", "n_group": 2}, "group_limited_greedy"),
        ({"attention_bias": True, "q_lora_rank": 40}, "attention_bias"),
        ({"n_shared_experts": 0}, "n_shared_experts"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps"),
        ({"num_hidden_layers": 27, "q_lora_rank": 8, "first_k_dense_replace": 27}, "27 layers"),
        (grouped({}), "mscale"),
        (grouped({"mscale": 1.0, "mscale_all_dim": 0.707}), "mscale_all_dim"),
        (grouped({"mscale": 0.0, "mscale_all_dim": 0.0}), "mscale"),
        (grouped({"mscale": 1.0, "mscale_all_dim": 1.0, "factor": 0.5}), "factor"),
        (grouped({"mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 16.0}), "beta_fast"),
    ],
)
def test_what_llama_cpp_cannot_express_is_refused(
    changes: dict[str, Any], said: str, directory: Make, tmp_path: Path
) -> None:
    refused(lambda: export_gguf(directory(**changes), tmp_path / "model.gguf"), said, tmp_path)


@pytest.mark.parametrize("kind", ["deepseek_v32", "deepseek_v4"])
def test_other_kinds_are_refused(
    kind: str, tiny_of: Callable[..., ModelConfig], random_model, tokenizer, tmp_path: Path
) -> None:
    save_pretrained(random_model(tiny_of(kind), 1), tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    refused(lambda: export_gguf(tmp_path / "model", tmp_path / "model.gguf"), kind, tmp_path)


def refused(action: Callable[[], Any], said: str, folder: Path) -> None:
    """The error has one line with the text `said` and one line with a remedy; no file is left."""
    with pytest.raises(XushiError) as caught:
        action()
    assert said in caught.value.problem
    assert caught.value.remedy and "\n" not in caught.value.problem + caught.value.remedy
    assert not list(folder.glob("*gguf*")) and not list(folder.glob(".*"))


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    table = json.loads(path.read_text(encoding="utf-8"))
    change(table)
    path.write_text(json.dumps(table), encoding="utf-8")


def one_token_too_many(table: dict[str, Any]) -> None:
    table["model"]["vocab"]["more"] = 300


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json does not exist"),
        (lambda d: (d / "tokenizer.json").write_text("{"), "cannot be read"),
        (lambda d: (d / "tokenizer.json").write_text("[]"), "not a JSON object"),
        (lambda d: (d / "tokenizer_config.json").write_text("[]"), "not a JSON object"),
        (lambda d: edit(d / "tokenizer.json", lambda t: t["model"].pop("merges")), "merges"),
        (lambda d: edit(d / "tokenizer.json", one_token_too_many), "vocab_size is 300"),
        (
            lambda d: edit(
                d / "tokenizer.json", lambda t: t["pre_tokenizer"]["pretokenizers"].pop(0)
            ),
            "pre-tokenizer",
        ),
        (lambda d: (d / "model.safetensors").unlink(), "model.safetensors does not exist"),
        (lambda d: (d / "config.json").unlink(), "config.json does not exist"),
    ],
)
def test_a_damaged_directory_is_refused(
    damage: Callable[[Path], Any], said: str, directory: Make, tmp_path: Path
) -> None:
    source = directory()
    damage(source)
    refused(lambda: export_gguf(source, tmp_path / "model.gguf"), said, tmp_path)


def test_an_unknown_type_is_refused(directory: Make, tmp_path: Path) -> None:
    refused(lambda: export_gguf(directory(), tmp_path / "model.gguf", "q4_0"), "'q4_0'", tmp_path)


def test_an_output_that_exists_is_left_alone(directory: Make, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    with pytest.raises(XushiError, match="exists already"):
        export_gguf(directory(), tmp_path / "precious")
    assert (tmp_path / "precious").read_text() == "kept"


def test_a_full_disk_leaves_nothing(
    directory: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = directory(), tmp_path / "model.gguf"
    with monkeypatch.context() as patch:
        patch.setattr(gguf_export.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
        refused(
            lambda: export_gguf(source, out), "no space is left for them: 10 are free", tmp_path
        )

    def half(writer: gguf.GGUFWriter, array: np.ndarray) -> None:
        raise OSError(f"{array.size} requested and 0 written")  # numpy's words, without a number

    with monkeypatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_tensor_data", half)
        refused(lambda: export_gguf(source, out), "no space left", tmp_path)

    def stopped(writer: gguf.GGUFWriter, array: np.ndarray) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(gguf.GGUFWriter, "write_tensor_data", stopped)
        export_gguf(source, out)
    assert not list(tmp_path.glob("*gguf*")) and not list(tmp_path.glob(".*"))


def test_without_the_gguf_package(
    directory: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = directory()
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert guarded(lambda: export_command(source, tmp_path / "model.gguf")) == 2
    lines = capsys.readouterr().err.splitlines()
    assert (
        len(lines) == 2
        and "gguf is not installed" in lines[0]
        and "pip install 'xushi[gguf]'" in lines[1]
    )


def run_at_once(node: ast.AST) -> Iterator[ast.AST]:
    """What runs when a file is imported: no function, and nothing that is for type checkers."""
    for each in ast.iter_child_nodes(node):
        if isinstance(each, ast.If) and ast.unparse(each.test) == "TYPE_CHECKING":
            yield from (inner for other in each.orelse for inner in (other, *run_at_once(other)))
        elif not isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield each
            yield from run_at_once(each)


def imports_gguf(node: ast.AST) -> bool:
    if isinstance(node, ast.Import):
        return any(alias.name.split(".")[0] == "gguf" for alias in node.names)
    return (
        isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] == "gguf"
    )


def test_gguf_is_imported_on_export_only() -> None:
    """No file imports it while it is imported itself; the three that export do in functions."""
    importing = set()
    for path in Path(xushi.__file__).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if "gguf" not in text:
            continue
        if any(imports_gguf(node) for node in ast.walk(ast.parse(text))):
            importing.add(path.name)
        assert not any(map(imports_gguf, run_at_once(ast.parse(text)))), path
    assert importing == {"gguf_export.py", "gguf_tensors.py", "gguf_tokenizer.py"}


def test_mtp_layers_are_left_out_without_a_word(
    directory: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A config.json of transformers names one layer that the files lack."""
    source = directory()
    edit(source / "config.json", lambda table: table.update(num_nextn_predict_layers=1))
    export_gguf(source, tmp_path / "a.gguf")
    assert capsys.readouterr().err == ""


def test_the_command_says_what_it_wrote(
    directory: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = directory(num_nextn_predict_layers=1)
    export_command(source, tmp_path / "a.gguf", "q8_0")
    said = capsys.readouterr().out
    assert "a.gguf" in said and "mtp" not in said and "kept_bf16" in said
    export_command(source, tmp_path / "b.gguf", "q8_0", as_json=True)
    assert json.loads(capsys.readouterr().out)["tensors"] > 0
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
