"""Loading checkpoints: every kind of damage is a `XushiError` with a remedy, and every layout gives
the same model.
"""

import dataclasses
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import DeepseekV3ForCausalLM

from xushi.base.errors import XushiError
from xushi.model import Deepseek, ModelConfig, building, load_pretrained, save_pretrained, weights
from xushi.model.shards import INDEX_FILE, SINGLE_FILE

from .conftest import same, some_model, tensors_in

NORM = "model.norm.weight"
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def shard(directory: Path, parts: int) -> None:
    """Split a checkpoint's single file into several with an index, like published checkpoints."""
    tensors = tensors_in(directory / SINGLE_FILE)
    (directory / SINGLE_FILE).unlink()
    names = [f"model-{i + 1:05}-of-{parts:05}.safetensors" for i in range(parts)]
    weight_map = {tensor: names[i % parts] for i, tensor in enumerate(sorted(tensors))}
    for name in names:
        save_file(
            {t: tensors[t] for t, place in weight_map.items() if place == name}, directory / name
        )
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def change(directory: Path, **replacements: Tensor | None) -> None:
    """Rewrite the single file with some tensors replaced; None removes a tensor."""
    tensors = tensors_in(directory / SINGLE_FILE) | replacements
    save_file(
        {name: tensor for name, tensor in tensors.items() if tensor is not None},
        directory / SINGLE_FILE,
    )


def edit_config(directory: Path, **changes: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


def write_index(directory: Path, content: object) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    if isinstance(content, dict):  # a single file beside an index is another fault
        (directory / SINGLE_FILE).unlink(missing_ok=True)
    (directory / INDEX_FILE).write_text(text)


def truncate(file: Path, keep: float) -> None:
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])


