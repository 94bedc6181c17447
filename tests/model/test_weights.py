"""Loading checkpoints: every layout gives the same model.

Damaged ones are in test_weights_damage.py.
"""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import DeepseekV3ForCausalLM

from xushi.base.errors import XushiError
from xushi.model import Deepseek, ModelConfig, building, load_pretrained, save_pretrained
from xushi.model.shards import SINGLE_FILE

from .conftest import same, some_model, tensors_in
from .editing import change, edit_config, move_and_link, shard


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
