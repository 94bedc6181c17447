"""Export a directory in the Hugging Face layout to one GGUF file for llama.cpp: DeepSeek-V2 and V3,
in BF16 or Q8_0.

The keys are those that llama.cpp's `deepseek2` loader reads (src/models/deepseek2.cpp and
conversion/deepseek.py in llama-cpp-python 0.3.36), under the names of gguf 0.19. A model for which
that loader would compute something else than `xushi.model` is refused by name.

Not here: the tensors' layout (gguf_tensors.py), the tokenizer (gguf_tokenizer.py); other
architectures and quantisations; MTP layers, which llama.cpp's own converter also leaves out.
"""

import errno
import os
import shutil
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from xushi.base.errors import BadInput, Failed
from xushi.base.files import disk_errors, fsync_path, remove_partials
from xushi.base.model_directory import model_name
from xushi.model.attention import LATENT_NORM_EPS
from xushi.model.config import ModelConfig, RopeScaling
from xushi.model.deepseek import Deepseek
from xushi.model.gguf_tensors import gguf_tensors
from xushi.model.gguf_tokenizer import add_tokenizer
from xushi.model.weights import load_pretrained, open_directory

if TYPE_CHECKING:
    import gguf

KINDS = ("bf16", "q8_0")


def export_gguf(directory: str | Path, path: str | Path, kind: str = "bf16") -> dict[str, Any]:
    """Write model and tokenizer of `directory` to the new file `path`. `kind`: the type of
    matrices, one of `KINDS`.

    Norms, router weights and router biases are float32. A matrix whose rows are not a multiple of
    Q8_0's 32 values stays in BF16. Memory: the weights once, in float32, and one tensor.

    Returns a description: `file`, `type`, `bytes`, the number of `tensors`, how many of them are
    `kept_bf16`, and that of `add_tokenizer`. A `XushiError` if
    llama.cpp cannot express the model, the input is damaged, `path` exists, the gguf package is
    missing, or the disk is full.
    """
    gguf = _library()
    directory = Path(directory)
    path = Path(path)
    if kind not in KINDS:
        raise BadInput(f"{kind!r} is not a supported GGUF type", f"use one of {', '.join(KINDS)}")
    if path.exists():
        raise BadInput(f"{path} exists already", "give another name, or remove it first")
    config = _expressible_config(directory)
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.DEEPSEEK2])
    _add_description(writer, config, model_name(directory), kind)
    described = add_tokenizer(writer, config, directory)
    model = load_pretrained(directory, mtp=False)
    types = {name: _type_of(name, tensor, kind) for name, tensor in gguf_tensors(model)}
    total = _add_tensor_infos(writer, model, types)
    _write_file(writer, path, model, types, total)
    in_bf16 = sum(each == gguf.GGMLQuantizationType.BF16 for each in types.values())
    return {
        "file": str(path),
        "type": kind,
        "bytes": path.stat().st_size,
        "tensors": len(types),
        "kept_bf16": 0 if kind == "bf16" else in_bf16,
        **described,
    }


def _library() -> Any:
    """The gguf package, which is optional."""
    try:
        import gguf
    except ModuleNotFoundError:
        raise BadInput(
            "the package gguf is not installed, and a GGUF export needs it",
            "pip install 'xushi[gguf]'",
        ) from None
    return gguf


