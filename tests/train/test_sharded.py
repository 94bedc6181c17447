"""The model with its parameters sharded over two processes (FSDP2, gloo): every op on gathered parameters, compiled
forms with it, gives the gradients of one process, and a checkpoint of either opens in the other.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from xushi.model import Deepseek, pretraining_loss
from xushi.ops import native
from xushi.train.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint

WORKER = '''
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from tests.train.test_sharded import batch, gradients, small_model
from xushi.train.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint

rank, directory = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", store=dist.FileStore(str(directory / "store"), 2), rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
model = small_model(seed=1)
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
    if hasattr(layer, "predict"):
        register_fsdp_forward_method(layer, "predict")
fully_shard(model, mesh=mesh)
register_fsdp_forward_method(model, "hidden")
whole = StateDictOptions(full_state_dict=True)
# What one process wrote opens here, and what is written here is whole.
set_model_state_dict(model, latest_checkpoint(directory / "alone").tensors["model"], options=whole)
mine = {name: tensor[rank:rank + 1] for name, tensor in batch().items()}
found = {name: gradient.full_tensor() for name, gradient in gradients(model, mine).items()}
sharded = {name for name, parameter in model.named_parameters()
           if parameter.to_local().numel() < parameter.numel()}
state = get_model_state_dict(model, options=whole)
if rank == 0:
    torch.save({"gradients": found, "sharded": sharded}, directory / "found.pt")
    save_checkpoint(directory / "together", Checkpoint(7, {"model": state}, {}))
dist.barrier()
dist.destroy_process_group()
'''


def small_model(seed: int) -> Deepseek:
    """V3 with an MTP layer; its rows are long enough for the compiled forms."""
    from xushi.model import ModelConfig
    return Deepseek(ModelConfig(
        vocab_size=80, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
        num_nextn_predict_layers=1, max_position_embeddings=64, initializer_range=0.2)).initialise(seed)


def batch() -> dict[str, torch.Tensor]:
    """Two rows of one document each, a row for each process."""
    tokens = torch.randint(0, 80, (2, 48), generator=torch.Generator().manual_seed(3))
    return {"tokens": tokens, "targets": tokens.roll(-1, 1), "positions": torch.arange(48).expand(2, 48),
            "segments": torch.zeros_like(tokens), "loss_mask": torch.ones_like(tokens, dtype=torch.bool)}


def gradients(model: Deepseek, rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of everything pretraining has."""
    pretraining_loss(model, rows, mtp_weight=0.3, balance_weight=0.01).total.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("form", ["compiled", "pytorch"])
def test_two_processes_have_the_gradients_and_checkpoints_of_one(form: str, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    if form == "pytorch":
        monkeypatch.setenv("XUSHI_OPS", "pytorch")
    elif native.load() is None:
        pytest.skip(native.status())
    alone = small_model(seed=2)
    save_checkpoint(tmp_path / "alone", Checkpoint(3, {"model": alone.state_dict()}, {}))
    root = Path(__file__).parent.parent.parent
    processes = [subprocess.Popen([sys.executable, "-c", WORKER, str(rank), str(tmp_path)], cwd=root,
                                  stderr=subprocess.PIPE, text=True) for rank in range(2)]
    for process in processes:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said[-3000:]
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    wanted = gradients(alone, batch())
    assert found["sharded"] == {name for name, _ in alone.named_parameters()}
    # The two rows' sums are added in another order: a few roundings of the whole gradient.
    whole = torch.stack([g.norm() for g in wanted.values()]).norm()
    assert found["gradients"].keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (found["gradients"][name] - gradient).norm() <= 2.0**-20 * (gradient.norm() + 0.01 * whole), name
    together = latest_checkpoint(tmp_path / "together")
    again = small_model(seed=9)
    again.load_state_dict(together.tensors["model"])
    assert together.step == 7
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), alone.state_dict().values(), strict=True))
