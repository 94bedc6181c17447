"""GGUF files in llama.cpp; skipped without llama-cpp-python (`pip install -e '.[test-llama]'`, a
long build).

Figures for your own model, printed with `-s`:

    XUSHI_EXPORT=runs/demo/export/base pytest -m slow -s tests/model/test_gguf_llama_cpp.py -k trained
"""

import argparse
import json
import os
import subprocess
import sysconfig
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from xushi.model import Deepseek, gguf_export, load_pretrained, save_pretrained
from xushi.model.gguf_export import export_gguf
from xushi.tokenizer import Tokenizer

from .gguf_models import MODELS, TEXT, Make


def in_llama_cpp(test: Callable[..., None]) -> Callable[..., None]:
    """Skips without llama-cpp-python, before anything is trained."""
    missing = find_spec("llama_cpp") is None
    return pytest.mark.slow(
        pytest.mark.skipif(missing, reason="needs pip install -e '.[test-llama]'")(test)
    )


def llama_logits(path: Path, ids: list[int], **options: Any) -> Tensor:
    """llama.cpp's logits [T, V] for given token ids."""
    import llama_cpp

    model = llama_cpp.Llama(
        str(path),
        n_ctx=len(ids),
        n_batch=len(ids),
        logits_all=True,
        verbose=False,
        n_threads=2,
        n_threads_batch=2,
        **options,
    )
    try:
        model.eval(ids)
        return torch.from_numpy(model.scores[: len(ids)].copy()).double()
    finally:
        model.close()


@torch.no_grad()
def our_logits(model: Deepseek, ids: list[int]) -> Tensor:
    return model(torch.tensor([ids])).logits[0].double()


