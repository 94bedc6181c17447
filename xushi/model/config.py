"""What a DeepSeek-V2 or V3 is, in the field names of its published `config.json`.

Not here: anything about training or serving. The mapping to and from `config.json` is one to one.
"""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, field_validator, model_validator

from xushi.base.config import StrictConfig, parse
from xushi.base.errors import XushiError


class RopeScaling(StrictConfig):
    """YaRN (Peng et al. 2023, arXiv:2309.00071) with DeepSeek's two mscale factors."""

    # Published configs say "type"; transformers 5 also writes "rope_type". Both mean the same.
    type: Literal["yarn"] = "yarn"
    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0


_CLASSES = {"deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM"}
_NOT_IN_V2 = ("rope_interleave", "num_nextn_predict_layers")
# What a V2's config.json must say itself: transformers' defaults for V2 are no released model's, and ours are V3's.
_SHAPES_OF_V2 = ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
                 "num_attention_heads", "n_shared_experts", "n_routed_experts", "num_experts_per_tok",
                 "routed_scaling_factor", "first_k_dense_replace", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim",
                 "qk_rope_head_dim", "v_head_dim", "max_position_embeddings")


def _as_v2(table: dict[str, Any], where: str) -> dict[str, Any]:
    """A published V2 table with what it leaves to its class."""
    for key in _SHAPES_OF_V2:
        if key not in table:
            raise XushiError(f"{where} has no {key}", "get the file again; a DeepSeek-V2 has no default for it")
    unsaid = {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "norm_topk_prob": False}
    said = {key: value for key, value in table.items() if value is not None or key not in unsaid}
    return unsaid | said | {"rope_interleave": True, "num_nextn_predict_layers": 0}


