import pytest

from xushi.model import Deepseek, ModelConfig, save_pretrained
from xushi.tokenizer import Tokenizer

TINY = ModelConfig(
    vocab_size=272,
    hidden_size=16,
    intermediate_size=24,
    moe_intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    n_shared_experts=1,
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
    num_nextn_predict_layers=0,
    initializer_range=0.5,
)


@pytest.fixture(scope="session")
def model() -> Deepseek:
    return Deepseek(TINY).initialise(3)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["数字之和是多少？数字之和是九。数字" * 3], 272)


@pytest.fixture(scope="session")
def export(model, tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("export")
    save_pretrained(model, directory)
    tokenizer.save(directory)
    return directory
