"""Random models for the tests of the model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from xushi.model import Deepseek, ModelConfig, RopeScaling, save_pretrained
from xushi.tokenizer import Tokenizer

from ..tiny import TINY_V4
from .gguf_models import TEXT, WIDE, Make


def tensors_in(file: Path) -> dict[str, Tensor]:
    """A file's tensors, copied, so that the file can be overwritten."""
    return {name: tensor.clone() for name, tensor in load_file(file).items()}


def same(first: Deepseek, second: Deepseek) -> bool:
    """Whether two models have the same tensors, bit by bit."""
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="session")
def random_model() -> Callable[[ModelConfig, int], Deepseek]:
    """A model in which everything is random, norms, biases and router biases too, so that no
    missing term is hidden by a zero or a one.
    """

    def make(config: ModelConfig, seed: int) -> Deepseek:
        model = Deepseek(config).initialise(seed)
        stream = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1 or name.endswith("bias"):
                    parameter.add_(torch.randn(parameter.shape, generator=stream) * 0.3)
            for router in model.routers().values():
                if router.e_score_correction_bias is None:
                    continue
                router.e_score_correction_bias.copy_(
                    torch.randn(config.n_routed_experts, generator=stream) * 0.2
                )
        return model

    return make


def some_model(random_model, tiny_of, kind: str, mtp: int = 2, **changes: object) -> Deepseek:
    """The indexer chooses all keys, since transformers does not define how ties are broken."""
    topk = {"index_topk": 64} if kind in ("deepseek_v32", "deepseek_v4") else {}
    changes = topk | changes | ({} if kind == "deepseek_v2" else {"num_nextn_predict_layers": mtp})
    return random_model(tiny_of(kind, **changes), 5)


@pytest.fixture(scope="session")
def tiny_of() -> Callable[..., ModelConfig]:
    """A small config of a model_type with every part active; keywords replace fields."""

    def make(kind: str, **changes: object) -> ModelConfig:
        fields: dict[str, object] = {
            "model_type": kind,
            "vocab_size": 50,
            "hidden_size": 24,
            "moe_intermediate_size": 8,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "q_lora_rank": 6,
            "qk_rope_head_dim": 4,
            "num_nextn_predict_layers": 0,
            "max_position_embeddings": 64,
            "initializer_range": 0.2,
        }
        if kind == "deepseek_v4":
            fields |= TINY_V4 | {
                "rope_scaling": RopeScaling(factor=4.0, original_max_position_embeddings=16)
            }
        else:
            fields |= {
                "intermediate_size": 32,
                "n_group": 2,
                "topk_group": 1,
                "first_k_dense_replace": 1,
                "kv_lora_rank": 8,
                "qk_nope_head_dim": 4,
                "v_head_dim": 8,
            }
        if kind == "deepseek_v32":
            fields |= {"index_topk": 4, "index_n_heads": 2, "index_head_dim": 6}
        if kind == "deepseek_v2":
            fields |= {"topk_method": "group_limited_greedy", "norm_topk_prob": False}
        fields |= changes
        if kind == "deepseek_v4" and "compress_ratios" not in changes:
            fields["compress_ratios"] = [
                *[0, 2, 3][: fields["num_hidden_layers"]],
                *[2, 0, 3][: fields["num_nextn_predict_layers"]],
            ]
        return ModelConfig(**fields)

    return make


@pytest.fixture(scope="session")
def tiny(tiny_of) -> Callable[..., ModelConfig]:
    """`tiny_of` V3 with two layers, a dense one first, and without a query latent."""

    def make(**changes: object) -> ModelConfig:
        return tiny_of("deepseek_v3", **{"num_hidden_layers": 2, "q_lora_rank": None} | changes)

    return make


@pytest.fixture
def saved(random_model, tiny, tmp_path) -> Path:
    """The directory of a small V3 with an MTP layer."""
    save_pretrained(random_model(tiny(num_nextn_predict_layers=1), 1), tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A small tokenizer trained on Python source, which every installation has."""
    return Tokenizer.train([TEXT], 290)


@pytest.fixture
def directory(random_model, tiny, tokenizer, tmp_path) -> Make:
    """A function that makes an export directory of a random model with changed fields of `tiny`."""

    def make(**changes: Any) -> Path:
        place = tmp_path / "model"
        save_pretrained(random_model(tiny(**(WIDE | changes)), 3), place)
        tokenizer.save(place)
        return place

    return make
