"""The names of tensors on disk, against transformers' own mappings and the names in the published
files.
"""

import re
from collections import Counter
from functools import cache

import pytest
import torch
from safetensors.torch import load, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from xushi.model import (
    PRESETS,
    Deepseek,
    ModelConfig,
    load_pretrained,
    preset,
    save_pretrained,
    to_published,
)
from xushi.model.names import canonical_name, layer_of, places, stays_float32, written_name
from xushi.model.saving import published_tensors

KINDS = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4")


def shortened(name: str) -> ModelConfig:
    """A preset with 8 layers of 16 experts, the fewest that its groups allow, for speed."""
    config = preset(name)
    changes: dict[str, object] = {"n_routed_experts": 16, "num_hidden_layers": 8}
    if config.compress_ratios is not None:
        changes["compress_ratios"] = (
            config.compress_ratios[:8] + config.compress_ratios[config.num_hidden_layers :]
        )
    return config.model_copy(update=changes)


def transformers_model(config: ModelConfig) -> nn.Module:
    """transformers' model for this config, on the meta device."""
    table = {
        key: value
        for key, value in to_published(config).items()
        if key not in ("architectures", "torch_dtype")
    }
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**table))


def shapes_of(config: ModelConfig, names: str = "published") -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint."""
    with torch.device("meta"):
        model = Deepseek(config)
    return {name: tuple(tensor.shape) for name, tensor in published_tensors(model, names=names)}


@cache
def shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Every tensor of a preset's checkpoint in its published names."""
    return shapes_of(preset(name))


def patterns(names) -> Counter[str]:
    """The number of names of each form, with numbers replaced."""
    return Counter(re.sub(r"(?<=\.)\d+(?=\.)", "N", name) for name in names)


def check_with_transformers(config: ModelConfig) -> None:
    theirs = transformers_model(config)
    expected = {
        n: tuple(t.shape) for n, t in revert_weight_conversion(theirs, theirs.state_dict()).items()
    }
    mtp = (
        "mtp.",
        *(
            f"model.layers.{config.num_hidden_layers + d}."
            for d in range(config.num_nextn_predict_layers)
        ),
    )
    ours = {
        n: shape for n, shape in shapes_of(config, "transformers").items() if not n.startswith(mtp)
    }
    assert patterns(expected) == patterns(ours)
    assert expected == ours


