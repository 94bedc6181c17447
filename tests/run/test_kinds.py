"""The whole chain with the other architectures in the recipe: trained, reinforced, exported, loaded
by transformers.
"""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from xushi.engine import LLM, SamplingParams
from xushi.model import load_pretrained

from .conftest import MINIATURE, read_results, xushi

disable_progress_bar()

COMMON = """
hidden_size = 64
moe_intermediate_size = 32
num_hidden_layers = 3
num_attention_heads = 2
n_routed_experts = 8
num_experts_per_tok = 2
routed_scaling_factor = 1.0
q_lora_rank = 32
qk_rope_head_dim = 16
max_position_embeddings = 64
initializer_range = 0.05
"""
LATENTS = """
intermediate_size = 128
n_group = 2
topk_group = 1
first_k_dense_replace = 1
kv_lora_rank = 32
qk_nope_head_dim = 16
v_head_dim = 24
"""
MODELS = {
    "v2": COMMON
    + LATENTS
    + """
model_type = "deepseek_v2"
topk_method = "group_limited_greedy"
norm_topk_prob = false
""",
    "v3.2": COMMON
    + LATENTS
    + """
model_type = "deepseek_v32"
index_topk = 8
index_n_heads = 2
index_head_dim = 16
num_nextn_predict_layers = 1
""",
    "v4": COMMON
    + """
model_type = "deepseek_v4"
head_dim = 32
o_groups = 2
o_lora_rank = 16
sliding_window = 8
compress_ratios = [0, 4, 16, 4]
compress_rate_hca = 16
index_topk = 4
index_n_heads = 2
index_head_dim = 16
hc_mult = 2
num_hash_layers = 1
num_nextn_predict_layers = 1
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_the_chain(kind: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    text = re.sub(
        r"\[model\]\n.*?\n\n",
        f"[model]{MODELS[kind]}\n",
        MINIATURE.read_text(encoding="utf-8"),
        flags=re.S,
    )
    recipe.write_text(text, encoding="utf-8")
    sets = ["pretrain.steps=30", "sft.steps=6", "rl.steps=2", "evaluate.tasks=8"]
    if kind != "v2":
        sets.append("pretrain.indexer_warmup_steps=5")
    done = xushi(
        "run",
        recipe,
        "--out",
        tmp_path / "run",
        *(part for each in sets for part in ("--set", each)),
    )
    assert done.returncode == 0, done.stderr
    results = read_results(tmp_path / "run")
    assert results["export.max_logit_difference"] == 0.0
    # An untrained model needs log2(512) bits per token, about 4.6 bits per byte here.
    assert results["evaluate.bits_per_byte"] < 4.4
    assert results["rl.max_logprob_difference"] < 1e-4  # decoding is the whole forward
    path = tmp_path / "run" / "export" / "reasoning"
    theirs = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    # Up to eight tokens V3.2's indexer leaves nothing out, and up to nineteen V4's: no tie can fall
    # differently.
    tokens = torch.arange(8 if kind == "v3.2" else 19)[None]
    with torch.no_grad():
        expected, got = theirs(tokens).logits, load_pretrained(path)(tokens).logits
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    answer = LLM(path).chat(
        [{"role": "user", "content": "123"}], SamplingParams(max_tokens=10, temperature=0)
    )
    assert answer.token_ids
