"""A directory in the Hugging Face layout to one GGUF file for llama.cpp: DeepSeek-V2 and V3 in BF16
or Q8_0.

Keys, tensors and their layout are those that llama.cpp's `deepseek2` loader reads
(src/models/deepseek2.cpp and conversion/deepseek.py in llama-cpp-python 0.3.36) and gguf 0.19
names. What that loader would compute otherwise than `xushi.model` does is refused by name. Not
here: other architectures and quantisations; MTP layers, which llama.cpp's own converter leaves out
too.

Axes: H head, K query or key head dimension, R rotated part of it, C latent rank, D whatever a
matrix reads, E expert.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from xushi.base.errors import BadInput, Failed
from xushi.base.files import disk_errors, fsync_path, read_json
from xushi.model.attention import LATENT_NORM_EPS
from xushi.model.config import ModelConfig, RopeScaling
from xushi.model.deepseek import Deepseek
from xushi.model.published import read_config
from xushi.model.weights import load_pretrained

if TYPE_CHECKING:
    import gguf

KINDS = ("bf16", "q8_0")

# llama.cpp knows pre-tokenizers by name only. DeepSeek-V3's differs from ours in two patterns. It
# takes up to three digits together, which changes nothing: no merge of ours joins two. And it draws
# the borders of Chinese and Japanese by code points instead of scripts.
_PRE_TOKENIZER = "deepseek-v3"
_OURS = (r"\p{N}", r"[\p{Han}\p{Hiragana}\p{Katakana}]+")
_PRE_TOKENIZER_NOTE = (
    "the closest that llama.cpp knows; Japanese with 々 and rare characters may split otherwise"
)


def export_gguf(directory: str | Path, path: str | Path, kind: str = "bf16") -> dict[str, Any]:
    """Write the model and tokenizer of `directory` to the new file `path`, with matrices in `kind`
    of `KINDS`.

    Norms, router weights and router biases are float32. A matrix whose rows are no multiple of
    Q8_0's 32 values stays in BF16. Holds the weights once, in float32, and one tensor more. Returns
    what was written: `tensors` and `bytes`, how many tensors `kept_bf16`, how many
    `mtp_layers_left_out`, the `pre_tokenizer` and how near it is. `XushiError` for what llama.cpp
    cannot express, for damaged input, for an output that exists, without the gguf package, and
    where the disk is full.
    """
    gguf = _library()
    directory, path = Path(directory), Path(path)
    if kind not in KINDS:
        raise BadInput(f"there is no GGUF type {kind!r} here", f"use one of {', '.join(KINDS)}")
    if path.exists():
        raise BadInput(f"{path} exists already", "give another name, or remove it first")
    config = read_config(directory)
    _refuse_inexpressible(config, directory)
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.DEEPSEEK2])
    _add_description(writer, config, directory.resolve().name, kind)
    _add_tokenizer(writer, config, directory)
    model = load_pretrained(directory)
    types = {name: _type_of(name, tensor, kind) for name, tensor in gguf_tensors(model)}
    total = 0
    for name, tensor in gguf_tensors(model):
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, types[name])
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), prod(shape), raw_dtype=types[name])
        total += prod(shape)
    _write_aside(writer, path, model, types, total)
    kept = (
        0
        if kind == "bf16"
        else sum(each == gguf.GGMLQuantizationType.BF16 for each in types.values())
    )
    return {
        "file": str(path),
        "type": kind,
        "bytes": path.stat().st_size,
        "tensors": len(types),
        "kept_bf16": kept,
        "mtp_layers_left_out": config.num_nextn_predict_layers,
        "pre_tokenizer": _PRE_TOKENIZER,
        "pre_tokenizer_note": _PRE_TOKENIZER_NOTE,
    }


def _library() -> Any:
    """The gguf package, which only an export needs."""
    try:
        import gguf
    except ModuleNotFoundError:
        raise BadInput(
            "the package gguf is not installed, and a GGUF export needs it",
            "pip install 'xushi[gguf]'",
        ) from None
    return gguf


def _refuse_inexpressible(config: ModelConfig, directory: Path) -> None:
    """Whatever `deepseek2` has no key for or computes otherwise is a `XushiError` that names it."""
    grouped = config.topk_method == "group_limited_greedy" and _limits_groups(config)
    # The loader takes these for V2-Lite's kin and never looks for a query latent.
    lite = config.num_hidden_layers in (26, 27) or (
        config.num_hidden_layers == 48 and config.vocab_size == 128256
    )
    reasons = {
        f"it has no {config.model_type}": config.model_type not in ("deepseek_v2", "deepseek_v3"),
        "it has no attention_bias": config.attention_bias,
        "it needs n_shared_experts of at least 1": config.n_shared_experts == 0,
        f"its latent norms use rms_norm_eps, which is {config.rms_norm_eps} and not "
        f"{LATENT_NORM_EPS}": config.rms_norm_eps != LATENT_NORM_EPS,
        "it scores groups by their two best experts, and group_limited_greedy by the best": grouped,
        f"it reads no q_lora_rank in a model of {config.num_hidden_layers} layers": lite
        and bool(config.q_lora_rank),
    }
    scaling = config.rope_scaling
    if scaling is not None:
        reasons |= {
            f"it needs mscale == mscale_all_dim, not 0, and they are {scaling.mscale} and "
            f"{scaling.mscale_all_dim}": scaling.mscale != scaling.mscale_all_dim
            or not scaling.mscale,
            f"its YaRN needs a factor of at least 1, which is {scaling.factor}": scaling.factor
            < 1.0,
            f"its beta_fast and beta_slow are 32 and 1, and the model's {scaling.beta_fast:g} and "
            f"{scaling.beta_slow:g}": (scaling.beta_fast, scaling.beta_slow) != (32.0, 1.0),
        }
    for reason, holds in reasons.items():
        if holds:
            raise BadInput(
                f"{directory / 'config.json'}: llama.cpp's deepseek2 cannot express this model: "
                f"{reason}",
                "serve the directory itself, with xushi, transformers or vLLM",
            )


def _limits_groups(config: ModelConfig) -> bool:
    """Whether the router's groups keep any expert from being chosen."""
    return config.topk_method != "greedy" and config.topk_group < config.n_group