@pytest.mark.parametrize("name", PRESETS)
def test_what_transformers_would_write(name: str) -> None:
    """Names, their number and their shapes equal transformers' reverse mapping, which lacks only
    the MTP layers.
    """
    check_with_transformers(shortened(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_what_transformers_would_write_of_the_whole(name: str) -> None:
    check_with_transformers(preset(name))


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("names", ["published", "transformers"])
def test_every_name_leads_back(name: str, names: str) -> None:
    """The name of its scale does too, in both spellings."""
    config = shortened(name)
    with torch.device("meta"):
        state = Deepseek(config).state_dict()
    written = {canonical: written_name(canonical, config, names) for canonical, _ in places(state)}
    assert len(set(written.values())) == len(written)
    for canonical, place in places(state):
        assert (
            canonical_name(written[canonical], config)
            == canonical_name(canonical, config)
            == (canonical, False)
        )
        if canonical.endswith(".weight") and len(place.shape) == 2:
            for suffix in (".weight_scale_inv", ".scale"):
                scale = written[canonical].removesuffix(".weight") + suffix
                assert canonical_name(scale, config) == (canonical, True)


# The names in a published V4, by kind of layer.
EVERY_LAYER = (
    "attn_norm.weight",
    "ffn_norm.weight",
    "hc_attn_fn",
    "hc_attn_base",
    "hc_attn_scale",
    "hc_ffn_fn",
    "hc_ffn_base",
    "hc_ffn_scale",
    "attn.wq_a.weight",
    "attn.q_norm.weight",
    "attn.wq_b.weight",
    "attn.wkv.weight",
    "attn.kv_norm.weight",
    "attn.wo_a.weight",
    "attn.wo_b.weight",
    "attn.attn_sink",
    "ffn.gate.weight",
    "ffn.shared_experts.w1.weight",
    "ffn.shared_experts.w2.weight",
    "ffn.shared_experts.w3.weight",
    "ffn.experts.N.w1.weight",
    "ffn.experts.N.w2.weight",
    "ffn.experts.N.w3.weight",
)
COMPRESSED = (
    "attn.compressor.wkv.weight",
    "attn.compressor.wgate.weight",
    "attn.compressor.ape",
    "attn.compressor.norm.weight",
)
SPARSE = (
    "attn.indexer.wq_b.weight",
    "attn.indexer.weights_proj.weight",
    "attn.indexer.compressor.wkv.weight",
    "attn.indexer.compressor.wgate.weight",
    "attn.indexer.compressor.ape",
    "attn.indexer.compressor.norm.weight",
)
MTP = (
    "e_proj.weight",
    "h_proj.weight",
    "enorm.weight",
    "hnorm.weight",
    "norm.weight",
    "hc_head_fn",
    "hc_head_base",
    "hc_head_scale",
    "ffn.gate.bias",
)
TOP = ("embed.weight", "head.weight", "norm.weight", "hc_head_fn", "hc_head_base", "hc_head_scale")


@pytest.mark.parametrize(
    ("name", "experts", "sparse", "heavy", "layers"),
    [("deepseek-v4-flash", 256, 21, 20, 43), ("deepseek-v4-pro", 384, 30, 31, 61)],
)
def test_v4_as_published(name: str, experts: int, sparse: int, heavy: int, layers: int) -> None:
    expected = Counter(dict.fromkeys(TOP, 1))
    for part in EVERY_LAYER:
        each = experts if "experts.N" in part else 1
        expected[f"layers.N.{part}"], expected[f"mtp.N.{part}"] = layers * each, each
    expected |= Counter({f"layers.N.{part}": sparse + heavy for part in COMPRESSED})
    expected |= Counter({f"layers.N.{part}": sparse for part in SPARSE})
    expected |= Counter({f"mtp.N.{part}": 1 for part in MTP})
    expected |= Counter({"layers.N.ffn.gate.bias": layers - 3, "layers.N.ffn.gate.tid2eid": 3})
    names = shapes(name)
    assert patterns(names) == expected
    assert {n for n in names if n.endswith("tid2eid")} == {
        f"layers.{i}.ffn.gate.tid2eid" for i in range(3)
    }


def test_v4_flash_with_its_scales_has_the_published_number_of_mtp_tensors() -> None:
    """The published shard holds 1,575 tensors: every linear map except the router has a scale."""
    names = [name for name in shapes("deepseek-v4-flash") if name.startswith("mtp.0.")]
    scaled = [name for name in names if re.search(r"\.(w[123kqo]\w*|[eh]_proj)\.weight$", name)]
    assert len(names) + len(scaled) == 1575


def test_v4_pro_has_the_shapes_of_the_published_headers() -> None:
    got = shapes("deepseek-v4-pro")
    for name, shape in {
        "embed.weight": (129280, 7168),
        "head.weight": (129280, 7168),
        "norm.weight": (7168,),
        "layers.0.ffn.gate.tid2eid": (129280, 6),
        "layers.0.attn.compressor.wkv.weight": (512, 7168),
        "layers.2.attn.compressor.wkv.weight": (1024, 7168),
        "layers.2.attn.indexer.compressor.wkv.weight": (256, 7168),
        "layers.0.attn.compressor.ape": (128, 512),
        "layers.2.attn.compressor.ape": (4, 1024),
        "layers.5.attn.attn_sink": (128,),
        "layers.5.attn.wo_a.weight": (16384, 4096),
        "layers.5.attn.wo_b.weight": (7168, 16384),
        "layers.5.attn.wq_a.weight": (1536, 7168),
        "layers.5.attn.wq_b.weight": (65536, 1536),
        "layers.5.attn.wkv.weight": (512, 7168),
        "layers.2.attn.indexer.wq_b.weight": (8192, 1536),
        "layers.2.attn.indexer.weights_proj.weight": (64, 7168),
        "layers.7.ffn.experts.383.w1.weight": (3072, 7168),
        "layers.7.ffn.shared_experts.w1.weight": (3072, 7168),
        "layers.7.hc_attn_fn": (24, 28672),
        "mtp.0.hc_head_fn": (4, 28672),
        "mtp.0.e_proj.weight": (7168, 7168),
        "mtp.0.h_proj.weight": (7168, 7168),
        "mtp.0.ffn.gate.bias": (384,),
    }.items():
        assert got[name] == shape, name


def test_v3_as_published() -> None:
    """The MTP layer is the 62nd layer, with four tensors of its own and copies of embedding and
    head.
    """
    got = shapes("deepseek-v3")
    attention = {
        "q_a_proj.weight": (1536, 7168),
        "q_a_layernorm.weight": (1536,),
        "q_b_proj.weight": (24576, 1536),
        "kv_a_proj_with_mqa.weight": (576, 7168),
        "kv_a_layernorm.weight": (512,),
        "kv_b_proj.weight": (32768, 512),
        "o_proj.weight": (7168, 16384),
    }
    for layer in (0, 3, 60, 61):
        assert {
            name: got[f"model.layers.{layer}.self_attn.{name}"] for name in attention
        } == attention
    assert got["model.layers.60.mlp.gate.weight"] == (256, 7168)
    assert got["model.layers.60.mlp.gate.e_score_correction_bias"] == (256,)
    own = {
        name.removeprefix("model.layers.61.") for name in got if name.startswith("model.layers.61.")
    }
    assert own - {name.removeprefix("model.layers.60.") for name in got} == {
        "enorm.weight",
        "hnorm.weight",
        "eh_proj.weight",
        "shared_head.norm.weight",
        "shared_head.head.weight",
        "embed_tokens.weight",
    }
    assert len([name for name in got if ".experts." in name]) == (61 - 3 + 1) * 256 * 3


def test_v32_has_the_indexer_too() -> None:
    got = shapes_of(shortened("deepseek-v3.2"))
    indexer = {
        "wq_b.weight": (8192, 1536),
        "wk.weight": (128, 7168),
        "k_norm.weight": (128,),
        "k_norm.bias": (128,),
        "weights_proj.weight": (64, 7168),
    }
    for layer in (0, 8):
        assert {
            name: got[f"model.layers.{layer}.self_attn.indexer.{name}"] for name in indexer
        } == indexer
    assert set(got) - set(shapes_of(shortened("deepseek-v3"))) == {
        f"model.layers.{layer}.self_attn.indexer.{name}" for layer in range(9) for name in indexer
    }


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("deepseek_v4", "mtp.0.ffn.experts.07.w1.weight"),
        ("deepseek_v4", "layers.00.attn.wkv.weight"),
        ("deepseek_v4", "layers.0.attn.wkv_a.weight"),
        ("deepseek_v4", "layers.0.ffn.gate"),
        ("deepseek_v4", "layers.0.attn.attn_sink.weight"),
        ("deepseek_v4", "layers.0.attn.wkv.weight\n"),
        ("deepseek_v4", f"layers.{'9' * 5000}.attn.wkv.weight"),
        ("deepseek_v3", "mtp.0.norm.weight"),
        ("deepseek_v3", "layers.0.attn.wkv.weight"),
        ("deepseek_v3", "layers.٣.attn.wo.weight"),
        ("deepseek_v3", ""),
        ("deepseek_v3", ".scale"),
        ("deepseek_v3", "layers.0.ffn.experts.w1.weight"),
        ("deepseek_v3", "layers.0."),
    ],
)
def test_other_names_are_nobodys(kind: str, name: str, tiny_of) -> None:
    config = tiny_of(kind, num_nextn_predict_layers=1)
    with torch.device("meta"):
        known = {canonical for canonical, _ in places(Deepseek(config).state_dict())}
    assert canonical_name(name, config)[0] not in known


