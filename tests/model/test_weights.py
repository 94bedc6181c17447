"""Checkpoints in and out: every kind of damage is a `XushiError` with a remedy; shards, ties and bfloat16 load."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3ForCausalLM

from xushi.base.errors import XushiError
from xushi.model import Deepseek, load_pretrained, save_pretrained
from xushi.model.weights import INDEX_FILE, SINGLE_FILE

NORM = "model.norm.weight"
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.fixture
def saved(random_model, tiny, tmp_path) -> Path:
    save_pretrained(random_model(tiny(num_nextn_predict_layers=1), 1), tmp_path)
    return tmp_path


def shard(directory: Path, parts: int) -> None:
    """Divide a checkpoint's single file into several with an index, as published ones are."""
    tensors = load_file(directory / SINGLE_FILE)
    (directory / SINGLE_FILE).unlink()
    names = [f"model-{i + 1:05}-of-{parts:05}.safetensors" for i in range(parts)]
    weight_map = {tensor: names[i % parts] for i, tensor in enumerate(sorted(tensors))}
    for name in names:
        save_file({t: tensors[t] for t, place in weight_map.items() if place == name}, directory / name)
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def same(first: Deepseek, second: Deepseek) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def change(directory: Path, **replacements: torch.Tensor | None) -> None:
    """Rewrite the single file with some tensors replaced, or left out where None."""
    tensors = load_file(directory / SINGLE_FILE) | replacements
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, directory / SINGLE_FILE)


