"""Other people's checkpoints: what config.json and the files say is read as transformers reads it,
or refused with a sentence that names the file.
"""

import importlib.util
import json
import math
import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from xushi.base.errors import BadInput
from xushi.cli.models import inspect
from xushi.model import (
    Deepseek,
    from_published,
    load_pretrained,
    preset,
    read_config,
    save_pretrained,
    to_published,
)
from xushi.model.config_keys import unread_keys
from xushi.model.rope_fields import rope_fields
from xushi.model.rotary import RotaryAngles
from xushi.plan import count_parameters

from ..miniature import ROOT
from .mutations import mutated, verdict
from .published import (
    ONE_OF_EACH,
    TABLES,
    TOKENS,
    TOLERANCE,
    judged,
    loaded_difference,
    rotation,
    saved,
    small,
    theirs,
)

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
NEW_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LATENT = ONE_OF_EACH[:3]
NONE = {"rope_theta": ..., "rope_scaling": ..., "rope_parameters": ..., "compress_rope_theta": ...}
# Where a config.json may state RoPE's base and scaling, for a model with one rotation.
SPELLINGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "top base": {"rope_theta": 50000},
    "top base, empty tables": {"rope_theta": 50000.0, "rope_scaling": {}, "rope_parameters": {}},
    "top base, null tables": {"rope_theta": 50000.0, "rope_scaling": None, "rope_parameters": None},
    "top base, type alone": {"rope_theta": 50000, "rope_parameters": {"rope_type": "default"}},
    "base in the new table": {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}},
    "base in the new table, no type": {"rope_parameters": {"rope_theta": 50000.0}},
    "base in the old table": {"rope_scaling": {"type": "default", "rope_theta": 50000.0}},
    "base in the old table, no type": {"rope_scaling": {"rope_theta": 50000.0}},
    "two bases": {"rope_theta": 500.0, "rope_parameters": {"rope_theta": 50000.0}},
    "a null base above": {"rope_theta": None, "rope_parameters": {"rope_theta": 50000.0}},
    "yarn and top base": {"rope_theta": 50000.0, "rope_scaling": YARN},
    "yarn without base": {"rope_scaling": YARN},
    "yarn with base": {"rope_scaling": YARN | {"rope_theta": 50000.0}},
    "yarn with both bases": {"rope_theta": 7.0, "rope_scaling": YARN | {"rope_theta": 50000.0}},
    "new yarn with base": {"rope_parameters": NEW_YARN | {"rope_theta": 50000.0}},
    "new yarn and top base": {"rope_theta": 50000.0, "rope_parameters": NEW_YARN},
    "new yarn, empty old": {"rope_scaling": {}, "rope_parameters": NEW_YARN},
    "old yarn, empty new": {"rope_scaling": YARN, "rope_parameters": {}},
    "both tables the same": {"rope_scaling": YARN, "rope_parameters": NEW_YARN},
    "both names of the type": {"rope_scaling": YARN | {"rope_type": "yarn"}},
    "mscales": {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.9}},
    "mscale alone": {"rope_scaling": YARN | {"mscale": 0.7}},
    "mscale_all_dim alone": {"rope_scaling": YARN | {"mscale_all_dim": 0.9}},
    "null mscale": {"rope_scaling": YARN | {"mscale": None, "mscale_all_dim": 0.9}},
    "null mscale_all_dim": {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": None}},
    "zero mscale": {"rope_scaling": YARN | {"mscale": 0, "mscale_all_dim": 1}},
    "betas": {"rope_scaling": YARN | {"beta_fast": 2, "beta_slow": 0.5}},
    "null betas": {"rope_scaling": YARN | {"beta_fast": None, "beta_slow": None}},
    "zero betas": {"rope_scaling": YARN | {"beta_fast": 0, "beta_slow": 0}},
    "equal betas": {"rope_scaling": YARN | {"beta_fast": 1.0, "beta_slow": 1.0}},
    "length as a float": {"rope_scaling": YARN | {"original_max_position_embeddings": 16.0}},
    "length above": {
        "original_max_position_embeddings": 16,
        "rope_scaling": {"type": "yarn", "factor": 4.0},
    },
    "length nowhere": {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    "null length": {"rope_scaling": YARN, "rope_theta": 1e6, "attention_factor": None},
    "factor below 1": {"rope_scaling": YARN | {"factor": 0.5, "mscale": 1, "mscale_all_dim": 1}},
}
# For V4, whose compressed layers have a base of their own.
SPELLINGS_V4: dict[str, dict[str, Any]] = {
    "nothing": {},
    "both bases above": {"rope_theta": 50000, "compress_rope_theta": 7000},
    "type alone": {"rope_theta": 50000.0, "rope_parameters": {"rope_type": "default"}},
    "yarn": {"rope_scaling": YARN, "compress_rope_theta": 7000.0},
    "yarn and the same base": {"rope_theta": 50.0, "rope_scaling": YARN | {"rope_theta": 50.0}},
    "yarn with null mscale": {"rope_scaling": YARN | {"mscale": None, "attention_factor": 1.0}},
    "new yarn": {"rope_theta": 50000.0, "rope_parameters": NEW_YARN},
    "two tables": {
        "rope_theta": 3.0,
        "compress_rope_theta": 5.0,
        "rope_parameters": {
            "main": {"rope_type": "default", "rope_theta": 50000.0, "partial_rotary_factor": 2 / 3},
            "compress": NEW_YARN
            | {"rope_theta": 7000.0, "partial_rotary_factor": 2 / 3, "attention_factor": 1.0},
        },
    },
    "two tables, base of one above": {
        "rope_theta": 50000.0,
        "partial_rotary_factor": 2 / 3,
        "rope_parameters": {"main": {"rope_type": "default"}, "compress": {"rope_theta": 7000.0}},
    },
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_rope_is_read_wherever_it_stands(spelling: str) -> None:
    """Frequencies and the scale of cos and sin."""
    for name in LATENT:
        table = small(name, **(NONE | SPELLINGS[spelling]))
        config, expected = from_published(table, "here"), rotation(table)
        angles = RotaryAngles(config.qk_rope_head_dim, config.rope_theta, config.rope_scaling)
        torch.testing.assert_close(angles.frequencies, expected.inv_freq, rtol=1e-6, atol=0)
        assert angles.magnitude == pytest.approx(expected.attention_scaling, rel=1e-12)


@pytest.mark.parametrize("spelling", SPELLINGS_V4)
def test_v4s_two_rotations_are_read_wherever_they_stand(spelling: str) -> None:
    table = small("deepseek-v4-flash", **(NONE | SPELLINGS_V4[spelling]))
    config, expected = from_published(table, "here"), rotation(table)
    width = config.qk_rope_head_dim
    angles = {
        "main": RotaryAngles(width, config.rope_theta, None),
        "compress": RotaryAngles(width, config.compress_rope_theta, config.rope_scaling, False),
    }
    for name, ours_alone in angles.items():
        frequencies = getattr(expected, f"{name}_inv_freq")
        torch.testing.assert_close(ours_alone.frequencies, frequencies, rtol=1e-6, atol=0)
        assert ours_alone.magnitude == getattr(expected, f"{name}_attention_scaling") == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_every_spelling_of_rope_gives_transformers_logits(name: str) -> None:
    """The softmax scale too, which depends on the same fields."""
    for spelling in (SPELLINGS_V4 if "v4" in name else SPELLINGS).values():
        assert judged(small(name, **(NONE | spelling))) <= TOLERANCE, spelling


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "default beside yarn": (
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": YARN},
        "rope_scaling and rope_parameters contradict",
    ),
    "two factors": (
        {"rope_parameters": NEW_YARN | {"factor": 8.0}, "rope_scaling": YARN},
        "contradict",
    ),
    "two bases": (
        {"rope_parameters": NEW_YARN | {"rope_theta": 50000.0}, "rope_scaling": YARN},
        "contradict",
    ),
    "two types": ({"rope_scaling": YARN | {"rope_type": "default"}}, "rope_type is 'default'"),
    "no type": ({"rope_scaling": {"factor": 4.0}}, "no rope_type"),
    "another type": ({"rope_parameters": NEW_YARN | {"rope_type": "llama3"}}, "'llama3'"),
    "null type": ({"rope_parameters": NEW_YARN | {"rope_type": None}}, "of type None"),
    "two lengths": (
        {"original_max_position_embeddings": 32, "rope_scaling": YARN},
        "original_max_position_embeddings is 16",
    ),
    "half a position": (
        {"rope_scaling": YARN | {"original_max_position_embeddings": 16.5}},
        "original_max_position_embeddings",
    ),
    "a table that is a word": ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'"),
    "a table that is a list": ({"rope_parameters": [1]}, "rope_parameters is [1]"),
    "null factor": ({"rope_scaling": YARN | {"factor": None}}, "factor"),
    "a temperature": (
        {"rope_scaling": YARN | {"attention_factor": 1.2}},
        "attention_factor is 1.2",
    ),
    "rounding off": ({"rope_scaling": YARN | {"truncate": False}}, "truncate is False"),
    "a part of the width": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "a base of 1": ({"rope_theta": 1.0, "rope_scaling": YARN}, "rope_theta=1"),
}


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_rope_that_contradicts_itself_is_refused(case: str, name: str) -> None:
    changes, words = CONTRADICTIONS[case]
    if case == "a base of 1" and "v4" in name:
        changes, words = changes | {"compress_rope_theta": 1}, "compress_rope_theta=1"
    if case == "two bases" and "v4" in name:
        words = "rope_parameters.rope_theta is 50000.0"
    with pytest.raises(BadInput) as error:
        from_published(small(name, **(NONE | changes)), "there/config.json")
    assert words in error.value.problem and "there/config.json" in error.value.problem
    assert "recipe" not in error.value.remedy and "--set" not in error.value.remedy


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"main": {}}, "rope_parameters.compress is missing"),
        ({"compress": {"rope_theta": 7.0}, "main": None}, "rope_parameters.main is missing"),
        ({"main": {}, "compress": {}}, "rope_parameters.compress has no rope_theta"),
        (
            {"main": {}, "compress": NEW_YARN | {"rope_theta": 7.0}},
            "rope_parameters.compress.attention_factor is None",
        ),
        ({"main": NEW_YARN, "compress": {"rope_theta": 7.0}}, "main is scaled"),
        (
            {"main": {"partial_rotary_factor": 0.5}, "compress": {"rope_theta": 7.0}},
            "main.partial_rotary_factor",
        ),
    ],
)
def test_v4s_tables_must_be_whole(parameters: dict, words: str) -> None:
    table = small("deepseek-v4-flash", **(NONE | {"rope_parameters": parameters}))
    with pytest.raises(BadInput) as error:
        from_published(table, "there/config.json")
    assert words in error.value.problem