def test_what_transformers_writes_for_v4_is_read(random_model, tiny_of, tmp_path) -> None:
    """With names="transformers" we write transformers' mixture of names, with `attn.norm` for
    kv_norm.
    """
    model = random_model(tiny_of("deepseek_v4", num_nextn_predict_layers=1), 1)
    save_pretrained(model, tmp_path / "ours")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    written = {
        name
        for file in (tmp_path / "theirs").glob("*.safetensors")
        for name in load(file.read_bytes())
    }
    assert {
        "model.layers.0.attn.norm.weight",
        "head.weight",
        "model.embed_tokens.weight",
    } <= written
    assert written == {
        name for name, _ in published_tensors(model, mtp=False, names="transformers")
    }
    config = tmp_path / "theirs" / "config.json"  # it has no MTP and says 1 all the same
    config.write_text(
        config.read_text().replace('"num_nextn_predict_layers": 1', '"num_nextn_predict_layers": 0')
    )
    again = load_pretrained(tmp_path / "theirs").state_dict()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.items())


def test_v4_in_module_names_is_read(random_model, tiny_of, tmp_path) -> None:
    model = random_model(tiny_of("deepseek_v4", num_nextn_predict_layers=1), 1)
    save_pretrained(model, tmp_path)
    state = model.state_dict()
    save_file(
        {name: place.of(state[place.parameter]).clone() for name, place in places(state)},
        tmp_path / "model.safetensors",
    )
    assert "model.layers.3.self_attn.kv_proj.weight" in load(
        (tmp_path / "model.safetensors").read_bytes()
    )
    again = load_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in state.items())


@pytest.mark.parametrize("kind", KINDS)
def test_what_stays_float32_is_transformers_choice(
    kind: str, random_model, tiny_of, tmp_path
) -> None:
    """Compared parameter by parameter in bfloat16. The MTP layers, which transformers does not
    know, follow the same modules.
    """
    model = random_model(
        tiny_of(kind, num_nextn_predict_layers=0 if kind == "deepseek_v2" else 1), 1
    )
    save_pretrained(model, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    ours = load_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    assert {name: ours[name].dtype for name in theirs} == {
        name: tensor.dtype for name, tensor in theirs.items()
    }
    decoder = {name.partition(".layers.1.")[2]: tensor.dtype for name, tensor in ours.items()}
    own = {
        name.partition(".layers.3.")[2]: tensor.dtype
        for name, tensor in ours.items()
        if layer_of(name) == 3
    }
    assert all(dtype == decoder.get(name, dtype) for name, dtype in own.items())
    if kind == "deepseek_v4":
        assert {name for name in own if name not in decoder and own[name] == torch.float32} == {
            "enorm.weight",
            "hnorm.weight",
            "norm.weight",
            "hc_head.hc_fn",
            "hc_head.hc_base",
            "hc_head.hc_scale",
        }
    assert not stays_float32("model.layers.1.self_attn.kv_proj.weight", model.config)
