"""What a DeepSeek-V3 is, in the field names of its published `config.json`.

Not here: anything about training or serving. The mapping to and from `config.json` is one to one.
"""

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


class ModelConfig(StrictConfig):
    """DeepSeek-V3's architecture (arXiv:2412.19437, section 2); matches transformers' `DeepseekV3Config`.

    Layer i is a mixture of experts iff i >= `first_k_dense_replace`. `q_lora_rank=None` means no query latent; a
    recipe writes 0 for it, as TOML has no null.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())

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
        if self.n_routed_experts // self.n_group < 2:
            raise ValueError("a group needs at least 2 experts: its score is the sum of its two best")
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group={self.topk_group} exceeds n_group={self.n_group}")
        if self.num_experts_per_tok > self.topk_group * (self.n_routed_experts // self.n_group):
            raise ValueError(f"num_experts_per_tok={self.num_experts_per_tok} exceeds the experts of topk_group groups")
        return self

    def to_published(self) -> dict[str, Any]:
        """The `config.json` that transformers' `DeepseekV3ForCausalLM` and other engines read."""
        table = self.model_dump(mode="json")
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            **table,
            "num_key_value_heads": self.num_attention_heads,
            "hidden_act": "silu",
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "moe_layer_freq": 1,
            "attention_dropout": 0.0,
            "torch_dtype": "float32",
            "use_cache": True,
        }

    @classmethod
    def from_published(cls, table: dict[str, Any], where: str) -> "ModelConfig":
        """Read a published `config.json` table; what this architecture is not gets a `XushiError` naming the key."""
        fixed = {"model_type": "deepseek_v3", "hidden_act": "silu", "scoring_func": "sigmoid",
                 "topk_method": "noaux_tc", "moe_layer_freq": 1}
        if "model_type" not in table:  # every other key has a default, those of the model with 671B parameters
            raise XushiError(f"{where} has no model_type", "use a DeepSeek-V3-type checkpoint, or get the file again")
        for key, value in fixed.items():
            if table.get(key, value) != value:
                raise XushiError(f"{where}: {key} is {table[key]!r}, and only {value!r} is implemented",
                                 "use a DeepSeek-V3-type checkpoint")
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
            for key, value in (("attention_factor", None), ("truncate", True)):
                if scaling.get(key, value) != value:
                    raise XushiError(f"{where}: rope_scaling's {key} is {scaling[key]!r}, which is not implemented",
                                     "use a DeepSeek-V3-type checkpoint, which has no such key")
            known["rope_scaling"] = {"type": "yarn"} | {
                key: value for key, value in scaling.items() if key in RopeScaling.model_fields and key != "type"}
        return parse(cls, known, where)