def test_a_table_per_layer_type_belongs_to_v4_alone() -> None:
    table = small("deepseek-v3", **(NONE | {"rope_parameters": {"main": {}, "compress": {}}}))
    with pytest.raises(BadInput, match=r"rope_parameters\.main is a table"):
        rope_fields(table, "deepseek_v3", "there/config.json")


def edit(directory: Path, **changes: Any) -> None:
    """Change keys of config.json; ... removes one."""
    file = directory / "config.json"
    table = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in table.items() if value is not ...}))


def change(directory: Path, **replaced: Tensor | None) -> None:
    """Rewrite the single file with tensors replaced; None removes one."""
    file = directory / "model.safetensors"
    tensors = load(file.read_bytes()) | replaced
    save_file({name: each for name, each in tensors.items() if each is not None}, file)


def refused(directory: Path, **options: Any) -> str:
    with pytest.raises(BadInput) as error:
        load_pretrained(directory, **options)
    assert "\n" not in error.value.problem and "recipe" not in error.value.remedy
    assert str(directory) in error.value.problem
    return error.value.problem


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that copies a small checkpoint that transformers wrote, without MTP layers."""
    made: dict[str, Path] = {}

    def copy(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("original")
            saved(small(name), made[name])
        place = tmp_path_factory.mktemp("copy") / "here"
        shutil.copytree(made[name], place)
        return place

    return copy


@pytest.fixture
def with_mtp(tmp_path: Path) -> Callable[[str, int], Path]:
    """A function that writes a small checkpoint with MTP layers."""

    def make(name: str, layers: int) -> Path:
        table = small(name, num_nextn_predict_layers=layers)
        save_pretrained(Deepseek(from_published(table, "here")).initialise(3), tmp_path)
        return tmp_path

    return make


def test_two_sets_of_weights_are_refused(tmp_path: Path) -> None:
    """Shards of an older generation beside a newer single file."""
    saved(small("deepseek-v3"), tmp_path, max_shard_size="30KB")
    newer = tmp_path / "newer"
    saved(small("deepseek-v3"), newer)
    (newer / "model.safetensors").rename(tmp_path / "model.safetensors")
    problem = refused(tmp_path)
    assert "two sets of weights" in problem and "model.safetensors.index.json" in problem


def test_a_file_that_is_not_read_is_named(checkpoint, capsys) -> None:
    directory = checkpoint("deepseek-v3")
    shutil.copy(directory / "model.safetensors", directory / "model-00001-of-00002.safetensors")
    load_pretrained(directory)
    assert "model-00001-of-00002.safetensors is not read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "alias", "field"),
    [
        ("deepseek-v2", "num_experts", "n_routed_experts"),
        ("deepseek-v3", "num_local_experts", "n_routed_experts"),
        ("deepseek-v3.2", "num_local_experts", "n_routed_experts"),
        ("deepseek-v3.2", "num_experts", "n_routed_experts"),
        ("deepseek-v4-flash", "num_local_experts", "n_routed_experts"),
        ("deepseek-v4-flash", "intermediate_size", "moe_intermediate_size"),
        ("deepseek-v3", "num_mtp_layers", "num_nextn_predict_layers"),
    ],
)
def test_a_field_under_its_other_name(name: str, alias: str, field: str) -> None:
    """As transformers' own class of the model reads it; two values of one field are refused."""
    table = small(name)
    renamed = {key: value for key, value in table.items() if key != field} | {alias: table[field]}
    config = AutoConfig.for_model(**{k: v for k, v in renamed.items() if k != "architectures"})
    read = from_published(renamed, "there/config.json")
    assert getattr(read, field) == getattr(config, field) == table[field]
    assert read == from_published(table, "there/config.json")
    with pytest.raises(BadInput, match=alias) as error:
        from_published(table | {alias: table[field] + 1}, "there/config.json")
    assert field in error.value.problem