def write_raw(file: Path, header: object, data: bytes = b"") -> None:
    """Write a safetensors file with this header, valid or not."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def edit_header(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        raw = (directory / SINGLE_FILE).read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + length])
        change(header)
        write_raw(directory / SINGLE_FILE, header, raw[8 + length :])

    return damage


def says_twice(directory: Path) -> None:
    """JSON allows a repeated key; most readers use the last one."""
    raw = (directory / SINGLE_FILE).read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    norm = json.dumps({NORM: json.loads(raw[8 : 8 + length])[NORM]})[1:-1].encode()
    write_raw(
        directory / SINGLE_FILE,
        raw[8 : 8 + length].rstrip()[:-1] + b"," + norm + b"}",
        raw[8 + length :],
    )


def lying_header(directory: Path) -> None:
    """A header that describes more bytes than the file has."""
    raw = (directory / SINGLE_FILE).read_bytes()
    (directory / SINGLE_FILE).write_bytes(struct.pack("<Q", len(raw) * 2) + raw[8:])


# A change to a good checkpoint, and words that the error must contain.


DAMAGE = {
    "a missing tensor": (lambda d: change(d, **{NORM: None}), NORM),
    "a missing expert": (
        lambda d: change(d, **{"model.layers.1.mlp.experts.3.up_proj.weight": None}),
        "experts.3.up",
    ),
    "a missing router bias": (
        lambda d: change(d, **{"model.layers.1.mlp.gate.e_score_correction_bias": None}),
        "e_score_correction_bias",
    ),
    "a missing MTP tensor": (
        lambda d: change(d, **{"model.layers.2.eh_proj.weight": None}),
        "layers.2.eh_proj",
    ),
    "a tensor too many": (lambda d: change(d, surplus=torch.zeros(2)), "surplus"),
    "an expert too many": (
        lambda d: change(d, **{"model.layers.1.mlp.experts.8.up_proj.weight": torch.zeros(8, 24)}),
        "experts.8",
    ),
    "a wrong shape": (lambda d: change(d, **{NORM: torch.zeros(25)}), "[25]"),
    "a transposed matrix": (
        lambda d: change(d, **{"model.layers.0.mlp.up_proj.weight": torch.zeros(24, 32)}),
        "[24, 32]",
    ),
    "no weights": (lambda d: (d / SINGLE_FILE).unlink(), "does not exist"),
    "a truncated file": (lambda d: truncate(d / SINGLE_FILE, 0.6), "cannot be read"),
    "a truncated header": (lambda d: truncate(d / SINGLE_FILE, 0.01), "cannot be read"),
    "an empty file": (lambda d: truncate(d / SINGLE_FILE, 0.0), "cannot be read"),
    "a header that lies": (lying_header, "cannot be read"),
    "a directory for a file": (
        lambda d: ((d / SINGLE_FILE).unlink(), (d / SINGLE_FILE).mkdir()),
        "cannot be read",
    ),
    "an index that leads outside": (
        lambda d: write_index(d, {"weight_map": {NORM: "../x.safetensors"}}),
        "'../x",
    ),
    "an index to an absolute path": (
        lambda d: write_index(d, {"weight_map": {NORM: "/etc/passwd"}}),
        "/etc/passwd",
    ),
    "an index to its own parent": (lambda d: write_index(d, {"weight_map": {NORM: ".."}}), ".."),
    "an index to nothing": (
        lambda d: write_index(d, {"weight_map": {NORM: ""}}),
        "model.safetensors.index.json",
    ),
    "an index to a missing shard": (
        lambda d: write_index(d, {"weight_map": {NORM: "gone.safetensors"}}),
        "gone",
    ),
    "an index that names too little": (
        lambda d: (
            shard(d, 2),
            write_index(d, {"weight_map": {NORM: "model-00001-of-00002.safetensors"}}),
        ),
        "says that",
    ),
    "an index that errs": (lambda d: (shard(d, 2), swap(d)), "says that"),
    "an index to a pickle": (
        lambda d: write_index(d, {"weight_map": {NORM: "pytorch_model.bin"}}),
        "only safetensors",
    ),
    "an index to a number": (lambda d: write_index(d, {"weight_map": {NORM: 7}}), "7"),
    "an index to a list": (
        lambda d: write_index(d, {"weight_map": {NORM: ["a.safetensors"]}}),
        "a.safetensors",
    ),
    "an index through a backslash": (
        lambda d: write_index(d, {"weight_map": {NORM: "..\\x.safetensors"}}),
        "x.safet",
    ),
    "an index to a name with a zero": (
        lambda d: write_index(d, {"weight_map": {NORM: "a\0.safetensors"}}),
        "x00",
    ),
    "an index to a name without end": (
        lambda d: write_index(d, {"weight_map": {NORM: "a" * 9999 + ".safetensors"}}),
        "aaa...",
    ),
    "an index with a tensor twice": (
        lambda d: write_index(
            d, '{"weight_map": {"a": "model.safetensors", "a": "x.safetensors"}}'
        ),
        "twice",
    ),
    "an index without end": (lambda d: write_index(d, '{"a":' + "[" * 100_000), "cannot be read"),
    "a link that leads outside": (
        lambda d: move_and_link(d, d.parent / f"{d.name}-blob"),
        "leads out",
    ),
    "a config that leads outside": (
        lambda d: move_and_link(d, d.parent / f"{d.name}-c", "config.json"),
        "leads out",
    ),
    "a link in a circle": (
        lambda d: ((d / SINGLE_FILE).unlink(), (d / SINGLE_FILE).symlink_to(SINGLE_FILE)),
        "cannot be read",
    ),
    "a pipe": (lambda d: ((d / SINGLE_FILE).unlink(), os.mkfifo(d / SINGLE_FILE)), "not a file"),
    "a config that is a pipe": (
        lambda d: ((d / "config.json").unlink(), os.mkfifo(d / "config.json")),
        "not a file",
    ),
    "an index that is a pipe": (lambda d: os.mkfifo(d / INDEX_FILE), "not a file"),
    "pickles alone": (
        lambda d: (d / SINGLE_FILE).rename(d / "pytorch_model.bin"),
        "pytorch_model.bin is a pickle",
    ),
    "slices of a model": (
        lambda d: (shard(d, 2), (d / INDEX_FILE).unlink()),
        "2 safetensors files but no",
    ),
    "a tensor in two shards": (lambda d: (shard(d, 2), twice(d)), "and so does"),
    "a tensor by two names": (
        lambda d: change(d, **{"norm.weight": torch.zeros(24)}),
        "another name",
    ),
    "a tensor twice": (says_twice, "twice"),
    "a header that is a list": (lambda d: write_raw(d / SINGLE_FILE, []), "not a JSON object"),
    "a header with too much": (edit_header(lambda h: h[NORM].update(note=1)), "is not described"),
    "a header with too little": (edit_header(lambda h: h[NORM].pop("shape")), "is not described"),
    "a dtype unheard of": (edit_header(lambda h: h[NORM].update(dtype="F4")), "dtype F4"),
    "a dtype that is a list": (edit_header(lambda h: h[NORM].update(dtype=["F32"])), "F32"),
    "half a dtype": (
        edit_header(lambda h: h[NORM].update(dtype="BF16")),
        "48 bytes, and 96 bytes of data",
    ),
    "a shape below zero": (edit_header(lambda h: h[NORM].update(shape=[-24])), "-24"),
    "a shape that is true": (edit_header(lambda h: h[NORM].update(shape=[True, 24])), "True"),
    "a shape beyond all": (
        edit_header(lambda h: h[NORM].update(shape=[2**62, 2**62])),
        "bytes, and 96",
    ),
    "a shape of broken numbers": (edit_header(lambda h: h[NORM].update(shape=[24.0])), "24.0"),
    "offsets in reverse": (
        edit_header(lambda h: h[NORM]["data_offsets"].reverse()),
        "data_offsets",
    ),
    "offsets beyond the file": (
        edit_header(lambda h: h[NORM].update(data_offsets=[10**9, 10**9 + 96])),
        "a gap",
    ),
    "offsets of another": (edit_header(lambda h: h[NORM].update(data_offsets=[0, 96])), "overlaps"),
    "bytes nobody owns": (
        lambda d: (d / SINGLE_FILE).write_bytes((d / SINGLE_FILE).read_bytes() + b"x"),
        "describes",
    ),
    "a header of all the memory": (
        lambda d: (d / SINGLE_FILE).write_bytes(struct.pack("<Q", 2**63) + b"{}"),
        "cannot be read",
    ),
    "a header longer than its model": (
        lambda d: write_raw(d / SINGLE_FILE, b"{" + b" " * 3_000_000 + b"}"),
        "limit",
    ),
    "weights in whole numbers": (
        lambda d: change(d, **{NORM: torch.zeros(24, dtype=torch.int64)}),
        "int64",
    ),
    "a matrix in whole numbers": (
        lambda d: change(d, **{"lm_head.weight": torch.zeros(50, 24, dtype=torch.int32)}),
        "int32",
    ),
    "a name of several lines": (lambda d: change(d, **{"a\nb": torch.zeros(2)}), "'a\\nb'"),
    "an index that is not JSON": (lambda d: write_index(d, "{"), "cannot be read"),
    "an index without a map": (lambda d: write_index(d, {}), "weight_map"),
    "an index that is a list": (lambda d: write_index(d, []), "cannot be read"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json does not exist"),
    "a config that is not JSON": (lambda d: (d / "config.json").write_text("{"), "cannot be read"),
    "a config that is not UTF-8": (
        lambda d: (d / "config.json").write_bytes(b"\xff\xfe{"),
        "cannot be read",
    ),
    "a config that is a list": (
        lambda d: (d / "config.json").write_text("[]"),
        "not a JSON object",
    ),
    "another architecture": (lambda d: edit_config(d, model_type="llama"), "'llama'"),
    "no architecture": (
        lambda d: (d / "config.json").write_text('{"vocab_size": 50}'),
        "model_type",
    ),
    "another activation": (lambda d: edit_config(d, hidden_act="gelu"), "hidden_act"),
    "another scoring function": (lambda d: edit_config(d, scoring_func="softmax"), "scoring_func"),
    "another rope": (
        lambda d: edit_config(d, rope_scaling={"type": "linear", "factor": 2.0}),
        "linear",
    ),
    "another temperature": (
        lambda d: edit_config(d, rope_scaling=YARN | {"attention_factor": 1.2}),
        "attention_factor",
    ),
    "other bounds": (lambda d: edit_config(d, rope_scaling=YARN | {"truncate": False}), "truncate"),
    "a wrong type": (lambda d: edit_config(d, hidden_size="24"), "hidden_size"),
    "experts that do not divide": (lambda d: edit_config(d, n_group=3), "n_group"),
    "another size": (lambda d: edit_config(d, hidden_size=32), "config.json asks for"),
    "fewer layers": (lambda d: edit_config(d, num_hidden_layers=1), "layers.1.enorm"),
    "more layers": (
        lambda d: edit_config(d, num_hidden_layers=4, first_k_dense_replace=1),
        "lacks model.layers.3.",
    ),
    "more layers, no MTP": (
        lambda d: edit_config(d, num_hidden_layers=4, num_nextn_predict_layers=0),
        "lacks model.layers.3.",
    ),
    "fewer layers, no MTP": (
        lambda d: edit_config(d, num_hidden_layers=1, num_nextn_predict_layers=0),
        "layers.1.",
    ),
    "more MTP layers": (
        lambda d: edit_config(d, num_nextn_predict_layers=2),
        "lacks model.layers.3.",
    ),
    "layers beyond counting": (
        lambda d: edit_config(d, num_hidden_layers=9_999, num_nextn_predict_layers=0),
        "describes 9999 layers",
    ),
    "experts beyond counting": (lambda d: edit_config(d, n_routed_experts=2**40), "1099511627776"),
    "sizes beyond counting": (
        lambda d: edit_config(d, hidden_size=2**62),
        "must be at most 1000000",
    ),
    "sizes beyond machines": (
        lambda d: edit_config(d, hidden_size=2**70),
        "must be at most 1000000",
    ),
}


def swap(directory: Path) -> None:
    index = json.loads((directory / INDEX_FILE).read_text())
    names = sorted(set(index["weight_map"].values()))
    index["weight_map"] = {
        t: names[1 - names.index(place)] for t, place in index["weight_map"].items()
    }
    write_index(directory, index)


def twice(directory: Path) -> None:
    first, second = sorted(directory.glob("model-*"))
    save_file(tensors_in(first) | {next(iter(tensors_in(second))): torch.zeros(2)}, first)


def move_and_link(directory: Path, place: Path, name: str = SINGLE_FILE) -> None:
    (directory / name).rename(place)
    (directory / name).symlink_to(place)


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
    """Save with transformers, with its sharding, config and names; load here."""
    model = random_model(tiny(q_lora_rank=6), 2)
    save_pretrained(model, tmp_path / "ours")
    reference = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    again = load_pretrained(tmp_path / "theirs")
    assert same(model, again) and again.config.rope_scaling is None
    assert again.config.model_dump(exclude={"num_nextn_predict_layers"}) == model.config.model_dump(
        exclude={"num_nextn_predict_layers"}
    )


def test_yarn_from_transformers(random_model, tiny, tmp_path) -> None:
    from xushi.model import RopeScaling

    scaling = RopeScaling(
        factor=4.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=1.0
    )
    model = random_model(tiny(rope_scaling=scaling, rope_theta=500.0), 3)
    save_pretrained(model, tmp_path / "ours")
    DeepseekV3ForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).save_pretrained(
        tmp_path / "theirs"
    )
    again = load_pretrained(tmp_path / "theirs")
    assert again.config.rope_scaling == scaling and again.config.rope_theta == 500.0
    tokens = torch.arange(20)[None]
    assert torch.equal(model(tokens).logits, again(tokens).logits)


def test_tied_embeddings(random_model, tiny, tmp_path) -> None:
    model = random_model(tiny(tie_word_embeddings=True, num_nextn_predict_layers=1), 4)
    save_pretrained(model, tmp_path)
    assert "lm_head.weight" not in tensors_in(tmp_path / SINGLE_FILE)
    again = load_pretrained(tmp_path)
    assert (
        again.lm_head is None
        and again.head_VD is again.model.embed_tokens.weight
        and same(model, again)
    )
    tokens = torch.arange(9)[None]
    torch.nn.functional.cross_entropy(again(tokens).logits[0], tokens[0]).backward()
    assert again.model.embed_tokens.weight.grad is not None


def test_mtp_copies_of_the_shared_tensors_may_be_absent(saved: Path) -> None:
    """Published MTP layers carry copies of embedding and head; some exports leave them out."""
    whole = load_pretrained(saved)
    change(
        saved,
        **{
            "model.layers.2.embed_tokens.weight": None,
            "model.layers.2.shared_head.head.weight": None,
        },
    )
    assert same(whole, load_pretrained(saved))


def test_bfloat16_keeps_the_router_biases_in_float32(saved: Path) -> None:
    exact, model = load_pretrained(saved), load_pretrained(saved, dtype=torch.bfloat16)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    for name, router in model.routers().items():
        assert router.e_score_correction_bias.dtype == torch.float32
        assert torch.equal(
            router.e_score_correction_bias, exact.routers()[name].e_score_correction_bias
        )
    assert model.angles.frequencies.dtype == torch.float32
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, exact.get_parameter(name).bfloat16()), name


@pytest.mark.parametrize("mtp", [0, 1, 3])
@pytest.mark.parametrize("kind", ["deepseek_v3", "deepseek_v4"])
def test_mtp_layers_at_any_depth(kind: str, mtp: int, random_model, tiny_of, tmp_path) -> None:
    model = some_model(random_model, tiny_of, kind, mtp)
    save_pretrained(model, tmp_path)
    prefix = "mtp.{}.enorm.weight" if kind == "deepseek_v4" else "model.layers.{}.enorm.weight"
    first = 0 if kind == "deepseek_v4" else 3
    written = {name for name in tensors_in(tmp_path / SINGLE_FILE) if name.endswith("enorm.weight")}
    assert written == {prefix.format(first + depth) for depth in range(mtp)}
    assert same(model, load_pretrained(tmp_path))


def test_v4s_mtp_tensors_stay_unread_where_the_config_asks_for_none(
    random_model, tiny_of, tmp_path
) -> None:
    """Newer releases have another kind of draft model there; transformers ignores the same names."""
    save_pretrained(some_model(random_model, tiny_of, "deepseek_v4", 1), tmp_path)
    change(tmp_path, **{"mtp.0.main_proj.weight": torch.zeros(3, 3)})
    with pytest.raises(XushiError, match="main_proj"):
        load_pretrained(tmp_path)
    edit_config(tmp_path, num_nextn_predict_layers=0)
    assert not load_pretrained(tmp_path).mtp_layers


@pytest.mark.parametrize(
    ("kind", "copies"),
    [
        (
            "deepseek_v3",
            ("model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight"),
        ),
        ("deepseek_v4", ("mtp.0.emb.tok_emb.weight", "mtp.0.head.weight")),
        ("deepseek_v4", ("mtp.0.embed.weight", "mtp.0.head.weight")),
    ],
)
def test_the_trunks_embedding_and_head_are_used(
    kind: str, copies: tuple, random_model, tiny_of, tmp_path
) -> None:
    """A fine-tuned trunk and an MTP layer's stale copies, in either order in the file."""
    model = some_model(random_model, tiny_of, kind, 1)
    save_pretrained(model, tmp_path)
    change(tmp_path, **{name: torch.zeros(50, 24) for name in copies})
    assert same(model, load_pretrained(tmp_path))
    change(tmp_path, **{copies[0]: torch.zeros(50, 23)})
    with pytest.raises(XushiError, match="asks for"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_tables_of_experts(dtype: torch.dtype, random_model, tiny_of, tmp_path) -> None:
    """V4's hash layers: integers in memory and on disk, each of which must be an expert."""
    model = some_model(random_model, tiny_of, "deepseek_v4", 0)
    save_pretrained(model, tmp_path)
    name, table = "layers.0.ffn.gate.tid2eid", model.routers()["0"].tid2eid
    assert tensors_in(tmp_path / SINGLE_FILE)[name].dtype == torch.int64
    change(tmp_path, **{name: table.to(dtype)})
    again = load_pretrained(tmp_path, dtype=torch.bfloat16).routers()["0"].tid2eid
    assert again.dtype == torch.int64 and torch.equal(again, table)
    for wrong in (-1, 8, 2**31 - 1):
        change(tmp_path, **{name: table.clone().index_fill_(0, torch.tensor([7]), wrong).to(dtype)})
        with pytest.raises(XushiError, match="n_routed_experts=8") as error:
            load_pretrained(tmp_path)
        assert name in error.value.problem
    for tensor in (table.float(), table[:, :1], table.to(torch.int8)):
        change(tmp_path, **{name: tensor.contiguous()})
        with pytest.raises(XushiError, match="tid2eid"):
            load_pretrained(tmp_path)


def test_links_within_the_directory_are_followed(saved: Path) -> None:
    whole = load_pretrained(saved)
    (saved / "blobs").mkdir()
    move_and_link(saved, saved / "blobs" / "7f3a")
    linked = saved.parent / f"{saved.name}-linked"
    linked.symlink_to(saved)
    assert same(whole, load_pretrained(linked))


def test_code_beside_the_weights_is_not_run(saved: Path) -> None:
    """Published V2 and V3 configs name classes in a Python file beside them, which is not run."""
    before = load_pretrained(saved)
    edit_config(saved, auto_map={"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"})
    (saved / "modeling_deepseek.py").write_text("raise SystemExit('run')\n")
    (saved / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch run'\ntR.")
    without = load_pretrained(saved)
    assert (
        same(before, without)
        and "modeling_deepseek" not in sys.modules
        and not Path("run").exists()
    )


@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn])
def test_a_dtype_that_models_are_not_in(dtype: torch.dtype, saved: Path) -> None:
    with pytest.raises(XushiError, match="cannot be loaded as"):
        load_pretrained(saved, dtype=dtype)