def edit_config(directory: Path, **changes: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


def write_index(directory: Path, content: object) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (directory / INDEX_FILE).write_text(text)


def truncate(file: Path, keep: float) -> None:
    file.write_bytes(file.read_bytes()[:int(file.stat().st_size * keep)])


def lying_header(directory: Path) -> None:
    """A header that says more bytes follow than there are."""
    raw = (directory / SINGLE_FILE).read_bytes()
    (directory / SINGLE_FILE).write_bytes(struct.pack("<Q", len(raw) * 2) + raw[8:])


# what is done to a good checkpoint, and words that the one line must hold
DAMAGE = {
    "a missing tensor": (lambda d: change(d, **{NORM: None}), NORM),
    "a missing expert": (lambda d: change(d, **{"model.layers.1.mlp.experts.3.up_proj.weight": None}), "experts.3.up"),
    "a missing router bias": (lambda d: change(d, **{"model.layers.1.mlp.gate.e_score_correction_bias": None}),
                              "e_score_correction_bias"),
    "a missing MTP tensor": (lambda d: change(d, **{"model.layers.2.eh_proj.weight": None}), "layers.2.eh_proj"),
    "a tensor too many": (lambda d: change(d, surplus=torch.zeros(2)), "surplus"),
    "an expert too many": (lambda d: change(d, **{"model.layers.1.mlp.experts.8.up_proj.weight": torch.zeros(8, 24)}),
                           "experts.8"),
    "a wrong shape": (lambda d: change(d, **{NORM: torch.zeros(25)}), "[25]"),
    "a transposed matrix": (lambda d: change(d, **{"model.layers.0.mlp.up_proj.weight": torch.zeros(24, 32)}),
                            "[24, 32]"),
    "no weights": (lambda d: (d / SINGLE_FILE).unlink(), "does not exist"),
    "a truncated file": (lambda d: truncate(d / SINGLE_FILE, 0.6), "cannot be read"),
    "a truncated header": (lambda d: truncate(d / SINGLE_FILE, 0.01), "cannot be read"),
    "an empty file": (lambda d: truncate(d / SINGLE_FILE, 0.0), "cannot be read"),
    "a header that lies": (lying_header, "cannot be read"),
    "a directory for a file": (lambda d: ((d / SINGLE_FILE).unlink(), (d / SINGLE_FILE).mkdir()), "cannot be read"),
    "an index that leads outside": (lambda d: write_index(d, {"weight_map": {NORM: "../x.safetensors"}}), "'../x"),
    "an index to an absolute path": (lambda d: write_index(d, {"weight_map": {NORM: "/etc/passwd"}}), "/etc/passwd"),
    "an index to its own parent": (lambda d: write_index(d, {"weight_map": {NORM: ".."}}), ".."),
    "an index to nothing": (lambda d: write_index(d, {"weight_map": {NORM: ""}}), "model.safetensors.index.json"),
    "an index to a missing shard": (lambda d: write_index(d, {"weight_map": {NORM: "gone.safetensors"}}), "gone"),
    "an index that names too little": (lambda d: (shard(d, 2), write_index(
        d, {"weight_map": {NORM: "model-00001-of-00002.safetensors"}})), "lacks"),
    "an index that is not JSON": (lambda d: write_index(d, "{"), "cannot be read"),
    "an index without a map": (lambda d: write_index(d, {}), "weight_map"),
    "an index that is a list": (lambda d: write_index(d, []), "cannot be read"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json does not exist"),
    "a config that is not JSON": (lambda d: (d / "config.json").write_text("{"), "cannot be read"),
    "a config that is not UTF-8": (lambda d: (d / "config.json").write_bytes(b"\xff\xfe{"), "cannot be read"),
    "a config that is a list": (lambda d: (d / "config.json").write_text("[]"), "not a JSON object"),
    "another architecture": (lambda d: edit_config(d, model_type="llama"), "'llama'"),
    "no architecture": (lambda d: (d / "config.json").write_text('{"vocab_size": 50}'), "model_type"),
    "another activation": (lambda d: edit_config(d, hidden_act="gelu"), "hidden_act"),
    "another scoring function": (lambda d: edit_config(d, scoring_func="softmax"), "scoring_func"),
    "another rope": (lambda d: edit_config(d, rope_scaling={"type": "linear", "factor": 2.0}), "linear"),
    "another temperature": (lambda d: edit_config(d, rope_scaling=YARN | {"attention_factor": 1.2}),
                            "attention_factor"),
    "other bounds": (lambda d: edit_config(d, rope_scaling=YARN | {"truncate": False}), "truncate"),
    "a wrong type": (lambda d: edit_config(d, hidden_size="24"), "hidden_size"),
    "experts that do not divide": (lambda d: edit_config(d, n_group=3), "n_group"),
    "another size": (lambda d: edit_config(d, hidden_size=32), "config.json asks for"),
    "fewer layers": (lambda d: edit_config(d, num_hidden_layers=1), "does not describe"),
    "more layers": (lambda d: edit_config(d, num_hidden_layers=4, first_k_dense_replace=1),
                    "does not describe"),
    "more than fits": (lambda d: edit_config(d, n_routed_experts=2**24, moe_intermediate_size=2**20), "memory"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_one_line_and_a_remedy(kind: str, saved: Path) -> None:
    damage, words = DAMAGE[kind]
    damage(saved)
    with pytest.raises(XushiError) as error:
        load_pretrained(saved)
    assert words in error.value.problem and str(saved) in error.value.problem
    assert "\n" not in error.value.problem and error.value.remedy and "\n" not in error.value.remedy


def test_a_path_that_is_not_there(tmp_path) -> None:
    with pytest.raises(XushiError, match="does not exist"):
        load_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("parts", [1, 3])
def test_sharded_checkpoints(parts: int, saved: Path) -> None:
    whole = load_pretrained(saved)
    shard(saved, parts)
    assert same(whole, load_pretrained(saved))


def test_what_transformers_writes_is_read(random_model, tiny, tmp_path) -> None:
    """Its own sharding, config and names: save with transformers, load here."""
    model = random_model(tiny(q_lora_rank=6), 2)
    save_pretrained(model, tmp_path / "ours")
    reference = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    again = load_pretrained(tmp_path / "theirs")
    assert same(model, again) and again.config.rope_scaling is None
    assert again.config.model_dump(exclude={"num_nextn_predict_layers"}) == model.config.model_dump(
        exclude={"num_nextn_predict_layers"})


def test_yarn_from_transformers(random_model, tiny, tmp_path) -> None:
    from xushi.model import RopeScaling

    scaling = RopeScaling(factor=4.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=1.0)
    model = random_model(tiny(rope_scaling=scaling, rope_theta=500.0), 3)
    save_pretrained(model, tmp_path / "ours")
    DeepseekV3ForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).save_pretrained(tmp_path / "theirs")
    again = load_pretrained(tmp_path / "theirs")
    assert again.config.rope_scaling == scaling and again.config.rope_theta == 500.0
    tokens = torch.arange(20)[None]
    assert torch.equal(model(tokens).logits, again(tokens).logits)


def test_tied_embeddings(random_model, tiny, tmp_path) -> None:
    model = random_model(tiny(tie_word_embeddings=True, num_nextn_predict_layers=1), 4)
    save_pretrained(model, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / SINGLE_FILE)
    again = load_pretrained(tmp_path)
    assert again.lm_head is None and again.head_VD is again.model.embed_tokens.weight and same(model, again)
    tokens = torch.arange(9)[None]
    torch.nn.functional.cross_entropy(again(tokens).logits[0], tokens[0]).backward()
    assert again.model.embed_tokens.weight.grad is not None


def test_mtp_copies_of_the_shared_tensors_may_be_absent(saved: Path) -> None:
    """Published MTP layers carry copies of embedding and head; some exports leave them out."""
    whole = load_pretrained(saved)
    change(saved, **{"model.layers.2.embed_tokens.weight": None, "model.layers.2.shared_head.head.weight": None})
    assert same(whole, load_pretrained(saved))


def test_bfloat16_keeps_the_router_biases_in_float32(saved: Path) -> None:
    exact, model = load_pretrained(saved), load_pretrained(saved, dtype=torch.bfloat16)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    for name, router in model.routers().items():
        assert router.e_score_correction_bias.dtype == torch.float32
        assert torch.equal(router.e_score_correction_bias, exact.routers()[name].e_score_correction_bias)
    assert model.angles.frequencies.dtype == torch.float32
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, exact.get_parameter(name).bfloat16()), name


def test_bfloat16_round_trip(saved: Path, tmp_path) -> None:
    model = load_pretrained(saved, dtype=torch.bfloat16)
    save_pretrained(model, tmp_path / "half")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    tensors = load_file(tmp_path / "half" / SINGLE_FILE)
    assert {str(t.dtype) for name, t in tensors.items() if not name.endswith("correction_bias")} == {"torch.bfloat16"}
    assert all(t.dtype == torch.float32 for name, t in tensors.items() if name.endswith("correction_bias"))
    assert same(model, load_pretrained(tmp_path / "half", dtype=torch.bfloat16))


def test_published_names_and_shapes(saved: Path) -> None:
    """One matrix per expert and name, the MTP layer after the decoder's with its four own tensors and two copies."""
    tensors = load_file(saved / SINGLE_FILE)
    assert tensors["model.layers.1.mlp.experts.7.gate_proj.weight"].shape == (8, 24)
    assert tensors["model.layers.1.mlp.experts.7.down_proj.weight"].shape == (24, 8)
    assert not any("gate_up" in name for name in tensors)
    own = {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight", "shared_head.head.weight",
           "embed_tokens.weight"}
    assert own <= {name.removeprefix("model.layers.2.") for name in tensors}
    assert torch.equal(tensors["model.layers.2.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(tensors["model.layers.2.shared_head.head.weight"], tensors["lm_head.weight"])
