"""Published config.json tables with small shapes, and transformers as the judge of them."""

import copy
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from xushi.model import Deepseek, from_published, load_pretrained, preset, to_published

logging.set_verbosity_error()  # transformers names the very keys that these tests put in
TABLES = ("deepseek-v2", "deepseek-v2-lite", "deepseek-v3", "deepseek-v3.2", "deepseek-v4-flash")
ONE_OF_EACH = ("deepseek-v2", "deepseek-v3", "deepseek-v3.2", "deepseek-v4-flash")
TOKENS = torch.randint(0, 50, (1, 24), generator=torch.Generator().manual_seed(7))
# float32 logits, relative to the largest: docs/model.md. No selection is near a tie with this seed,
# or the indexer chooses everything.
TOLERANCE = 1e-5
_SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 24,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "qk_rope_head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
_SMALL_V4 = {
    "num_key_value_heads": 1,
    "q_lora_rank": 6,
    "head_dim": 12,
    "o_groups": 2,
    "o_lora_rank": 5,
    "sliding_window": 5,
    "compress_rate_csa": 2,
    "compress_rate_hca": 3,
    "compress_ratios": [0, 2, 3, 0],
    "layer_types": [
        "sliding_attention",
        "compressed_sparse_attention",
        "heavily_compressed_attention",
    ],
    "index_n_heads": 2,
    "index_head_dim": 10,
    "hc_mult": 2,
    "hc_sinkhorn_iters": 3,
    "num_hash_layers": 1,
}
_SMALL_LATENT = {
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}


def small(name: str, **changes: Any) -> dict[str, Any]:
    """The config.json of the published model `name` with small shapes; None removes a key."""
    table = copy.deepcopy(to_published(preset(name)))
    table |= _SMALL | (_SMALL_V4 if "v4" in name else _SMALL_LATENT)
    if table.get("q_lora_rank") is not None:
        table["q_lora_rank"] = 6
    if table.get("n_group", 1) > 1:
        table |= {"n_group": 2, "topk_group": 1}
    if "v3.2" in name:
        table |= {"index_n_heads": 2, "index_head_dim": 10}
    if isinstance(table.get("rope_scaling"), dict):
        table["rope_scaling"]["original_max_position_embeddings"] = 16
    table |= changes
    return {key: value for key, value in table.items() if value is not ...}


def theirs(table: dict[str, Any]) -> PreTrainedModel:
    """transformers' model of a config.json, with random weights: norms and biases too."""
    table = copy.deepcopy(table)
    table.pop("architectures", None)
    if table.get("model_type") == "kimi_k2":
        table["model_type"] = "deepseek_v3"  # as transformers' own Kimi-K2.5 reads it
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**table),
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",  # the other asks for sizes that are multiples of 16 bytes
    ).eval()
    stream = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("tid2eid"):
                ids = torch.rand(len(tensor), model.config.n_routed_experts, generator=stream)
                tensor.copy_(ids.argsort(dim=1)[:, : tensor.shape[1]])
            elif tensor.is_floating_point():
                centre = 1.0 if "norm" in name and tensor.dim() == 1 else 0.0
                tensor.copy_(centre + 0.2 * torch.randn(tensor.shape, generator=stream))
    return model


def rotation(table: dict[str, Any]) -> nn.Module:
    """transformers' module of the angles of a config.json."""
    table = copy.deepcopy(table)  # the config class changes its arguments
    config = AutoConfig.for_model(**{k: v for k, v in table.items() if k != "architectures"})
    family = f"transformers.models.{config.model_type}.modeling_{config.model_type}"
    name = type(config).__name__.replace("Config", "RotaryEmbedding")
    module: nn.Module = getattr(import_module(family), name)(config)
    return module


def ours(table: dict[str, Any], weights: dict[str, Tensor]) -> Deepseek:
    """This package's model of a config.json, without MTP, with the given weights."""
    model = Deepseek(from_published(table, "here/config.json").without_mtp())
    # transformers also lists a tied head, and shared experts of width 0.
    tied = {"lm_head.weight"} if model.lm_head is None else set()
    model.load_state_dict({k: v for k, v in weights.items() if k not in tied and v.numel()})
    return model


def difference(first: Tensor, second: Tensor) -> float:
    """The largest difference relative to the largest value of `first`; NaN equals NaN."""
    if first.isnan().any() or second.isnan().any():
        return 0.0 if torch.equal(first.isnan(), second.isnan()) else float("inf")
    return float((first - second).abs().max() / first.abs().max())


@torch.no_grad()
def judged(table: dict[str, Any]) -> float:
    """How far the logits are from transformers' on the same config and weights."""
    model = theirs(table)
    mine = ours(table, model.state_dict())
    return difference(model(TOKENS).logits, mine(TOKENS).logits)


def saved(table: dict[str, Any], directory: Path, **options: Any) -> PreTrainedModel:
    """A checkpoint of `table` as transformers writes it; options are `save_pretrained`'s."""
    model = theirs(table)
    model.save_pretrained(directory, **options)
    return model


@torch.no_grad()
def loaded_difference(model: PreTrainedModel, directory: Path, **options: Any) -> float:
    """How far the logits of the checkpoint loaded here are from those of transformers' model."""
    mine = load_pretrained(directory, **options)
    return difference(model(TOKENS).logits, mine(TOKENS).logits)
