"""Saving checkpoints: transformers loads them, bits survive, and kills and full disks do no harm."""

import errno
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4PreTrainedModel

from xushi.base.errors import XushiError
from xushi.model import load_pretrained, save_pretrained
from xushi.model import saving as module
from xushi.model.shards import INDEX_FILE, SINGLE_FILE

from .conftest import same, some_model, tensors_in
from .drawing import KINDS


def test_bfloat16_round_trip(saved: Path, tmp_path) -> None:
    model = load_pretrained(saved, dtype=torch.bfloat16)
    save_pretrained(model, tmp_path / "half")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    tensors = tensors_in(tmp_path / "half" / SINGLE_FILE)
    assert {
        str(t.dtype) for name, t in tensors.items() if not name.endswith("correction_bias")
    } == {"torch.bfloat16"}
    assert all(
        t.dtype == torch.float32 for name, t in tensors.items() if name.endswith("correction_bias")
    )
    assert same(model, load_pretrained(tmp_path / "half", dtype=torch.bfloat16))


def test_published_names_and_shapes(saved: Path) -> None:
    """One matrix per expert and name; the MTP layer after the decoder layers, with four tensors of
    its own and two copies.
    """
    tensors = tensors_in(saved / SINGLE_FILE)
    assert tensors["model.layers.1.mlp.experts.7.gate_proj.weight"].shape == (8, 24)
    assert tensors["model.layers.1.mlp.experts.7.down_proj.weight"].shape == (24, 8)
    assert not any("gate_up" in name for name in tensors)
    own = {
        "enorm.weight",
        "hnorm.weight",
        "eh_proj.weight",
        "shared_head.norm.weight",
        "shared_head.head.weight",
        "embed_tokens.weight",
    }
    assert own <= {name.removeprefix("model.layers.2.") for name in tensors}
    assert torch.equal(
        tensors["model.layers.2.embed_tokens.weight"], tensors["model.embed_tokens.weight"]
    )
    assert torch.equal(tensors["model.layers.2.shared_head.head.weight"], tensors["lm_head.weight"])