def test_a_key_that_nothing_reads_is_named(checkpoint, capsys) -> None:
    directory = checkpoint("deepseek-v3")
    load_pretrained(directory)
    assert "nothing reads" not in capsys.readouterr().err
    edit(directory, attention_sinks=True, index_topk=8, rope_scaling={"type": "default", "ntk": 2})
    edit(directory, rope_parameters=...)
    load_pretrained(directory)
    said = capsys.readouterr().err
    assert "nothing reads 'attention_sinks', 'index_topk', 'rope_scaling.ntk'" in said
    read_config(directory)  # says nothing: the loader and inspect do
    assert capsys.readouterr().err == ""
    inspect(str(directory))
    assert capsys.readouterr().err.count("nothing reads 'attention_sinks'") == 1


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_what_transformers_writes_has_no_key_that_nothing_reads(name: str, tmp_path: Path) -> None:
    config = theirs(small(name)).config
    for use_diff in (True, False):
        table = json.loads(config.to_json_string(use_diff=use_diff))
        assert unread_keys(table, table["model_type"]) == []
    assert unread_keys(to_published(preset(name)), to_published(preset(name))["model_type"]) == []


@pytest.mark.parametrize("name", ONE_OF_EACH[1:])
def test_files_without_mtp_load_without_it(name: str, checkpoint, capsys) -> None:
    """transformers writes its default of one layer, and no tensors of it."""
    directory = checkpoint(name)
    capsys.readouterr()
    model = load_pretrained(directory)
    assert model.config.num_nextn_predict_layers == 0 and not model.mtp_layers
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "loaded without MTP" in said and "layers=1" in said
    load_pretrained(directory, mtp=False)
    assert capsys.readouterr().err == ""
    assert "files hold no MTP layers" in refused(directory, mtp=True)


