"""Random models for the tests of the model."""

from collections.abc import Callable

import pytest
import torch

from xushi.model import Deepseek, ModelConfig


@pytest.fixture(scope="session")
def random_model() -> Callable[[ModelConfig, int], Deepseek]:
    """A model of random everything: norms, biases and router biases too, so that no term can hide behind a zero or a
    one."""
    def make(config: ModelConfig, seed: int) -> Deepseek:
        model = Deepseek(config).initialise(seed)
        stream = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn(parameter.shape, generator=stream) * 0.3)
            for router in model.routers().values():
                if router.e_score_correction_bias is None:
                    continue
                router.e_score_correction_bias.copy_(torch.randn(config.n_routed_experts, generator=stream) * 0.2)
        return model
    return make


@pytest.fixture(scope="session")
def tiny() -> Callable[..., ModelConfig]:
    """A small config with every kind of block; keywords replace fields."""
    def make(**changes: object) -> ModelConfig:
        fields = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 32, "moe_intermediate_size": 8,
                  "num_hidden_layers": 2, "num_attention_heads": 2, "n_routed_experts": 8, "num_experts_per_tok": 2,
                  "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": None, "kv_lora_rank": 8,
                  "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8, "num_nextn_predict_layers": 0,
                  "max_position_embeddings": 64, "initializer_range": 0.2}
        return ModelConfig(**(fields | changes))
    return make