@pytest.mark.parametrize("mtp", [True, False])
@pytest.mark.parametrize(
    ("kind", "names"), [*((kind, "published") for kind in KINDS), ("deepseek_v4", "transformers")]
)
def test_transformers_loads_it(
    kind: str, names: str, mtp: bool, random_model, tiny_of, tmp_path, monkeypatch
) -> None:
    """No tensor is missing, none is unused except those of MTP layers, and logits are equal."""
    # By default transformers ignores mtp.*.
    monkeypatch.setattr(DeepseekV4PreTrainedModel, "_keys_to_ignore_on_load_unexpected", None)
    model = some_model(random_model, tiny_of, kind)
    save_pretrained(model, tmp_path, mtp=mtp, names=names)
    reference, report = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not report["missing_keys"] and not report["mismatched_keys"]
    prefix = "mtp." if kind == "deepseek_v4" else "model.layers."
    depths = {key.removeprefix(prefix).partition(".")[0] for key in report["unexpected_keys"]}
    assert all(key.startswith(prefix) for key in report["unexpected_keys"])
    expected_depths = {"deepseek_v2": set(), "deepseek_v4": {"0", "1"}}.get(kind, {"3", "4"})
    assert depths == (expected_depths if mtp else set())
    tokens = torch.randint(0, 50, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference.eval()(tokens).logits
        for ours in (model, load_pretrained(tmp_path)):
            assert (ours(tokens).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    table = json.loads((tmp_path / "config.json").read_text())
    if kind == "deepseek_v4":
        assert table["num_nextn_predict_layers"] == (2 if mtp else 0)
        assert table["compress_ratios"] == ([0, 2, 3, 2, 0] if mtp else [0, 2, 3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("kind", "names"), [*((kind, "published") for kind in KINDS), ("deepseek_v4", "transformers")]
)
def test_save_load_save_is_bit_identical(
    kind: str, names: str, dtype: torch.dtype, random_model, tiny_of, tmp_path
) -> None:
    save_pretrained(some_model(random_model, tiny_of, kind), tmp_path / "exact", names=names)
    model = load_pretrained(tmp_path / "exact", dtype=dtype)
    save_pretrained(model, tmp_path / "a", names=names)
    again = load_pretrained(tmp_path / "a", dtype=dtype)
    save_pretrained(again, tmp_path / "b", names=names, shard_bytes=9000)
    save_pretrained(load_pretrained(tmp_path / "b", dtype=dtype), tmp_path / "c", names=names)
    assert same(model, again)
    for file in ("config.json", SINGLE_FILE):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "c" / file).read_bytes()


def test_shards_on_the_way_out(random_model, tiny_of, tmp_path) -> None:
    model = some_model(random_model, tiny_of, "deepseek_v4")
    save_pretrained(model, tmp_path / "whole")
    save_pretrained(model, tmp_path / "parts", shard_bytes=5000)
    index = json.loads((tmp_path / "parts" / INDEX_FILE).read_text())
    files = sorted(path.name for path in (tmp_path / "parts").glob("*.safetensors"))
    assert len(files) > 10 and set(index["weight_map"].values()) == set(files)
    assert files[1] == f"model-00002-of-{len(files):05}.safetensors"
    together = {}
    for name in files:
        shard_of = tensors_in(tmp_path / "parts" / name)
        assert sum(t.nbytes for t in shard_of.values()) <= 5000 or len(shard_of) == 1
        assert all(index["weight_map"][tensor] == name for tensor in shard_of)
        together |= shard_of
    whole = tensors_in(tmp_path / "whole" / SINGLE_FILE)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    assert together.keys() == whole.keys() and all(
        torch.equal(together[name], whole[name]) for name in whole
    )
    assert not (tmp_path / "parts" / SINGLE_FILE).exists()


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_an_older_checkpoint_is_replaced_whole(random_model, tiny, tmp_path) -> None:
    """Shards replaced by one file and back; other files in the directory, a tokenizer, stay."""
    old, new = (random_model(tiny(num_nextn_predict_layers=1), seed) for seed in (1, 2))
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "tokenizer.json").write_text("{}")
    for model, size in ((old, 9000), (new, 2**30), (old, 4000), (new, 20000)):
        save_pretrained(model, tmp_path / "here", shard_bytes=size)
        save_pretrained(model, tmp_path / "fresh" / str(size), shard_bytes=size)
        assert contents(tmp_path / "here") == contents(tmp_path / "fresh" / str(size)) | {
            "tokenizer.json": b"{}"
        }
        assert same(model, load_pretrained(tmp_path / "here"))


def test_every_tensor_is_aligned_to_its_own_width(random_model, tiny_of, tmp_path) -> None:
    """Readers that map the file need alignment: int64 tables and float32 norms among bfloat16
    matrices of odd sizes.
    """
    config = tiny_of("deepseek_v4", hidden_size=25, moe_intermediate_size=7, vocab_size=49)
    save_pretrained(random_model(config, 1), tmp_path / "exact")
    save_pretrained(load_pretrained(tmp_path / "exact", dtype=torch.bfloat16), tmp_path / "half")
    raw = (tmp_path / "half" / SINGLE_FILE).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
    assert {entry["dtype"] for entry in header.values()} == {"I64", "F32", "BF16"}
    widths = {"I64": 8, "F32": 4, "BF16": 2}
    assert all(entry["data_offsets"][0] % widths[entry["dtype"]] == 0 for entry in header.values())


class Killed(BaseException):
    """Simulates a kill of the process."""


@pytest.mark.parametrize("sizes", [(2**30, 30000), (30000, 2**30), (20000, 30000)])
def test_a_kill_at_any_step_leaves_the_old_or_the_new(
    sizes: tuple, random_model, tiny, tmp_path, monkeypatch
) -> None:
    """Neither a mixture, which equal shapes cannot reveal, nor none. What loads stays, whatever is
    killed again on the way, and the next save does not lose it either.
    """
    old, new = (random_model(tiny(num_nextn_predict_layers=1), seed) for seed in (1, 2))
    steps = {"unlink": Path.unlink, "replace": os.replace, "rmdir": Path.rmdir}
    seen = set()
    for last in range(1000):
        place, count = tmp_path / str(last), 0
        save_pretrained(old, place, shard_bytes=sizes[0])
        before = set(os.listdir(place))

        def counted(step: Callable) -> Callable:
            def do(*arguments, **named):
                nonlocal count
                if count >= last:  # noqa: B023
                    raise Killed
                count += 1
                return step(*arguments, **named)

            return do

        def killed(run: Callable[[], object]) -> bool:
            nonlocal count
            count = 0
            with monkeypatch.context() as patch:
                patch.setattr(Path, "unlink", counted(steps["unlink"]))
                patch.setattr(Path, "rmdir", counted(steps["rmdir"]))
                patch.setattr(os, "replace", counted(steps["replace"]))
                try:
                    run()
                except Killed:
                    return True
            return False

        finished = not killed(partial(save_pretrained, new, place, shard_bytes=sizes[1]))
        if (place / "config.json").exists():  # other readers take what they see for whole
            moving = place / ".saving.moving"
            assert not moving.exists() or os.listdir(moving) == []
            assert not (place / module.COMPLETE).exists() or before <= set(os.listdir(place))
        if last % 2:
            killed(partial(load_pretrained, place))
        model = load_pretrained(place)
        seen.add("old" if same(model, old) else "new")
        assert same(model, old) or same(model, new)
        assert [path for path in place.iterdir() if path.name.startswith(".saving.c")] == []
        if finished:
            break
    assert finished and same(model, new) and seen == {"old", "new"}


@pytest.mark.parametrize("place", ["the first shard", "the last", "config.json"])
def test_a_full_disk_leaves_the_old_checkpoint(
    place: str, saved: Path, random_model, tiny, monkeypatch
) -> None:
    before, write, write_json, shards = contents(saved), module.write_shard, module.write_json, []

    def full(file: Path, content: object) -> None:
        shards.append(file)
        if (place == "config.json") == (file.name == "config.json") and (
            place != "the last" or len(shards) == 3
        ):
            file.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        (write if file.suffix == ".safetensors" else write_json)(file, content)

    monkeypatch.setattr(module, "write_shard", full)
    monkeypatch.setattr(module, "write_json", full)
    with pytest.raises(XushiError, match="no space left") as error:
        save_pretrained(random_model(tiny(num_nextn_predict_layers=1), 2), saved, shard_bytes=9000)
    assert error.value.exit_code == 1 and shards
    assert contents(saved) == before


def test_what_a_kill_left_aside_is_no_checkpoint_and_goes(saved: Path) -> None:
    model, before = load_pretrained(saved), contents(saved)
    (saved / ".saving.partial").mkdir()
    (saved / ".saving.partial" / "model-00001-of-00009.safetensors").write_bytes(b"half")
    assert same(model, load_pretrained(saved))
    save_pretrained(model, saved)
    assert contents(saved) == before


def test_names_that_nobody_writes(random_model, tiny, tmp_path) -> None:
    with pytest.raises(XushiError, match="'gguf'") as error:
        save_pretrained(random_model(tiny(), 1), tmp_path / "new", names="gguf")
    assert "published, transformers" in error.value.remedy and not (tmp_path / "new").exists()


@pytest.mark.parametrize("way", ["file", "directory"])
def test_a_place_that_is_taken(way: str, random_model, tiny, tmp_path) -> None:
    (tmp_path / "taken").mkdir()
    taken = tmp_path / "taken" / SINGLE_FILE
    taken.write_text("") if way == "file" else taken.mkdir()
    with pytest.raises(XushiError, match="cannot be written"):
        save_pretrained(random_model(tiny(), 1), taken if way == "file" else tmp_path / "taken")