def test_more_than_the_machine_has(saved: Path, monkeypatch) -> None:
    small = dataclasses.replace(building.inspect(), memory_total=20_000)
    monkeypatch.setattr(building, "inspect", lambda: small)
    with pytest.raises(XushiError, match="does not fit into memory") as error:
        load_pretrained(saved)
    assert error.value.exit_code == 1 and "20000" in error.value.problem


def test_nothing_is_allocated_for_what_cannot_be_loaded(saved: Path, monkeypatch) -> None:
    monkeypatch.setattr(weights, "allocate", lambda *_: pytest.fail("memory before the checks"))
    for name in (
        "a missing tensor",
        "a wrong shape",
        "a tensor too many",
        "weights in whole numbers",
    ):
        DAMAGE[name][0](saved)
        with pytest.raises(XushiError):
            load_pretrained(saved)


LARGE = dict(
    vocab_size=4096,
    hidden_size=512,
    intermediate_size=512,
    moe_intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=2,
    n_routed_experts=14,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=0,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_nope_head_dim=4,
    qk_rope_head_dim=4,
    v_head_dim=8,
    num_nextn_predict_layers=0,
)
MEMORY = """
import sys, torch
from xushi.base.machine import peak_memory_bytes
from xushi.model import load_pretrained, save_pretrained

torch.set_num_threads(1)
save_pretrained(load_pretrained(sys.argv[1], dtype=torch.bfloat16), sys.argv[1] + "/again")  # loads PyTorch's own parts
before = peak_memory_bytes()
model = load_pretrained(sys.argv[2], dtype=torch.bfloat16)
loaded = peak_memory_bytes()
save_pretrained(model, sys.argv[2] + "/again")
print(sum(tensor.nbytes for tensor in model.state_dict().values()), loaded - before, peak_memory_bytes() - loaded)
"""


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the kernel's own high-water mark is read"
)
@pytest.mark.slow
def test_memory_is_the_model_and_little_more(saved: Path, tmp_path_factory) -> None:
    """Loads 29 MiB of bfloat16 from 58 MiB of float32 in shards of 4 MiB. Neither all shards nor a
    float32 model is ever in memory.
    """
    large = tmp_path_factory.mktemp("large")
    # The weights are uninitialised memory.
    save_pretrained(Deepseek(ModelConfig(**LARGE)), large, shard_bytes=4 * 2**20)
    assert len(list(large.glob("model-*.safetensors"))) > 10
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(saved), str(large)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    size, loading, saving = map(int, done.stdout.split())
    assert size > 28 * 2**20
    assert loading < size + 4 * 2**20 + 10 * 2**20, (
        "the model, a shard, and what the heap leaves unused"
    )
    assert saving < 14 * 2**20