@pytest.mark.parametrize("name", ONE_OF_EACH[1:])
def test_mtp_that_the_config_does_not_name_is_left_out(name: str, with_mtp, capsys) -> None:
    directory = with_mtp(name, 2)
    whole = load_pretrained(directory)
    assert len(whole.mtp_layers) == 2 and capsys.readouterr().err == ""
    without = load_pretrained(directory, mtp=False)
    assert not without.mtp_layers and without.config == whole.config.without_mtp()
    assert capsys.readouterr().err == ""
    edit(directory, num_nextn_predict_layers=1)
    assert len(load_pretrained(directory).mtp_layers) == 1
    assert "a tensor of an MTP layer that config.json does not name" in capsys.readouterr().err
    edit(directory, num_nextn_predict_layers=0)
    assert not load_pretrained(directory).mtp_layers
    assert "a tensor of an MTP layer that config.json does not name" in capsys.readouterr().err
    assert "config.json says that there are none" in refused(directory, mtp=True)
    edit(directory, num_nextn_predict_layers=3)
    assert "lacks" in refused(directory)


@pytest.mark.parametrize("name", ONE_OF_EACH[1:3])
def test_layers_of_a_longer_trunk_are_no_mtp_layers(name: str, with_mtp) -> None:
    directory = with_mtp(name, 1)
    edit(directory, num_hidden_layers=2, num_nextn_predict_layers=0, mlp_layer_types=...)
    assert "layers.2." in refused(directory)


