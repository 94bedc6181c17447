"""The models whose GGUF files the tests read with gguf and with llama.cpp."""

import argparse
import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xushi.model import RopeScaling

# Makes an export directory of a random model with changed fields of `tiny`.
Make = Callable[..., Path]

# Python source that every installation has, to train the tokenizers and the last test's model.
TEXT = "".join(
    Path(module.__file__).read_text(encoding="utf-8") for module in (json, textwrap, argparse)
)

# Rows of 32, 64 and 96 fit Q8_0's blocks; those of 24, 40 and 48 do not.
WIDE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "num_hidden_layers": 3,
    "pad_token_id": 2,
}
V2 = {
    "model_type": "deepseek_v2",
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "n_group": 1,
    "topk_group": 1,
}
YARN = RopeScaling(
    factor=4.0, original_max_position_embeddings=32, mscale=0.707, mscale_all_dim=0.707
)
MODELS: dict[str, dict[str, Any]] = {
    "V3": {"q_lora_rank": 40},
    "V3 without query latent": {"q_lora_rank": None},
    "V3 with halves, YaRN and MTP": {
        "q_lora_rank": 40,
        "rope_interleave": False,
        "rope_scaling": YARN,
        "num_nextn_predict_layers": 1,
    },
    "V3 with halves, without query latent": {"rope_interleave": False},
    "V3 without groups, tied": {
        "n_group": 1,
        "topk_group": 1,
        "tie_word_embeddings": True,
        "norm_topk_prob": False,
    },
    "V2": V2 | {"q_lora_rank": 40, "n_shared_experts": 2, "routed_scaling_factor": 16.0},
    "V2-Lite": V2 | {"q_lora_rank": None, "rope_scaling": YARN},
    "V2 whose groups limit nothing": V2
    | {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 2},
}
