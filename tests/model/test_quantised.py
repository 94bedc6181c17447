"""FP8 and FP4 weights against values computed here from their bits, alone and in checkpoints."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from xushi.base.errors import XushiError
from xushi.model import Deepseek, load_pretrained, save_pretrained
from xushi.model import quantised as module
from xushi.model.quantised import dequantise, fp8_block, unpack_fp4

from .conftest import tensors_in

E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu


def value_of_e4m3(byte: int) -> float:
    """The value of an e4m3 byte: sign, four bits of exponent with bias 7, three of mantissa. All
    ones is NaN.
    """
    sign, exponent, mantissa = -1.0 if byte & 128 else 1.0, byte >> 3 & 15, byte & 7
    if byte & 127 == 127:
        return float("nan")
    return sign * (
        mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    )


def value_of_e2m1(four_bits: int) -> float:
    sign, exponent, mantissa = -1.0 if four_bits & 8 else 1.0, four_bits >> 1 & 3, four_bits & 1
    return sign * (mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))


VALUES_OF_E4M3 = np.array([value_of_e4m3(byte) for byte in range(256)])
VALUES_OF_E2M1 = np.array([value_of_e2m1(four_bits) for four_bits in range(16)])


def random_bytes(stream: np.random.Generator, *shape: int) -> np.ndarray:
    """Random bytes of FP8 numbers, without NaN."""
    raw = stream.integers(0, 256, shape, dtype=np.uint8)
    return np.where(raw & 127 == 127, 0, raw).astype(np.uint8)


def random_scales(
    stream: np.random.Generator, exact: bool, *shape: int
) -> tuple[Tensor, np.ndarray]:
    """Scales as stored (powers of two if `exact`), and their values."""
    if exact:
        exponents = stream.integers(118, 134, shape, dtype=np.uint8)
        return torch.from_numpy(exponents).view(E8M0), 2.0 ** (exponents.astype(np.float64) - 127)
    values = stream.uniform(0.01, 2.0, shape).astype(np.float32)
    return torch.from_numpy(values), values.astype(np.float64)


def spread(scales: np.ndarray, rows: int, columns: int, block: tuple[int, int]) -> np.ndarray:
    """Each value's scale."""
    return scales[np.arange(rows)[:, None] // block[0], np.arange(columns)[None] // block[1]]


def make_fp8(
    stream: np.random.Generator, rows: int, columns: int, block: tuple[int, int], exact: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(stored weight, stored scale, their values in float32)."""
    raw = random_bytes(stream, rows, columns)
    stored, scales = random_scales(stream, exact, -(-rows // block[0]), -(-columns // block[1]))
    values = VALUES_OF_E4M3[raw] * spread(scales, rows, columns, block)
    return torch.from_numpy(raw).view(E4M3), stored, torch.from_numpy(values.astype(np.float32))


def make_fp4(stream: np.random.Generator, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    raw = stream.integers(0, 256, (rows, columns // 2), dtype=np.uint8)
    stored, scales = random_scales(stream, True, rows, -(-columns // 32))
    values = np.empty((rows, columns))
    values[:, 0::2] = VALUES_OF_E2M1[raw & 15]  # the low four bits come first
    values[:, 1::2] = VALUES_OF_E2M1[raw >> 4]
    values *= spread(scales, rows, columns, (1, 32))
    return (
        torch.from_numpy(raw).view(torch.int8),
        stored,
        torch.from_numpy(values.astype(np.float32)),
    )


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    seed=st.integers(0, 2**31),
    exact=st.booleans(),
    block=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    chunk=st.sampled_from([1, 100, 10**6]),
)
def test_fp8_blocks(
    rows: int, columns: int, seed: int, exact: bool, block: tuple[int, int], chunk: int
) -> None:
    """Any block size, with partial last blocks, in one chunk or many."""
    weight, scale, expected = make_fp8(np.random.default_rng(seed), rows, columns, block, exact)
    for dtype in (torch.float32, torch.bfloat16):
        got = torch.empty(rows, columns, dtype=dtype)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "CHUNK", chunk)
            dequantise(got, weight, scale, block)
        assert torch.equal(got, expected.to(dtype))


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 50).map(lambda n: 2 * n),
    seed=st.integers(0, 2**31),
)
def test_fp4_rows(rows: int, columns: int, seed: int) -> None:
    weight, scale, expected = make_fp4(np.random.default_rng(seed), rows, columns)
    for packed in (weight, weight.view(torch.uint8)):
        got = torch.empty(rows, columns)
        dequantise(got, packed, scale, module.FP4_BLOCK)
        assert torch.equal(got, expected)


def test_every_byte_means_what_its_bits_say() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    pairs = [[value_of_e2m1(byte & 15), value_of_e2m1(byte >> 4)] for byte in range(256)]
    assert torch.equal(unpack_fp4(every[:, None]), torch.tensor(pairs))
    one = torch.ones(1, 1)
    for dtype, value in (
        (E4M3, value_of_e4m3),
        (E8M0, lambda byte: 2.0 ** (byte - 127) if byte < 255 else np.nan),
    ):
        expected = torch.tensor([[value(byte) for byte in range(256)]], dtype=torch.float64).float()
        got = torch.empty(1, 256)
        if dtype == E4M3:
            dequantise(got, every[None].view(dtype), one, (1, 256))
        else:
            dequantise(got, torch.ones(1, 256).to(E4M3), every[None].view(dtype), (1, 1))
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_transformers_reads_the_same_values() -> None:
    """transformers' dequantiser, which needs whole blocks."""
    stream, theirs = np.random.default_rng(1), Fp8Dequantize(None)
    for exact in (True, False):
        weight, scale, expected = make_fp8(stream, 256, 384, (128, 128), exact)
        assert torch.equal(theirs._dequantize_one(weight, scale, torch.float32), expected)
    weight, scale, expected = make_fp4(stream, 8, 96)
    assert torch.equal(theirs._dequantize_one(weight, scale, torch.float32), expected)


# Whole checkpoints. Tensors that DeepSeek does not quantise are not quantised here either.
KEPT = ("embed", "norm", "head", "gate.", "weights_proj", "compressor", "hc_", "sink", "eh_proj")


def quantise(
    directory: Path,
    block: tuple[int, int] | None,
    *,
    exact: bool,
    suffix: str,
    fp4: bool = False,
    name_of: Callable[[str], str] = lambda name: name,
) -> dict[str, Tensor]:
    """Replace a checkpoint's matrices by random FP8 (and FP4) ones. Returns the value of each
    tensor by its name in the file.
    """
    stream = np.random.default_rng(7)
    meant = tensors_in(directory / "model.safetensors")
    files = {}
    for name, tensor in meant.items():
        stem = name_of(name).removesuffix(".weight")
        if tensor.dim() != 2 or not name.endswith(".weight") or any(part in name for part in KEPT):
            files[name_of(name)] = tensor
        else:
            packed = fp4 and ".experts." in name
            made = (
                make_fp4(stream, *tensor.shape)
                if packed
                else make_fp8(stream, *tensor.shape, block or (128, 128), exact)
            )
            files[stem + ".weight"], files[stem + suffix], meant[name] = made
    save_file(files, directory / "model.safetensors")
    table = json.loads((directory / "config.json").read_text())
    table["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
    }
    if block is not None:
        table["quantization_config"]["weight_block_size"] = list(block)
    (directory / "config.json").write_text(json.dumps(table))
    return meant


def split(directory: Path) -> None:
    """Split into two shards in which hardly any scale is in the shard of its weight."""
    tensors = tensors_in(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    shards = ({}, {})
    for name, tensor in tensors.items():
        shards[name.endswith(("scale", "scale_inv"))][name] = tensor
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, directory / name)
    weight_map = {
        tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def same_as(directory: Path, meant: dict[str, Tensor], dtype: torch.dtype) -> Deepseek:
    """Load, and compare with the model of a plain checkpoint that holds `meant`."""
    model = load_pretrained(directory, dtype=dtype)
    plain = directory / "plain"
    save_pretrained(model, plain)
    written = tensors_in(plain / "model.safetensors")
    assert written.keys() == meant.keys()
    for name, tensor in written.items():
        assert torch.equal(tensor, meant[name].to(tensor.dtype)), name
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "block"),
    [("deepseek_v3", (8, 16)), ("deepseek_v32", (128, 128)), ("deepseek_v3", None)],
)
def test_fp8_checkpoints_as_published(
    kind: str, block: tuple[int, int] | None, dtype: torch.dtype, random_model, tiny_of, tmp_path
) -> None:
    """V3 and V3.2: float32 scales, named `weight_scale_inv` although they are not inverse; with MTP
    layers, and sizes that are no multiples of a block.
    """
    large = {"hidden_size": 136, "intermediate_size": 260} if block != (8, 16) else {}
    save_pretrained(random_model(tiny_of(kind, num_nextn_predict_layers=1, **large), 1), tmp_path)
    meant = quantise(tmp_path, block, exact=False, suffix=".weight_scale_inv")
    stored = tensors_in(tmp_path / "model.safetensors")
    assert stored["model.layers.3.self_attn.o_proj.weight"].dtype == E4M3
    split(tmp_path)
    model = same_as(tmp_path, meant, dtype)
    # The scale multiplies. Dividing would also give plausible weights.
    weight, scale = (
        stored[f"model.layers.0.self_attn.o_proj.{part}"] for part in ("weight", "weight_scale_inv")
    )
    first = weight[0, 0].float() * scale[0, 0]
    assert model.decoder_layers[0].self_attn.o_proj.weight[0, 0] == first.to(dtype)
    assert "quantization_config" not in (tmp_path / "plain" / "config.json").read_text()


def test_scales_in_bfloat16(random_model, tiny_of, tmp_path) -> None:
    """Powers of two, which bfloat16 holds exactly."""
    save_pretrained(random_model(tiny_of("deepseek_v3"), 1), tmp_path)
    meant = quantise(tmp_path, (8, 16), exact=True, suffix=".weight_scale_inv")
    stored = tensors_in(tmp_path / "model.safetensors")
    halved = {n: t.bfloat16() if n.endswith("_inv") else t for n, t in stored.items()}
    assert any(t.dtype == E8M0 for t in stored.values())
    save_file(halved, tmp_path / "model.safetensors")
    same_as(tmp_path, meant, torch.float32)


# The names that DeepSeek's own conversion (inference/convert.py of DeepSeek-V3 and V3.2) gives to
# the last module of a name.
CONVERTED = {
    "embed_tokens": "embed",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "wq",
    "q_a_proj": "wq_a",
    "q_a_layernorm": "q_norm",
    "q_b_proj": "wq_b",
    "kv_a_proj_with_mqa": "wkv_a",
    "kv_a_layernorm": "kv_norm",
    "kv_b_proj": "wkv_b",
    "o_proj": "wo",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
    "lm_head": "head",
}


def converted(name: str) -> str:
    """A published name after that script's conversion."""
    name = name.removeprefix("model.").replace("self_attn", "attn").replace("mlp", "ffn")
    *front, module_name, leaf = name.replace("e_score_correction_bias", "bias").split(".")
    return ".".join([*front, CONVERTED.get(module_name, module_name), leaf])


@pytest.mark.parametrize("kind", ["deepseek_v2", "deepseek_v3", "deepseek_v32"])
def test_fp8_checkpoints_in_deepseeks_names(kind: str, random_model, tiny_of, tmp_path) -> None:
    """In the form of DeepSeek's inference code: `scale` beside `weight`, one file of another name,
    no MTP layers.
    """
    changes = {"attention_bias": True} | ({"q_lora_rank": None} if kind == "deepseek_v2" else {})
    save_pretrained(random_model(tiny_of(kind, **changes), 1), tmp_path)
    meant = quantise(tmp_path, (8, 16), exact=False, suffix=".scale", name_of=converted)
    stored = tensors_in(tmp_path / "model.safetensors")
    assert {
        "layers.0.attn.wo.scale",
        "layers.1.ffn.experts.7.w2.scale",
        "layers.0.attn_norm.weight",
        "norm.weight",
        "layers.0.attn.wkv_a.bias",
        "layers.1.ffn.gate.weight",
        "head.weight",
        "embed.weight",
    } <= stored.keys()
    assert ("layers.2.ffn.gate.bias" in stored) == (kind != "deepseek_v2")
    assert ("layers.2.attn.indexer.wq_b.scale" in stored) == (kind == "deepseek_v32")
    (tmp_path / "model.safetensors").rename(tmp_path / "model0-mp1.safetensors")
    same_as(tmp_path, meant, torch.float32)


@pytest.mark.parametrize(("fp4", "exact"), [(True, True), (False, True), (False, False)])
def test_v4_checkpoints_as_published(
    fp4: bool, exact: bool, random_model, tiny_of, tmp_path
) -> None:
    """Instruct models have FP4 experts and FP8 elsewhere, base models only FP8; `scale` beside
    `weight`, in DeepSeek's names.

    The hyper-connections also have a parameter named `scale`.
    """
    config = tiny_of(
        "deepseek_v4", num_nextn_predict_layers=2, hidden_size=72, moe_intermediate_size=40
    )
    save_pretrained(random_model(config, 2), tmp_path)
    meant = quantise(tmp_path, (16, 32), exact=exact, suffix=".scale", fp4=fp4)
    stored = tensors_in(tmp_path / "model.safetensors")
    assert stored["mtp.1.ffn.experts.3.w2.weight"].shape == ((72, 20) if fp4 else (72, 40))
    assert not fp4 or stored["mtp.1.ffn.experts.3.w2.scale"].shape == (72, 2)
    model = same_as(tmp_path, meant, torch.bfloat16)
    assert model.decoder_layers[0].attn_hc.scale.dtype == torch.float32
    assert torch.equal(model.decoder_layers[0].attn_hc.scale, meant["layers.0.hc_attn_scale"])


def edit(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        tensors = tensors_in(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors")

    return damage


def put(name: str, tensor: Tensor) -> Callable[[Path], None]:
    return edit(lambda tensors: tensors.update({name: tensor}))


def config(**changes: object) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        table = json.loads((directory / "config.json").read_text())
        table["quantization_config"] |= changes
        (directory / "config.json").write_text(json.dumps(table))

    return damage


EXPERT, SHARED = "layers.0.ffn.experts.0.w1", "layers.0.ffn.shared_experts.w1"
FAULTS = {
    "FP8 without its scale": (edit(lambda t: t.pop(f"{SHARED}.scale")), f"{SHARED}.weight"),
    "FP4 without its scale": (edit(lambda t: t.pop(f"{EXPERT}.scale")), f"{EXPERT}.weight"),
    "a scale without a weight": (
        edit(lambda t: t.pop(f"{EXPERT}.weight")),
        "lacks layers.0.ffn.experts.0.w1.weight",
    ),
    "a scale beside a plain weight": (
        put(f"{SHARED}.weight", torch.zeros(40, 72)),
        f"{SHARED}.scale, a scale",
    ),
    "a scale of nothing": (put("layers.0.attn.wz.scale", torch.ones(1, 1)), "attn.wz.scale"),
    "a scale twice": (put(f"{SHARED}.weight_scale_inv", torch.ones(3, 3)), "another name"),
    # 40 rows and 72 columns: a scale per 16 columns is NVFP4's.
    "FP4 with a scale per 16": (put(f"{EXPERT}.scale", torch.zeros(40, 5).to(E8M0)), "[40, 3]"),
    "FP4 with FP8's blocks": (put(f"{EXPERT}.scale", torch.zeros(1, 1).to(E8M0)), "[40, 3]"),
    "FP4 with float32 scales": (put(f"{EXPERT}.scale", torch.ones(40, 3)), "float32"),
    "FP4 unpacked": (put(f"{EXPERT}.weight", torch.zeros(40, 72, dtype=torch.int8)), "[40, 36]"),
    "FP4 for what is no expert": (
        put(f"{SHARED}.weight", torch.zeros(40, 72, dtype=torch.int8)),
        "int8",
    ),
    "a vector in FP8": (put("layers.0.attn_norm.weight", torch.zeros(72).to(E4M3)), "attn_norm"),
    "a scale for each row": (put(f"{SHARED}.scale", torch.ones(40, 1)), "[3, 3]"),
    "a scale for all": (put(f"{SHARED}.scale", torch.tensor(1.0)), "[3, 3]"),
    "float16 scales": (put(f"{SHARED}.scale", torch.ones(3, 3).half()), "float16"),
    "an activation's scale": (put(f"{SHARED}.activation_scale", torch.ones(1)), "activation_scale"),
    "other blocks than the files'": (
        config(weight_block_size=[128, 128]),
        "blocks of 128x128 need [1, 1]",
    ),
    "blocks of none": (config(weight_block_size=[0, 128]), "weight_block_size"),
    "blocks of three": (config(weight_block_size=[16, 32, 1]), "weight_block_size"),
    "blocks in words": (config(weight_block_size="16x32"), "weight_block_size"),
    "another method": (config(quant_method="awq"), "AWQ"),
    "another float": (config(fmt="e5m2"), "e5m2"),
}


@pytest.fixture(scope="session")
def fp4_checkpoint(random_model, tiny_of, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("fp4")
    config = tiny_of(
        "deepseek_v4",
        num_hidden_layers=1,
        hidden_size=72,
        moe_intermediate_size=40,
        n_routed_experts=2,
    )
    save_pretrained(random_model(config, 2), directory)
    quantise(directory, (16, 32), exact=True, suffix=".scale", fp4=True)
    return directory


@pytest.mark.parametrize("kind", FAULTS)
def test_faults_are_reported(kind: str, fp4_checkpoint: Path, tmp_path) -> None:
    for file in fp4_checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    load_pretrained(tmp_path)
    damage, words = FAULTS[kind]
    damage(tmp_path)
    with pytest.raises(XushiError) as error:
        load_pretrained(tmp_path)
    assert words in error.value.problem and str(tmp_path) in error.value.problem
    assert "\n" not in error.value.problem + error.value.remedy and error.value.remedy


def test_only_v4_has_fp4(random_model, tiny_of, tmp_path) -> None:
    save_pretrained(random_model(tiny_of("deepseek_v3"), 2), tmp_path)
    tensors = tensors_in(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.experts.0.down_proj"
    tensors |= {
        f"{name}.weight": torch.zeros(24, 4, dtype=torch.int8),
        f"{name}.scale": torch.zeros(24, 1).to(E8M0),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(XushiError, match="down_proj"):
        load_pretrained(tmp_path)


def test_blocks_come_from_the_config() -> None:
    assert (
        fp8_block({}, "here")
        == fp8_block({"quantization_config": {"quant_method": "fp8"}}, "here")
        == (128, 128)
    )
    assert fp8_block({"quantization_config": {"weight_block_size": [32, 64]}}, "here") == (32, 64)
    with pytest.raises(XushiError, match="quantization_config"):
        fp8_block({"quantization_config": [1]}, "here")