@in_llama_cpp
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same(
    name: str, directory: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every tensor and the cache in float32, no difference can be excused by rounding."""
    source = directory(**MODELS[name])
    monkeypatch.setattr(gguf_export, "_type_of", lambda *_: Type.F32)
    export_gguf(source, tmp_path / "model.gguf")
    ids = torch.randint(7, 290, (64,), generator=torch.Generator().manual_seed(1)).tolist()
    ours, theirs = (
        our_logits(load_pretrained(source), ids),
        llama_logits(tmp_path / "model.gguf", ids, type_k=0, type_v=0),
    )
    assert (theirs - ours).abs().max() <= 1e-5 * ours.abs().max()


SHAPE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.05,
}


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export directory: `XUSHI_EXPORT`, or a small V3 after some seconds of training on Python
    source.
    """
    if "XUSHI_EXPORT" in os.environ:
        return Path(os.environ["XUSHI_EXPORT"])
    place = tmp_path_factory.mktemp("trained")
    tokenizer = Tokenizer.train([TEXT], 512)
    tokenizer.save(place)
    model, ids = Deepseek(tiny(**SHAPE)).initialise(0), torch.tensor(tokenizer.encode(TEXT))
    optimizer, stream = (
        torch.optim.AdamW(model.parameters(), lr=3e-3),
        torch.Generator().manual_seed(0),
    )
    # For products this small a second thread costs more than it gains.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(200):
        starts = torch.randint(len(ids) - 129, (8,), generator=stream)
        rows = torch.stack([ids[start : start + 129] for start in starts.tolist()])
        loss = F.cross_entropy(model(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.set_num_threads(threads)
    assert loss.item() < 3.5, "an untrained model's margins say nothing"
    save_pretrained(model, place)
    return place


@torch.no_grad()
def with_matrices_in_bf16(directory: Path) -> Deepseek:
    """xushi's model with the values of a BF16 file, computing in float32."""
    model = load_pretrained(directory)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not name.endswith("gate.weight"):
            parameter.copy_(parameter.bfloat16())
    return model


@in_llama_cpp
def test_a_trained_model_in_llama_cpp(trained: Path, tmp_path: Path) -> None:
    """256 positions of unseen Python source, teacher-forced, against xushi's float32 logits.

    If two experts nearly tie, bfloat16 may choose the other one. One such position has the largest
    difference of all, so each margin is also compared with its own position's difference.
    """
    tokenizer = Tokenizer.load(trained)
    ids = [
        tokenizer.bos_id,
        *tokenizer.encode(Path(sysconfig.__file__).read_text(encoding="utf-8"))[:255],
    ]
    fp32, rounded = (
        our_logits(load_pretrained(trained), ids),
        our_logits(with_matrices_in_bf16(trained), ids),
    )
    logits = {
        "xushi, weights in bf16": rounded,
        "xushi, all in bf16": our_logits(load_pretrained(trained, torch.bfloat16), ids),
    }
    for kind in gguf_export.KINDS:
        export_gguf(trained, tmp_path / kind, kind)
        logits[f"llama.cpp {kind}"] = llama_logits(tmp_path / kind, ids)
    best_two = fp32.topk(2, dim=-1).values
    margin_T, figures = best_two[:, 0] - best_two[:, 1], {"largest logit": fp32.abs().max().item()}
    for name, others in logits.items():
        error_T, agrees_T = (others - fp32).abs().amax(-1), others.argmax(-1) == fp32.argmax(-1)
        figures |= {
            f"{name}: largest difference": error_T.max().item(),
            f"{name}: median position's difference": error_T.median().item(),
            f"{name}: argmax agrees": agrees_T.double().mean().item(),
            f"{name}: mean KL": F.kl_div(
                others.log_softmax(-1), fp32.log_softmax(-1), reduction="batchmean", log_target=True
            ).item(),
        }
        for what, error in (("largest difference", error_T.max()), ("own difference", error_T)):
            figures[f"{name}: positions with a margin above the {what}"] = (
                (margin_T > error).sum().item()
            )
            figures[f"{name}: of these agree ({what})"] = agrees_T[margin_T > error].sum().item()
            # A position's own difference bounds each of the two logits of its margin, not their
            # difference.
            wanted = 1.0 if what == "largest difference" else 0.98
            assert name != "llama.cpp bf16" or agrees_T[margin_T > error].double().mean() >= wanted
    difference_T = (logits["llama.cpp bf16"] - rounded).abs().amax(-1)
    figures |= {
        "llama.cpp bf16 from xushi, weights in bf16: largest difference": difference_T.max().item(),
        "llama.cpp bf16 from xushi, weights in bf16: median position's": difference_T.median().item(),
    }
    print(
        "",
        *(f"{key:<75} {value:.6g}" for key, value in figures.items()),
        json.dumps(figures),
        sep="\n",
    )
    # llama.cpp rounds only the inputs of products to bfloat16, xushi in bfloat16 everything, so
    # xushi's difference is larger.
    assert figures["llama.cpp bf16: mean KL"] <= figures["xushi, all in bf16: mean KL"]
    assert figures["llama.cpp bf16: argmax agrees"] > 0.97
    assert (
        figures["llama.cpp q8_0: argmax agrees"] > 0.9 and figures["llama.cpp q8_0: mean KL"] < 0.01
    )


@in_llama_cpp
def test_llama_cpp_tokenises_python_alike(trained: Path, tmp_path: Path) -> None:
    import llama_cpp

    export_gguf(trained, tmp_path / "model.gguf")
    llama, tokenizer = (
        llama_cpp.Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False),
        Tokenizer.load(trained),
    )
    texts = [
        Path(module.__file__).read_text(encoding="utf-8")
        for module in (sysconfig, subprocess, argparse)
    ]
    for text in [
        *texts,
        "天地玄黄，宇宙洪荒。 12345 + 3.14 = <think> Straße",
        " \t a  b\r\n\r\n   c\n \n",
    ]:
        assert llama.tokenize(text.encode(), add_bos=False, special=False) == tokenizer.encode(text)
    assert llama.tokenize(b"x") == [tokenizer.bos_id, *tokenizer.encode("x")]
    llama.close()
