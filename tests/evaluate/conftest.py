"""A random tiny model with a tokenizer, for what is measured with a model."""

import pytest
import torch

from xushi.model import Deepseek
from xushi.tokenizer import Tokenizer
from xushi.tokenizer.config import SMALLEST_VOCABULARY

from ..tiny import TINY

SHAPE = TINY.model_copy(
    update={
        "vocab_size": SMALLEST_VOCABULARY,
        "n_group": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.5,
    }
)


@pytest.fixture(scope="session")
def model() -> Deepseek:
    return Deepseek(SHAPE).initialise(3)


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
