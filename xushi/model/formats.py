"""Directories and quantisations that are not in the published layouts, called by their names.

Not here: FP8 and FP4 as DeepSeek publishes them (quantised.py).
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from xushi.base.config import shorten
from xushi.base.errors import BadInput
from xushi.base.published_files import read_published_json, shown

_REMEDY = "use DeepSeek's own FP8 checkpoint, or one in bfloat16"
_METHODS = {
    "awq": "AWQ",
    "gptq": "GPTQ",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "modelopt": "ModelOpt",
    "mlx": "MLX",
}
# Endings of names that only one kind of file has.
_ENDINGS = {
    ".qzeros": "GPTQ's or AWQ's",
    ".qweight": "GPTQ's or AWQ's",
    ".weight_packed": "compressed-tensors'",
    ".weight_scale_2": "NVFP4's (ModelOpt)",
    ".biases": "MLX's",
    ".scales": "MLX's",
    ".input_scale": "a scale of inputs for FP8 (static activations)",
    ".absmax": "bitsandbytes'",
    ".lora_A.weight": "a LoRA adapter's",
    ".lora_B.weight": "a LoRA adapter's",
}


def refuse_adapter(directory: Path) -> None:
    """Raise if the directory holds a LoRA adapter and no model."""
    if not os.path.lexists(directory / "adapter_config.json"):
        return
    names = [name for name in os.listdir(directory) if name.endswith(".safetensors")]
    if (directory / "config.json").exists() and names not in ([], ["adapter_model.safetensors"]):
        return
    base = read_published_json(directory, "adapter_config.json").get("base_model_name_or_path")
    raise BadInput(
        f"{directory} holds an adapter (LoRA) for {shown(base)} and not the model itself",
        "merge the adapter into its base model with peft (merge_and_unload), and save that",
    )


def refuse_other_quantisations(directory: Path, table: dict[str, Any]) -> None:
    """Raise if config.json or a file beside it states a quantisation that is not implemented."""
    where = directory / "config.json"
    if isinstance(table.get("quantization"), dict):
        raise BadInput(
            f"{where}: quantization is {shorten(table['quantization'])}: the weights are in MLX's "
            "format, which is not implemented",
            _REMEDY,
        )
    config = table.get("quantization_config")
    if isinstance(config, dict):
        _refuse_method(config, f"{where}: quantization_config")
    for name in ("hf_quant_config.json", "quantize_config.json", "quant_config.json"):
        if os.path.lexists(directory / name):
            other = read_published_json(directory, name)
            inner = other.get("quantization", other)
            raise BadInput(
                f"{directory / name}: the weights are quantised ({_algorithm(inner)}), which is "
                "not implemented",
                _REMEDY,
            )


def _refuse_method(config: dict[str, Any], where: str) -> None:
    method, details = config.get("quant_method"), config.get("quant_algo", config.get("format"))
    if method in (None, "fp8") and details is None:
        return
    name = _METHODS.get(method, shorten(method)) if isinstance(method, str) else ""
    said = [name, shown(details) if isinstance(details, str) else ""]
    raise BadInput(
        f"{where}: {' '.join(said).strip() or shorten(config)} is not implemented", _REMEDY
    )


def _algorithm(config: Any) -> str:
    if not isinstance(config, dict):
        return shorten(config)
    for key in ("quant_algo", "quant_method", "version", "bits"):
        if key in config:
            return f"{key} {shown(config[key])}"
    return "of an unknown kind"


def refuse_other_tensors(names: Iterable[str], directory: Path) -> None:
    """Raise if a tensor has a name that only another format's tensors have."""
    for name in names:
        for ending, owner in _ENDINGS.items():
            if name.endswith(ending):
                raise BadInput(
                    f"{directory} holds {shown(name)}, which is {owner}; that format is not "
                    "implemented",
                    _REMEDY,
                )
