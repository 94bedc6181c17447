"""A random tiny model with a tokenizer, for what is measured with a model."""

import pytest
import torch

from xushi.model import Deepseek, ModelConfig
from xushi.tokenizer import Tokenizer
from xushi.tokenizer.config import SMALLEST_VOCABULARY

TINY = ModelConfig(
    vocab_size=SMALLEST_VOCABULARY,
    hidden_size=16,
    intermediate_size=24,
    moe_intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    first_k_dense_replace=1,
    q_lora_rank=None,
    kv_lora_rank=8,
    qk_nope_head_dim=4,
    qk_rope_head_dim=4,
    v_head_dim=4,
    max_position_embeddings=64,
    num_nextn_predict_layers=1,
    initializer_range=0.5,
)


@pytest.fixture(scope="session")
def model() -> Deepseek:
    return Deepseek(TINY).initialise(3)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["0123456789"], SMALLEST_VOCABULARY)


@pytest.fixture
def exact(model):
    """Log-probabilities [T - 1] of one document's tokens but the first, each after all before it,
    with the softmax in float64 over the whole vocabulary.
    """

    def log_probabilities(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            logits = model(torch.tensor([ids[:-1]])).logits[0].double()
        return (logits - logits.exp().sum(-1, keepdim=True).log()).gather(
            1, torch.tensor(ids[1:])[:, None]
        )[:, 0]

    return log_probabilities
