"""Damaged checkpoints: every kind of damage is a `XushiError` with a remedy.

Damage at random is in test_weights_fuzz.py.
"""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from xushi.base.errors import XushiError
from xushi.model import load_pretrained, weights
from xushi.model.shards import INDEX_FILE, SINGLE_FILE

from .conftest import tensors_in
from .editing import change, edit_config, move_and_link, shard

NORM = "model.norm.weight"
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


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