def _add_description(writer: "gguf.GGUFWriter", config: ModelConfig, name: str, kind: str) -> None:
    """Everything about the model that is no tensor and no tokenizer."""
    import gguf

    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(
        gguf.LlamaFileType.MOSTLY_BF16 if kind == "bf16" else gguf.LlamaFileType.MOSTLY_Q8_0
    )
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    # Attention in its absorbed form: one key head that all query heads share, latent and rotated
    # part side by side.
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(1)
    writer.add_q_lora_rank(config.q_lora_rank or 0)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    _add_rope(writer, config, config.rope_scaling)
    _add_experts(writer, config)


def _add_rope(writer: "gguf.GGUFWriter", config: ModelConfig, scaling: RopeScaling | None) -> None:
    import gguf

    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    if scaling is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling.factor)
        writer.add_rope_scaling_orig_ctx_len(scaling.original_max_position_embeddings)
        # deepseek2 divides by 0.1 again; it then scales scores by (0.1 mscale ln(factor) + 1)^2 and
        # rotates unscaled.
        writer.add_rope_scaling_yarn_log_mul(0.1 * scaling.mscale_all_dim)


def _add_experts(writer: "gguf.GGUFWriter", config: ModelConfig) -> None:
    import gguf

    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_gating_func(
        gguf.ExpertGatingFuncType.SIGMOID
        if config.has_router_bias
        else gguf.ExpertGatingFuncType.SOFTMAX
    )
    if _limits_groups(config):
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)


def _add_tokenizer(writer: "gguf.GGUFWriter", config: ModelConfig, directory: Path) -> None:
    """tokenizer.json and the chat template of tokenizer_config.json, in llama.cpp's terms."""
    path = directory / "tokenizer.json"
    remedy = "give a directory with an undamaged tokenizer, such as runs/NAME/export/base"
    table = read_json(path, remedy)
    settings = read_json(directory / "tokenizer_config.json", remedy)
    try:
        _check_pre_tokenizer(table["pre_tokenizer"], path)
        tokens, types = _tokens(table, config.vocab_size, path)
        merges = [
            merge if isinstance(merge, str) else " ".join(merge)
            for merge in table["model"]["merges"]
        ]
        template = settings.get("chat_template")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(
            f"{path} or its tokenizer_config.json is not a byte-level BPE tokenizer's: {error!r}",
            "use a tokenizer that xushi trained",
        ) from None
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_PRE_TOKENIZER)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    for token, add in (
        (config.bos_token_id, writer.add_bos_token_id),
        (config.eos_token_id, writer.add_eos_token_id),
        (config.pad_token_id, writer.add_pad_token_id),
    ):
        if token is not None:
            add(token)
    # As xushi's engine does with a text: every document that was trained on begins so. llama.cpp
    # does not repeat it where a chat template has written it.
    writer.add_add_bos_token(config.bos_token_id is not None)
    writer.add_add_eos_token(False)
    if isinstance(template, str):
        writer.add_chat_template(template)


def _check_pre_tokenizer(pre_tokenizer: dict[str, Any], path: Path) -> None:
    """Only what `_PRE_TOKENIZER` is known to be near to: another's text would be cut in other
    places.
    """
    patterns = tuple(
        step["pattern"]["Regex"]
        for step in pre_tokenizer["pretokenizers"]
        if step["type"] == "Split"
    )
    if patterns[:2] != _OURS:
        raise BadInput(
            f"{path}: nobody has compared its pre-tokenizer with llama.cpp's",
            "use a tokenizer that xushi trained",
        )