def _expressible_config(directory: Path) -> ModelConfig:
    """The config of `directory`. Raise a `XushiError` for whatever llama.cpp's `deepseek2` lacks or
    computes differently.
    """
    config, _ = open_directory(directory)
    grouped = config.topk_method == "group_limited_greedy" and _limits_groups(config)
    # The loader takes these for V2-Lite and its relatives and does not look for a query latent.
    lite = config.num_hidden_layers in (26, 27) or (
        config.num_hidden_layers == 48 and config.vocab_size == 128256
    )
    reasons = {
        f"it has no {config.model_type}": config.model_type not in ("deepseek_v2", "deepseek_v3"),
        "it has no attention_bias": config.attention_bias,
        "it needs n_shared_experts of at least 1": config.n_shared_experts == 0,
        f"its latent norms use rms_norm_eps, which is {config.rms_norm_eps} and not "
        f"{LATENT_NORM_EPS}": config.rms_norm_eps != LATENT_NORM_EPS,
        "it scores a group by its two best experts, but group_limited_greedy by its best": grouped,
        f"it reads no q_lora_rank in a model of {config.num_hidden_layers} layers": lite
        and bool(config.q_lora_rank),
    }
    scaling = config.rope_scaling
    if scaling is not None:
        reasons |= {
            f"it needs mscale == mscale_all_dim and not 0, but they are {scaling.mscale} and "
            f"{scaling.mscale_all_dim}": scaling.mscale != scaling.mscale_all_dim
            or not scaling.mscale,
            f"its YaRN needs a factor of at least 1, but it is {scaling.factor}": scaling.factor
            < 1.0,
            f"its beta_fast and beta_slow are 32 and 1, the model's are {scaling.beta_fast:g} and "
            f"{scaling.beta_slow:g}": (scaling.beta_fast, scaling.beta_slow) != (32.0, 1.0),
        }
    for reason, holds in reasons.items():
        if holds:
            raise BadInput(
                f"{directory / 'config.json'}: llama.cpp's deepseek2 cannot express this model: "
                f"{reason}",
                "serve the directory itself, with xushi, transformers or vLLM",
            )
    return config


def _limits_groups(config: ModelConfig) -> bool:
    """Whether the groups exclude any expert from the choice."""
    return config.topk_method != "greedy" and config.topk_group < config.n_group


def _add_description(writer: "gguf.GGUFWriter", config: ModelConfig, name: str, kind: str) -> None:
    """Add the model's metadata: everything but tensors and tokenizer."""
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
    # Attention in its absorbed form: all query heads share one key head, which is the latent
    # followed by the rotated part.
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
        # deepseek2 divides this by 0.1. It then scales scores by (0.1 mscale ln(factor) + 1)^2 and
        # does not scale the rotation.
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


def _type_of(name: str, tensor: Tensor, kind: str) -> "gguf.GGMLQuantizationType":
    """The type in which a tensor is stored. llama.cpp needs vectors in float32; the router's weight
    stays float32 because rounding it would change the choice of experts.
    """
    import gguf

    if tensor.dim() == 1 or name.endswith("ffn_gate_inp.weight"):
        return gguf.GGMLQuantizationType.F32
    block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q8_0]
    fits = kind == "q8_0" and tensor.shape[-1] % block == 0
    return gguf.GGMLQuantizationType.Q8_0 if fits else gguf.GGMLQuantizationType.BF16


def _add_tensor_infos(
    writer: "gguf.GGUFWriter", model: Deepseek, types: "dict[str, gguf.GGMLQuantizationType]"
) -> int:
    """Announce all tensors to `writer`; returns their total size in bytes."""
    import gguf

    total = 0
    for name, tensor in gguf_tensors(model):
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, types[name])
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), prod(shape), raw_dtype=types[name])
        total += prod(shape)
    return total


def _write_file(
    writer: "gguf.GGUFWriter",
    path: Path,
    model: Deepseek,
    types: "dict[str, gguf.GGMLQuantizationType]",
    total: int,
) -> None:
    """Write a temporary file of `total` bytes plus metadata beside `path` and rename it to `path`.
    It is removed on any failure.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < total:
            raise Failed(
                f"{path} would take {total:,} bytes, and no space is left for them: {free:,} are "
                "free",
                "free some space, or choose another disk",
            )
        remove_partials(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            _write_tensors(writer, temporary, model, types)
            fsync_path(temporary)
            os.replace(temporary, path)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            # numpy reports a short write without an errno: the disk is full.
            if isinstance(error, OSError) and error.errno is None:
                raise OSError(errno.ENOSPC, str(error)) from None
            raise
        finally:
            writer.close()
        fsync_path(path.parent)


def _write_tensors(
    writer: "gguf.GGUFWriter",
    file: Path,
    model: Deepseek,
    types: "dict[str, gguf.GGMLQuantizationType]",
) -> None:
    import gguf

    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in gguf_tensors(model):
        wide = tensor.to(torch.float32).contiguous().numpy()
        writer.write_tensor_data(gguf.quantize(wide, types[name]).view(np.uint8))
    writer.flush()