class ModelConfig(StrictConfig):
    """DeepSeek-V2's architecture (arXiv:2405.04434) or V3's (arXiv:2412.19437, section 2), by `model_type`.

    Matches transformers' `DeepseekV2Config` and `DeepseekV3Config`; the defaults are those of the released V3. The two
    differ in the router (`topk_method`: V2 softmax, V3 sigmoid with a bias) and in V3's MTP layers. Layer i is a
    mixture of experts iff i >= `first_k_dense_replace`. `q_lora_rank=None` means no query latent; a recipe writes 0
    for it, as TOML has no null.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())

    model_type: Literal["deepseek_v2", "deepseek_v3"] = "deepseek_v3"
    topk_method: Literal["greedy", "group_limited_greedy", "noaux_tc"] = "noaux_tc"
    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    num_attention_heads: int = 128
    n_shared_experts: int = 1
    n_routed_experts: int = 256
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    first_k_dense_replace: int = 3
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    attention_bias: bool = False
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rope_interleave: bool = True
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    num_nextn_predict_layers: int = 1
    bos_token_id: int | None = 0
    eos_token_id: int | None = 1
    pad_token_id: int | None = None

    @field_validator("q_lora_rank")
    @classmethod
    def _zero_is_none(cls, rank: int | None) -> int | None:
        return rank or None

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head: the part without position plus the rotated part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def has_router_bias(self) -> bool:
        """Whether experts are balanced by a selection bias; if not, the balance loss alone does it."""
        return self.topk_method == "noaux_tc"

    def is_moe(self, layer: int) -> bool:
        """Whether decoder layer `layer` (MTP layers count on from the last) holds experts."""
        return layer >= self.first_k_dense_replace

    @model_validator(mode="after")
    def _consistent(self) -> "ModelConfig":
        positive = ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
                    "num_attention_heads", "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group",
                    "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "max_position_embeddings")
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        for name in ("n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative")
        if self.qk_rope_head_dim % 2:
            raise ValueError("qk_rope_head_dim must be even: rotations act on pairs")
        if self.n_routed_experts % self.n_group:
            raise ValueError(f"n_routed_experts={self.n_routed_experts} does not divide into n_group={self.n_group}")
        if self.has_router_bias and self.n_routed_experts // self.n_group < 2:
            raise ValueError("a group needs at least 2 experts: its score is the sum of its two best")
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group={self.topk_group} exceeds n_group={self.n_group}")
        if self.num_experts_per_tok > self.topk_group * (self.n_routed_experts // self.n_group):
            raise ValueError(f"num_experts_per_tok={self.num_experts_per_tok} exceeds the experts of topk_group groups")
        if self.model_type == "deepseek_v2":
            self._consistent_v2()
        elif not self.has_router_bias:
            raise ValueError(f"topk_method={self.topk_method!r} is V2's; a deepseek_v3 has 'noaux_tc'")
        return self

    def _consistent_v2(self) -> None:
        """What V2's published code does not know may not be asked of it."""
        if self.has_router_bias:
            raise ValueError('topk_method="noaux_tc" is V3\'s; a deepseek_v2 has "greedy" or "group_limited_greedy"')
        for name, value in (("norm_topk_prob", False), ("num_nextn_predict_layers", 0), ("rope_interleave", True)):
            if getattr(self, name) != value:
                raise ValueError(f"a deepseek_v2 has {name}={value}: its published code does not know another")

    def to_published(self) -> dict[str, Any]:
        """The `config.json` that transformers' `DeepseekV3ForCausalLM` and other engines read."""
        table = self.model_dump(mode="json")
        if self.model_type == "deepseek_v2":
            for key in _NOT_IN_V2:
                del table[key]
        return {
            "architectures": [_CLASSES[self.model_type]],
            **table,
            "num_key_value_heads": self.num_attention_heads,
            "hidden_act": "silu",
            "scoring_func": "sigmoid" if self.has_router_bias else "softmax",
            "moe_layer_freq": 1,
            "attention_dropout": 0.0,
            "torch_dtype": "float32",
            "use_cache": True,
        }

    @classmethod
    def from_published(cls, table: dict[str, Any], where: str) -> "ModelConfig":
        """Read a published `config.json` table; what this architecture is not gets a `XushiError` naming the key."""
        if "model_type" not in table:  # every other key has a default, those of the model with 671B parameters
            raise XushiError(f"{where} has no model_type", "use a DeepSeek-V2- or V3-type checkpoint, or get it again")
        kind = table["model_type"]
        if kind not in _CLASSES:
            raise XushiError(f"{where}: model_type is {kind!r}, and only {' and '.join(_CLASSES)} are implemented",
                             "use a DeepSeek-V2- or V3-type checkpoint")
        if kind == "deepseek_v2":
            table = _as_v2(table, where)
        fixed = {"hidden_act": "silu", "scoring_func": "softmax" if kind == "deepseek_v2" else "sigmoid",
                 "moe_layer_freq": 1, "mlp_bias": False}
        for key, value in fixed.items():
            if table.get(key, value) != value:
                raise XushiError(f"{where}: {key} is {table[key]!r}, and only {value!r} is implemented",
                                 "use a DeepSeek-V2- or V3-type checkpoint")
        known = {key: table[key] for key in cls.model_fields if key in table}
        rope = table.get("rope_parameters")  # transformers 5 puts theta and scaling in one table
        if isinstance(rope, dict):
            known["rope_theta"] = rope.get("rope_theta", 10000.0)
            known["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
        if "num_mtp_layers" in table:
            known["num_nextn_predict_layers"] = table["num_mtp_layers"]
        scaling = known.get("rope_scaling")
        if isinstance(scaling, dict):
            kind = scaling.get("type", scaling.get("rope_type"))
            if kind != "yarn":
                raise XushiError(f"{where}: rope_scaling of type {kind!r} is not implemented", "only yarn is")
            for key, published in (("attention_factor", None), ("truncate", True)):
                if scaling.get(key, published) != published:
                    raise XushiError(f"{where}: rope_scaling's {key} is {scaling[key]!r}, which is not implemented",
                                     "use a checkpoint without it, as the published ones are")
            known["rope_scaling"] = {"type": "yarn"} | {
                key: value for key, value in scaling.items() if key in RopeScaling.model_fields and key != "type"}
        return parse(cls, known, where)


def read_config(path: str | Path) -> ModelConfig:
    """The `ModelConfig` of a checkpoint directory's config.json."""
    file = Path(path) / "config.json"
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise XushiError(f"{file} does not exist", "give a directory in the Hugging Face layout") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise XushiError(f"{file} cannot be read: {error}", "get the file again, it is damaged") from None
    if not isinstance(table, dict):
        raise XushiError(f"{file} is not a JSON object", "get the file again, it is damaged")
    return ModelConfig.from_published(table, str(file))
