"""The tensors of a GGUF file: a model's weights under llama.cpp's names and in its layout.

Axes: H head, K query or key width, R its rotated part, C latent rank, V value width, D the width
that a matrix reads.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from xushi.model.config import ModelConfig
from xushi.model.deepseek import Deepseek


def gguf_tensors(model: Deepseek) -> Iterator[tuple[str, Tensor]]:
    """(llama.cpp's name, tensor) of every tensor but the MTP layers', in the model's dtype.

    Experts stay stacked. The expansion of the latent becomes two tensors, for keys [H, C, K - R]
    and for values [H, V, C]: llama.cpp multiplies queries by the first and the attention's result
    by the second.
    """
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, model.config.num_hidden_layers)
    for published, tensor in _in_published_terms(model):
        name = names.get_name(published, try_suffixes=(".weight", ".bias"))
        assert name is not None, published
        yield name, tensor


def _in_published_terms(model: Deepseek) -> Iterator[tuple[str, Tensor]]:
    """The tensors in llama.cpp's layout, under the published names that gguf's table maps."""
    config = model.config
    for name, tensor in model.state_dict().items():
        if name.startswith("model.layers.") and int(name.split(".")[2]) >= config.num_hidden_layers:
            continue
        place, _, part = name.removesuffix(".weight").rpartition(".")
        if part == "gate_up_proj":
            gate, up = tensor.chunk(2, dim=1)
            yield f"{place}.gate_proj.weight", gate
            yield f"{place}.up_proj.weight", up
        elif part == "down_proj" and place.endswith(".experts"):
            yield f"{name}.weight", tensor
        elif part == "e_score_correction_bias":
            yield f"{place}.e_score_correction.bias", tensor
        elif part == "kv_b_proj":
            both = tensor.reshape(config.num_attention_heads, -1, config.kv_lora_rank)
            keys_HKC, values_HVC = torch.split(
                both, [config.qk_nope_head_dim, config.v_head_dim], dim=1
            )
            yield f"{place}.k_b_proj.weight", keys_HKC.transpose(1, 2)
            yield f"{place}.v_b_proj.weight", values_HVC
        elif part in ("q_proj", "q_b_proj", "kv_a_proj_with_mqa") and not config.rope_interleave:
            heads = 1 if part.startswith("kv") else config.num_attention_heads
            yield name, _rotated_rows_in_pairs(tensor, config, heads)
        else:
            yield name, tensor


def _rotated_rows_in_pairs(matrix: Tensor, config: ModelConfig, heads: int) -> Tensor:
    """Reorder each head's last R rows from pairs (i, i + R/2), as in checkpoints without
    `rope_interleave`, to pairs (0, 1), (2, 3), ..., as llama.cpp rotates them. Reordering queries
    and keys alike does not change the scores.
    """
    rotated = config.qk_rope_head_dim
    rows_HKD = matrix.reshape(heads, -1, matrix.shape[-1])
    plain_HKD, rope_HRD = torch.split(rows_HKD, [rows_HKD.shape[1] - rotated, rotated], dim=1)
    pairs_HRD = rope_HRD.reshape(heads, 2, rotated // 2, -1).transpose(1, 2).flatten(1, 2)
    return torch.cat((plain_HKD, pairs_HRD), dim=1).flatten(0, 1)