def test_draft_models_of_another_kind_are_left_out(checkpoint, capsys) -> None:
    """Three of them under mtp.*, in a newer release of V4-Flash."""
    directory = checkpoint("deepseek-v4-flash")
    before = load_pretrained(directory)(TOKENS).logits
    drafts = {f"mtp.{i}.main_proj.weight": torch.zeros(3, 3) for i in range(3)}
    change(directory, **drafts, **{"mtp.0.e_proj.weight": torch.zeros(2, 2)})
    assert "mtp.0" in refused(directory)
    edit(directory, dspark_block_size=5)
    capsys.readouterr()
    assert torch.equal(load_pretrained(directory)(TOKENS).logits, before)
    said = capsys.readouterr().err
    assert "4 x mtp.*, draft models of another kind" in said and "nothing reads" not in said
    assert "no MTP layers" in refused(directory, mtp=True)


def test_known_leftovers_are_skipped_and_counted(checkpoint, capsys) -> None:
    directory = checkpoint("deepseek-v3")
    expected = load_pretrained(directory)(TOKENS).logits
    capsys.readouterr()
    leftovers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(3)}
    change(directory, **leftovers)
    assert torch.equal(load_pretrained(directory)(TOKENS).logits, expected)
    assert "3 x *.inv_freq" in capsys.readouterr().err
    change(directory, **{"model.layers.1.self_attn.rotary_emb.other": torch.ones(4)})
    assert "model.layers.1.self_attn.rotary_emb.other" in refused(directory)


def test_an_equal_copy_of_a_tied_head_is_skipped(tmp_path: Path, capsys) -> None:
    model = saved(small("deepseek-v3", tie_word_embeddings=True), tmp_path)
    assert loaded_difference(model, tmp_path) <= TOLERANCE
    embedding = load((tmp_path / "model.safetensors").read_bytes())["model.embed_tokens.weight"]
    change(tmp_path, **{"lm_head.weight": embedding.clone()})
    capsys.readouterr()
    assert loaded_difference(model, tmp_path) <= TOLERANCE
    assert "lm_head.weight, equal to model.embed_tokens.weight" in capsys.readouterr().err
    other = embedding.clone()
    other[-1, -1] += 1
    change(tmp_path, **{"lm_head.weight": other})
    assert "lm_head.weight differs from model.embed_tokens.weight" in refused(tmp_path)


def test_names_of_the_index_that_are_in_no_file(tmp_path: Path, capsys) -> None:
    model = saved(small("deepseek-v3"), tmp_path, max_shard_size="30KB")
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.layers.9.gone.weight"] = "model-00001-of-00002.safetensors"
    shards = sorted(path.name for path in tmp_path.glob("model-*"))
    index["weight_map"]["model.layers.9.gone.weight"] = shards[0]
    file.write_text(json.dumps(index))
    assert loaded_difference(model, tmp_path) <= TOLERANCE
    assert "1 tensors that are in no file, model.layers.9.gone" in capsys.readouterr().err


def test_a_hugging_face_cache_is_read_through_its_links(checkpoint, tmp_path: Path) -> None:
    original = checkpoint("deepseek-v3")
    model = tmp_path / "models--someone--name"
    snapshot = model / "snapshots" / "0123456789abcdef"
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    for number, file in enumerate(sorted(original.iterdir())):
        file.rename(model / "blobs" / f"blob{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob{number}")
    load_pretrained(snapshot)
    with pytest.raises(BadInput) as error:
        load_pretrained(model)
    assert error.value.remedy.endswith(str(snapshot))
    linked = tmp_path / "link"
    linked.symlink_to(snapshot)
    load_pretrained(linked)
    for outside in (tmp_path / "weights", tmp_path / "models--someone--other" / "blobs" / "b"):
        outside.parent.mkdir(parents=True, exist_ok=True)
        os.replace((snapshot / "model.safetensors").resolve(), outside)
        (snapshot / "model.safetensors").unlink()
        (snapshot / "model.safetensors").symlink_to(outside)
        assert "leads out" in refused(snapshot)