def _tokens(table: dict[str, Any], size: int, path: Path) -> tuple[list[str], list[int]]:
    """The `size` tokens by id and what each is; ids without a token are filled and marked unused."""
    import gguf

    tokens, types = [f"[PAD{i}]" for i in range(size)], [int(gguf.TokenType.UNUSED)] * size
    entries = [
        (token, index, gguf.TokenType.NORMAL) for token, index in table["model"]["vocab"].items()
    ]
    entries += [
        (
            each["content"],
            each["id"],
            gguf.TokenType.CONTROL if each["special"] else gguf.TokenType.USER_DEFINED,
        )
        for each in table["added_tokens"]
    ]
    for token, index, kind in entries:
        if not 0 <= index < size:
            raise BadInput(
                f"{path}: token {token!r} has the id {index}, and config.json's vocab_size is "
                f"{size}",
                "the tokenizer does not belong to this model; get both from one place",
            )
        tokens[index], types[index] = token, int(kind)
    return tokens, types


def gguf_tensors(model: Deepseek) -> Iterator[tuple[str, Tensor]]:
    """(llama.cpp's name, tensor) of everything but the MTP layers, in the model's dtype; the last
    axis is a row.

    Experts stay stacked. The expansion of the latent is two tensors, keys [H, C, K - R] and values
    [H, K, C]: llama.cpp multiplies queries by the one and what attention read by the other.
    """
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, model.config.num_hidden_layers)
    for published, tensor in _in_published_terms(model):
        name = names.get_name(published, try_suffixes=(".weight", ".bias"))
        assert name is not None, published
        yield name, tensor


def _in_published_terms(model: Deepseek) -> Iterator[tuple[str, Tensor]]:
    """The tensors as llama.cpp lays them out, by the names that gguf's table has for them."""
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
            yield (
                name,
                _rotated_rows_in_pairs(
                    tensor, config, 1 if part[0] == "k" else config.num_attention_heads
                ),
            )
        else:
            yield name, tensor


def _rotated_rows_in_pairs(matrix: Tensor, config: ModelConfig, heads: int) -> Tensor:
    """llama.cpp rotates rows (0, 1), (2, 3), ... of each head's last R; without `rope_interleave`
    the checkpoint means (i, i + R/2). Scores are the same in any order that queries and keys share.
    """
    rotated = config.qk_rope_head_dim
    rows_HKD = matrix.reshape(heads, -1, matrix.shape[-1])
    plain_HKD, rope_HRD = torch.split(rows_HKD, [rows_HKD.shape[1] - rotated, rotated], dim=1)
    pairs_HRD = rope_HRD.reshape(heads, 2, rotated // 2, -1).transpose(1, 2).flatten(1, 2)
    return torch.cat((plain_HKD, pairs_HRD), dim=1).flatten(0, 1)


def _type_of(name: str, tensor: Tensor, kind: str) -> "gguf.GGMLQuantizationType":
    """What a tensor is stored as. llama.cpp wants vectors in float32, and the choice of experts
    hangs on the router.
    """
    import gguf

    if tensor.dim() == 1 or name.endswith("ffn_gate_inp.weight"):
        return gguf.GGMLQuantizationType.F32
    block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q8_0]
    fits = kind == "q8_0" and tensor.shape[-1] % block == 0
    return gguf.GGMLQuantizationType.Q8_0 if fits else gguf.GGMLQuantizationType.BF16


def _write_aside(
    writer: "gguf.GGUFWriter",
    path: Path,
    model: Deepseek,
    types: "dict[str, gguf.GGMLQuantizationType]",
    total: int,
) -> None:
    """Fill a file beside `path`, `total` bytes and a little, and rename it into place; on any
    failure it is removed.
    """
    import gguf

    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(path.parent).free) < total:
            raise Failed(
                f"{path} would take {total:,} bytes, and no space is left for them: {free:,} are "
                "free",
                "free some space, or choose another disk",
            )
        aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            writer.write_header_to_file(aside)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, tensor in gguf_tensors(model):
                wide = tensor.to(torch.float32).contiguous().numpy()
                writer.write_tensor_data(gguf.quantize(wide, types[name]).view(np.uint8))
            writer.flush()
            fsync_path(aside)
            os.replace(aside, path)
        except BaseException as error:
            aside.unlink(missing_ok=True)
            if (
                isinstance(error, OSError) and error.errno is None
            ):  # numpy says how much it wrote, but not why no more
                raise OSError(errno.ENOSPC, str(error)) from None
            raise
        finally:
            writer.close()
        fsync_path(path.parent)
