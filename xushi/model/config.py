"""The config of a DeepSeek-V2, V3, V3.2 or V4 model, with the field names of its published
`config.json`.

Not here: settings of training or serving; reading and writing that file (published.py).
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from xushi.base.config import StrictConfig


class RopeScaling(StrictConfig):
    """YaRN (Peng et al. 2023, arXiv:2309.00071) with DeepSeek's two mscale factors, which V4
    ignores.
    """

    # Published configs call this "type"; transformers 5 also writes "rope_type".
    type: Literal["yarn"] = "yarn"
    factor: float = Field(gt=0, le=1e9)
    original_max_position_embeddings: int = Field(ge=1, le=1_000_000_000)
    beta_fast: float = Field(32.0, gt=0, le=1e9)
    beta_slow: float = Field(1.0, gt=0, le=1e9)
    # 0 is as if there were none: then YaRN's own temperature scales the angles.
    mscale: float = Field(0.0, ge=0, le=1e6)
    mscale_all_dim: float = Field(0.0, ge=0, le=1e6)


TokenId = Annotated[int, Field(ge=0, le=10_000_000)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=1000)]
_INDEXER = ("index_topk", "index_n_heads", "index_head_dim")
_COMPRESSED = (
    "head_dim",
    "o_groups",
    "o_lora_rank",
    "sliding_window",
    "compress_ratios",
    "compress_rate_csa",
    "compress_rate_hca",
    "compress_rope_theta",
    "hc_mult",
    "hc_sinkhorn_iters",
    "hc_eps",
    "num_hash_layers",
    "swiglu_limit",
)
# Fields that do not apply to a model_type, and their fixed values (None: the field's default).
ABSENT: dict[str, dict[str, Any]] = {
    "deepseek_v2": {
        "rope_interleave": True,
        "num_nextn_predict_layers": 0,
        **dict.fromkeys(_INDEXER + _COMPRESSED),
    },
    "deepseek_v3": dict.fromkeys(_INDEXER + _COMPRESSED),
    "deepseek_v32": {"rope_interleave": True, **dict.fromkeys(_COMPRESSED)},
    "deepseek_v4": {
        "rope_interleave": True,
        "attention_bias": False,
        "first_k_dense_replace": 0,
        "n_group": 1,
        "topk_group": 1,
        "intermediate_size": None,
        "kv_lora_rank": None,
        "qk_nope_head_dim": None,
        "v_head_dim": None,
    },
}


class ModelConfig(StrictConfig):
    """DeepSeek-V2's architecture (arXiv:2405.04434), V3's (arXiv:2412.19437), V3.2's
    (arXiv:2512.02556) or V4's, by `model_type`.

    Matches transformers' config classes. The defaults are those of the released V3; fields that
    only V4 has default to V4-Flash. V2 has another router (`topk_method`: softmax instead of
    sigmoid with a bias) and no MTP layers. V3.2 has an indexer. V4 has another attention, residual
    and router. Layer i is a mixture of experts iff i >= `first_k_dense_replace`.
    `q_lora_rank=None` means no query latent; a recipe writes 0 for it, since TOML has no null.

    `compress_ratios` selects each layer's attention, MTP layers last: 0 is the sliding window
    alone, `compress_rate_csa` compressed sparse attention, `compress_rate_hca` heavily compressed
    attention. Fields that do not apply to a model_type are fixed (see `ABSENT`) and not written to
    config.json.
    """

    model_config = ConfigDict(protected_namespaces=())

    model_type: Literal["deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4"] = "deepseek_v3"
    topk_method: Literal["greedy", "group_limited_greedy", "noaux_tc"] = "noaux_tc"
    vocab_size: int = Field(129280, ge=1, le=10_000_000)
    hidden_size: int = Field(7168, ge=1, le=1_000_000)
    intermediate_size: int = Field(18432, ge=1, le=10_000_000)
    moe_intermediate_size: int = Field(2048, ge=1, le=10_000_000)
    num_hidden_layers: int = Field(61, ge=1, le=10_000)
    num_attention_heads: int = Field(128, ge=1, le=10_000)
    n_shared_experts: int = Field(1, ge=0, le=10_000)
    n_routed_experts: int = Field(256, ge=1, le=100_000)
    num_experts_per_tok: int = Field(8, ge=1, le=100_000)
    n_group: int = Field(8, ge=1, le=100_000)
    topk_group: int = Field(4, ge=1, le=100_000)
    norm_topk_prob: bool = True
    routed_scaling_factor: float = Field(2.5, ge=0, le=1e6)
    first_k_dense_replace: int = Field(3, ge=0, le=10_000)
    q_lora_rank: int | None = Field(1536, ge=0, le=1_000_000)
    kv_lora_rank: int = Field(512, ge=1, le=1_000_000)
    qk_nope_head_dim: int = Field(128, ge=1, le=100_000)
    qk_rope_head_dim: int = Field(64, ge=1, le=100_000)
    v_head_dim: int = Field(128, ge=1, le=100_000)
    # The number of keys, or of compressed entries, that the indexer chooses for a query.
    index_topk: int = Field(2048, ge=1, le=1_000_000_000)
    index_n_heads: int = Field(64, ge=1, le=10_000)
    index_head_dim: int = Field(128, ge=1, le=100_000)
    # Width of V4's queries, keys and values; the last qk_rope_head_dim values are rotated.
    head_dim: int = Field(512, ge=1, le=100_000)
    o_groups: int = Field(8, ge=1, le=10_000)
    o_lora_rank: int = Field(1024, ge=1, le=1_000_000)
    sliding_window: int = Field(128, ge=1, le=1_000_000_000)
    compress_ratios: list[int] | None = Field(None, max_length=20_000)
    compress_rate_csa: int = Field(4, ge=1, le=1_000_000)
    compress_rate_hca: int = Field(128, ge=1, le=1_000_000)
    compress_rope_theta: float = Field(160000.0, gt=0, le=1e15)
    hc_mult: int = Field(4, ge=1, le=1000)
    hc_sinkhorn_iters: int = Field(20, ge=1, le=10_000)
    hc_eps: float = Field(1e-6, ge=0, le=1)
    num_hash_layers: int = Field(3, ge=0, le=10_000)
    swiglu_limit: float = Field(10.0, gt=0, le=1e9)
    attention_bias: bool = False
    max_position_embeddings: int = Field(4096, ge=1, le=1_000_000_000)
    rope_theta: float = Field(10000.0, gt=0, le=1e15)
    rope_scaling: RopeScaling | None = None
    rope_interleave: bool = True
    rms_norm_eps: float = Field(1e-6, ge=0, le=1)
    initializer_range: float = Field(0.02, ge=0, le=1000)
    tie_word_embeddings: bool = False
    num_nextn_predict_layers: int = Field(1, ge=0, le=1000)
    bos_token_id: int | None = Field(0, ge=0, le=10_000_000)
    # Released files also have lists: any of the ids ends a text.
    eos_token_id: TokenId | TokenIds | None = 1
    pad_token_id: int | None = Field(None, ge=-1, le=10_000_000)

    @field_validator("q_lora_rank")
    @classmethod
    def _zero_is_none(cls, rank: int | None) -> int | None:
        return rank or None

    @model_validator(mode="before")
    @classmethod
    def _by_kind(cls, table: Any) -> Any:
        """Give fields that do not apply to the model_type their fixed values; refuse others."""
        if not isinstance(table, dict):
            return table
        kind = table.get("model_type", "deepseek_v3")
        if kind not in ABSENT:
            return table
        for key, value in ABSENT[kind].items():
            fixed = cls.model_fields[key].default if value is None else value
            if table.get(key, fixed) != fixed:
                raise ValueError(
                    f"a {kind} has no {key}"
                    if value is None
                    else f"a {kind} must have {key}={value}: its published code supports no other"
                )
            table = {**table, key: fixed}
        return table

    @model_serializer(mode="wrap")
    def _of_its_kind(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        table: dict[str, Any] = serialize(self)
        return {key: value for key, value in table.items() if key not in ABSENT[self.model_type]}

    @property
    def qk_head_dim(self) -> int:
        """Width of MLA's query and key heads: the unrotated part plus the rotated part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def has_router_bias(self) -> bool:
        """Whether a selection bias balances the experts. If not, only the balance loss does."""
        return self.topk_method == "noaux_tc"

    @property
    def is_v4(self) -> bool:
        """Whether this is a V4: attention on compressed entries, several residual streams."""
        return self.model_type == "deepseek_v4"

    @property
    def has_indexer(self) -> bool:
        """Whether any layer has an indexer, which chooses the `index_topk` keys of each query."""
        return self.model_type == "deepseek_v32" or (
            self.is_v4 and self.compress_rate_csa in (self.compress_ratios or [])
        )

    def without_mtp(self) -> "ModelConfig":
        """The config of the same model without its MTP layers."""
        ratios = self.compress_ratios
        if ratios is not None:
            ratios = ratios[: self.num_hidden_layers]
        return self.model_copy(update={"num_nextn_predict_layers": 0, "compress_ratios": ratios})

    def is_moe(self, layer: int) -> bool:
        """Whether layer `layer` is a mixture of experts. MTP layers follow the trunk's layers."""
        return layer >= self.first_k_dense_replace

    def is_hash_routed(self, layer: int) -> bool:
        """Whether the token's id alone decides which experts layer `layer` uses."""
        return self.is_v4 and layer < self.num_hash_layers

    def compress_ratio(self, layer: int) -> int:
        """Tokens per compressed entry in V4's layer `layer`; 0 if the layer has no entries."""
        assert self.compress_ratios is not None
        return self.compress_ratios[layer]

    @model_validator(mode="after")
    def _consistent(self) -> "ModelConfig":
        if self.qk_rope_head_dim % 2:
            raise ValueError("qk_rope_head_dim must be even: rotations act on pairs")
        if self.rope_scaling is not None:
            self._consistent_scaling()
        self._consistent_groups()
        checks: dict[str, Callable[[], None]] = {
            "deepseek_v2": self._consistent_v2,
            "deepseek_v32": self._consistent_v32,
            "deepseek_v4": self._consistent_v4,
        }
        if self.model_type in checks:
            checks[self.model_type]()
        if self.model_type != "deepseek_v2" and not self.has_router_bias:
            raise ValueError(
                f"topk_method={self.topk_method!r} is V2's; a {self.model_type} needs 'noaux_tc'"
            )
        return self

    def _consistent_scaling(self) -> None:
        base = "compress_rope_theta" if self.is_v4 else "rope_theta"
        if getattr(self, base) == 1:
            raise ValueError(f"{base}=1 cannot be scaled: all its frequencies are equal")

    def _consistent_groups(self) -> None:
        if self.n_routed_experts % self.n_group:
            raise ValueError(
                f"n_routed_experts={self.n_routed_experts} is not divisible by "
                f"n_group={self.n_group}"
            )
        size = self.n_routed_experts // self.n_group
        # A single group is not scored, so it may have a single expert: then the layer is dense.
        if self.has_router_bias and self.n_group > 1 and size < 2:
            raise ValueError(
                "a group needs at least 2 experts: its score is the sum of its two best"
            )
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group={self.topk_group} exceeds n_group={self.n_group}")
        if self.num_experts_per_tok > self.topk_group * size:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} exceeds the experts of "
                "topk_group groups"
            )

    def _consistent_v2(self) -> None:
        if self.has_router_bias:
            raise ValueError(
                'topk_method="noaux_tc" is V3\'s; a deepseek_v2 needs "greedy" or '
                '"group_limited_greedy"'
            )
        if self.norm_topk_prob:
            raise ValueError(
                "a deepseek_v2 must have norm_topk_prob=False: its published code supports no other"
            )

    def _consistent_v32(self) -> None:
        if self.q_lora_rank is None:
            raise ValueError("a deepseek_v32 needs q_lora_rank: its indexer reads the query latent")
        if self.index_head_dim < self.qk_rope_head_dim:
            raise ValueError(
                f"index_head_dim={self.index_head_dim} is less than its rotated part, "
                f"qk_rope_head_dim={self.qk_rope_head_dim}"
            )

    def _consistent_v4(self) -> None:
        if self.q_lora_rank is None:
            raise ValueError("a deepseek_v4 needs q_lora_rank: its queries come from that latent")
        if not self.norm_topk_prob:
            raise ValueError(
                "a deepseek_v4 must have norm_topk_prob=True: its published code supports no other"
            )
        if self.n_shared_experts != 1:
            raise ValueError(
                "a deepseek_v4 must have n_shared_experts=1: its published code supports no other"
            )
        for name in ("head_dim", "index_head_dim"):
            if getattr(self, name) < self.qk_rope_head_dim:
                raise ValueError(
                    f"{name}={getattr(self, name)} is less than its rotated part, "
                    f"qk_rope_head_dim={self.qk_rope_head_dim}"
                )
        if self.num_attention_heads % self.o_groups:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not divisible by o_groups="
                f"{self.o_groups}"
            )
        if self.num_hash_layers > self.num_hidden_layers:
            raise ValueError(
                f"num_hash_layers={self.num_hash_layers} exceeds num_hidden_layers="
                f"{self.num_hidden_layers}"
            )
        self._consistent_ratios()

    def _consistent_ratios(self) -> None:
        if self.compress_rate_csa == self.compress_rate_hca:
            raise ValueError(
                "compress_rate_csa and compress_rate_hca must differ, and both are "
                f"{self.compress_rate_csa}"
            )
        layers = self.num_hidden_layers + self.num_nextn_predict_layers
        if self.compress_ratios is None or len(self.compress_ratios) != layers:
            raise ValueError(
                f"a deepseek_v4 needs compress_ratios with {layers} entries, one for every layer, "
                "MTP layers last"
            )
        known = (0, self.compress_rate_csa, self.compress_rate_hca)
        if wrong := set(self.compress_ratios).difference(known):
            raise ValueError(
                f"compress_ratios contains {min(wrong)}; allowed are 0, "
                f"compress_rate_csa={known[1]} and compress_rate_hca={known[2]}"
            )