@pytest.mark.parametrize("place", ["models/snapshots/01", "models--a/other/01", "models--a/01"])
def test_links_like_a_caches_elsewhere_are_refused(place: str, checkpoint, tmp_path: Path) -> None:
    directory = tmp_path / "above" / place
    directory.parent.mkdir(parents=True)
    checkpoint("deepseek-v3").rename(directory)
    blob = directory.parent.parent / "blob"
    (directory / "model.safetensors").rename(blob)
    (directory / "model.safetensors").symlink_to(blob)
    assert "leads out" in refused(directory)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_stacked_experts_are_read(name: str, tmp_path: Path) -> None:
    """As transformers writes them with save_original_format=False."""
    model = saved(small(name), tmp_path, save_original_format=False)
    names = load((tmp_path / "model.safetensors").read_bytes())
    assert names["model.layers.1.mlp.experts.gate_up_proj"].shape == (8, 16, 24)
    assert loaded_difference(model, tmp_path) <= TOLERANCE
    for experts in (7, 9):
        stacked = torch.zeros(experts, 16, 24)
        change(tmp_path, **{"model.layers.1.mlp.experts.gate_up_proj": stacked})
        assert "experts.gate_up_proj has shape" in refused(tmp_path)


def test_values_that_transformers_takes(checkpoint) -> None:
    directory = checkpoint("deepseek-v3")
    edit(directory, eos_token_id=[1, 7], rope_parameters=..., rope_scaling={}, rope_theta=10000)
    assert load_pretrained(directory).config.eos_token_id == [1, 7]
    edit(directory, eos_token_id=[])
    assert "eos_token_id" in refused(directory)
    edit(directory, eos_token_id=1, hidden_size="24")
    assert "config.json: hidden_size" in refused(directory)


def test_a_mixture_of_one_expert_loads(tmp_path: Path) -> None:
    """One group of one expert is not scored: the layer equals a dense one (test_config.py)."""
    one = {"n_routed_experts": 1, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
    table = small("deepseek-v3", **one, num_nextn_predict_layers=0)
    model = Deepseek(from_published(table, "here")).initialise(1)
    save_pretrained(model, tmp_path)
    assert torch.equal(load_pretrained(tmp_path)(TOKENS).logits, model(TOKENS).logits)


KIMI_K2 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "kimi_k2",
    "vocab_size": 163840,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_shared_experts": 1,
    "n_routed_experts": 384,
    "num_experts_per_tok": 8,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.827,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 131072,
    "rope_theta": 50000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
    "ep_size": 1,
    "pretraining_tp": 1,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.48.3",
    "use_cache": True,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
}
MOONLIGHT = {
    key: value
    for key, value in KIMI_K2.items()
    if key not in ("rope_scaling", "quantization_config")
} | {
    "model_type": "deepseek_v3",
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_shared_experts": 2,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "routed_scaling_factor": 2.446,
    "q_lora_rank": None,
    "max_position_embeddings": 8192,
    "rope_scaling": None,
    "rms_norm_eps": 1e-5,
}


def test_kimi_k2_is_a_v3_with_its_published_counts() -> None:
    """1,026.4 billion parameters, of which a token uses 32.9 billion."""
    config = from_published(KIMI_K2, "there/config.json")
    assert config.model_type == "deepseek_v3" and unread_keys(KIMI_K2, "deepseek_v3") == []
    counts = count_parameters(config)
    assert round(counts.total / 1e9, 1) == 1026.4
    assert round(counts.active / 1e9, 1) == 32.9


def test_moonlight_is_a_v3() -> None:
    """16 billion parameters, 3 billion active."""
    config = from_published(MOONLIGHT, "there/config.json")
    assert unread_keys(MOONLIGHT, "deepseek_v3") == [] and config.q_lora_rank is None
    assert 15.9e9 < count_parameters(config).total < 16.1e9


@pytest.mark.parametrize("model_type", ["kimi_k2", "deepseek_ref"])
def test_the_same_architecture_under_another_name(model_type: str, checkpoint) -> None:
    directory = checkpoint("deepseek-v3")
    expected = load_pretrained(directory)(TOKENS).logits
    edit(directory, model_type=model_type)
    assert torch.equal(load_pretrained(directory)(TOKENS).logits, expected)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_deepseek_ref_is_what_its_class_says(name: str) -> None:
    table = small(name)
    kind = table["model_type"]
    assert from_published(table | {"model_type": "deepseek_ref"}, "here").model_type == kind
    for classes in (None, [], ["LlamaForCausalLM"], table["architectures"] * 2):
        with pytest.raises(BadInput, match="deepseek_ref"):
            from_published(table | {"model_type": "deepseek_ref", "architectures": classes}, "here")


