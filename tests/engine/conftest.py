import pytest

from xushi.model import Deepseek, save_pretrained
from xushi.tokenizer import Tokenizer

from ..tiny import TINY

SHAPE = TINY.model_copy(
    update={
        "vocab_size": 272,
        "n_group": 2,
        "max_position_embeddings": 64,
        "num_nextn_predict_layers": 0,
        "initializer_range": 0.5,
    }
)


@pytest.fixture(scope="session")
def model() -> Deepseek:
    return Deepseek(SHAPE).initialise(3)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["数字之和是多少？数字之和是九。数字" * 3], 272)


@pytest.fixture(scope="session")
def export(model, tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("export")
    save_pretrained(model, directory)
    tokenizer.save(directory)
    return directory