FORMATS: dict[str, tuple[Callable[[Path], object], str]] = {
    "NVFP4 of ModelOpt": (
        lambda d: edit(d, quantization_config={"quant_method": "modelopt", "quant_algo": "NVFP4"}),
        "ModelOpt NVFP4 is not implemented",
    ),
    "NVFP4 without a method": (
        lambda d: edit(d, quantization_config={"quant_algo": "NVFP4"}),
        "NVFP4",
    ),
    "NVFP4 stated beside": (
        lambda d: (d / "hf_quant_config.json").write_text(
            '{"producer": {}, "quantization": {"quant_algo": "NVFP4"}}'
        ),
        "NVFP4",
    ),
    "NVFP4 of compressed-tensors": (
        lambda d: edit(
            d,
            quantization_config={
                "quant_method": "compressed-tensors",
                "format": "nvfp4-pack-quantized",
            },
        ),
        "compressed-tensors nvfp4-pack-quantized",
    ),
    "NVFP4 by its tensors": (
        lambda d: change(d, **{"model.layers.0.mlp.up_proj.weight_scale_2": torch.ones(1)}),
        "NVFP4",
    ),
    "MLX": (lambda d: edit(d, quantization={"group_size": 64, "bits": 4}), "MLX"),
    "FP8 with scales of inputs": (
        lambda d: change(d, **{"model.layers.0.mlp.up_proj.input_scale": torch.ones(1)}),
        "a scale of inputs for FP8 (static activations)",
    ),
    "MLX by its tensors": (
        lambda d: change(d, **{"model.layers.0.mlp.up_proj.biases": torch.ones(1)}),
        "MLX",
    ),
    "AWQ": (lambda d: edit(d, quantization_config={"quant_method": "awq", "bits": 4}), "AWQ"),
    "GPTQ": (lambda d: edit(d, quantization_config={"quant_method": "gptq", "bits": 4}), "GPTQ"),
    "GPTQ stated beside": (
        lambda d: (d / "quantize_config.json").write_text('{"bits": 4, "group_size": 128}'),
        "quantize_config.json",
    ),
    "GPTQ by its tensors": (
        lambda d: change(
            d, **{"model.layers.0.mlp.up_proj.qweight": torch.ones(1, dtype=torch.int32)}
        ),
        "GPTQ",
    ),
    "an adapter beside a config": (
        lambda d: (
            (d / "model.safetensors").rename(d / "adapter_model.safetensors"),
            (d / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/base"}'),
        ),
        "LoRA) for someone/base",
    ),
    "an adapter alone": (
        lambda d: (
            (d / "config.json").unlink(),
            (d / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/base"}'),
        ),
        "LoRA) for someone/base",
    ),
}


@pytest.mark.parametrize("case", FORMATS)
def test_another_format_is_called_by_its_name(case: str, checkpoint) -> None:
    directory = checkpoint("deepseek-v3")
    make, words = FORMATS[case]
    make(directory)
    assert words in refused(directory)


MODES: dict[str, dict[str, Any]] = {
    "one file": {},
    "shards": {"max_shard_size": "30KB"},
    "module names": {"save_original_format": False},
    "module names in shards": {"save_original_format": False, "max_shard_size": "30KB"},
}


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", TABLES)
def test_every_way_that_transformers_saves(
    name: str, mode: str, tied: bool, tmp_path: Path
) -> None:
    model = theirs(small(name, tie_word_embeddings=tied))
    if tied:
        model.tie_weights()
    model.generation_config.eos_token_id = [1, 7]
    model.save_pretrained(tmp_path / "exact", **MODES[mode])
    assert (tmp_path / "exact" / "generation_config.json").exists()
    assert loaded_difference(model, tmp_path / "exact") <= TOLERANCE
    half = model.to(torch.bfloat16)
    half.save_pretrained(tmp_path / "half", **MODES[mode])
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32)
    assert loaded_difference(again.eval(), tmp_path / "half") <= TOLERANCE


@pytest.mark.slow
def test_changed_configs_give_transformers_logits_or_are_refused() -> None:
    """Never something else: docs/model.md lists where the two differ on purpose."""
    counts: Counter[str] = Counter()
    for seed in range(300):
        table, said = mutated(random.Random(seed))
        result = verdict(table)
        assert not result.startswith("WRONG"), (seed, said, result)
        counts[result.partition(":")[0]] += 1
    assert counts["equal"] >= 50 and counts["refused"] >= 100, counts


@pytest.fixture
def tool() -> ModuleType:
    """tools/check_published.py, which is no part of the package."""
    place = ROOT / "tools" / "check_published.py"
    spec = importlib.util.spec_from_file_location("check_published", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_published"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_comparison_with_transformers(tool, tmp_path: Path, monkeypatch, capsys) -> None:
    """On a checkpoint with tokenizer that transformers wrote; and where the models differ."""
    trained = Tokenizer(BPE())
    trained.pre_tokenizer = ByteLevel(add_prefix_space=False)
    words = BpeTrainer(vocab_size=300, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    trained.train_from_iterator(["import json", "The capital of France"], words)
    saved(small("deepseek-v3", vocab_size=320), tmp_path, max_shard_size="100KB")
    PreTrainedTokenizerFast(tokenizer_object=trained).save_pretrained(tmp_path)
    arguments = ["check_published.py", str(tmp_path), "--tokens", "6"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert tool.main() == 0
    written = capsys.readouterr()
    for who in ("xushi", "transformers"):
        assert f"{who}: prompt 20 of 20" in written.err
    result = json.loads(written.out.splitlines()[-1])
    assert result["prompts"] == 20 == result["prompts_with_the_same_tokens"]
    assert result["tokens"] == 120 == result["same_tokens"] and result["disagreements"] == []
    # A log-probability differs by at most twice what a logit does; no logit here exceeds 20.
    assert 0 < result["largest_difference_of_top_5_log_probabilities"] <= 20 * 2 * TOLERANCE

    def changed(*arguments: Any, **named: Any) -> Deepseek:
        model = load_pretrained(*arguments, **named)
        with torch.no_grad():
            model.head_VD[7] += 1
        return model

    monkeypatch.setattr(tool, "load_pretrained", changed)
    result = tool.compared(tmp_path, torch.float32, "cpu", 6)
    assert 0 < result["same_tokens"] == 120 - len(result["disagreements"])
    assert result["largest_difference_of_top_5_log_probabilities"] > 0.1
    assert all(7 in (one["xushi"], one["transformers"]) for one in result["disagreements"])

    def lacking(*_: Any, **__: Any) -> None:
        raise ImportError("an FP8 model requires accelerate\nmore")

    monkeypatch.setattr(tool.AutoModelForCausalLM, "from_pretrained", lacking)
    assert tool.main() == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-2].endswith("cannot load this model: an FP8 model requires accelerate")
    monkeypatch.setattr(sys, "argv", ["check_published.py", str(tmp_path / "nowhere")])
    assert tool.main() == 2 and "is not a directory" in capsys.readouterr().err


def stacked_in_fp8(directory: Path, block: list[int]) -> dict[str, Tensor]:
    """Turn the stacked experts of a checkpoint into FP8 with scales, as transformers does. Returns
    the values that they stand for.
    """
    tensors = load((directory / "model.safetensors").read_bytes())
    stream = torch.Generator().manual_seed(3)
    values, replaced = {}, {}
    for name, tensor in tensors.items():
        if not name.endswith((".gate_up_proj", ".down_proj")):
            continue
        experts, rows, columns = tensor.shape
        grid = (math.ceil(rows / block[0]), math.ceil(columns / block[1]))
        scale = 0.5 + torch.rand(experts, *grid, generator=stream)
        stored = (tensor * 8).to(torch.float8_e4m3fn)
        wide = scale.repeat_interleave(block[0], 1).repeat_interleave(block[1], 2)
        values[name] = stored.float() * wide[:, :rows, :columns]
        replaced |= {name: stored, f"{name}_scale_inv": scale}
    change(directory, **replaced)
    edit(directory, quantization_config={"fmt": "e4m3", "weight_block_size": block})
    return values


@pytest.mark.parametrize("block", [[8, 8], [4, 16], [1, 3]])
def test_stacked_fp8_experts_are_read(block: list[int], tmp_path: Path) -> None:
    saved(small("deepseek-v3"), tmp_path, save_original_format=False)
    values = stacked_in_fp8(tmp_path, block)
    read = load_pretrained(tmp_path).state_dict()
    assert values
    for name, wanted in values.items():
        assert torch.equal(read[name], wanted)


@pytest.mark.parametrize("block", [[5, 8], [16, 8]])
def test_stacked_fp8_experts_with_blocks_across_both_matrices_are_refused(
    block: list[int], tmp_path: Path
) -> None:
    saved(small("deepseek-v3"), tmp_path, save_original_format=False)
    stacked_in_fp8(tmp_path, block)
    said = refused(tmp_path)
    assert "gate_up_proj_scale_inv" in said and f"blocks of {block[0]} rows lie across" in said
