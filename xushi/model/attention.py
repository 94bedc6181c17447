"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1), as transformers' `DeepseekV3Attention`.

Two forms of one function: `forward` expands the latent into keys and values for whole sequences; `decode` works on
the cached latent itself, with the expansion absorbed into query and output (the same products in another order).

Axes: B batch, T tokens, D hidden, H heads, K query and key width (nope + rope), V value width, C latent rank,
R rotated width, N flat tokens, S sequences of a decoding call, L cached positions.
"""

import torch
from torch import Tensor, nn

from xushi.model.cache import FlatTokens
from xushi.model.config import ModelConfig
from xushi.model.layers import Linear, RMSNorm
from xushi.ops import apply_rope, causal_attention
from xushi.ops.rope import rope_frequencies, yarn_frequencies, yarn_mscale

# The two latent norms are built without the config's eps in the published model code; they always use this.
LATENT_NORM_EPS = 1e-6


class RotaryAngles(nn.Module):
    """cos and sin of every position's angles, YaRN included."""

    frequencies: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        scaling = config.rope_scaling
        self.magnitude = 1.0
        if scaling is None:
            frequencies = rope_frequencies(config.qk_rope_head_dim, config.rope_theta)
        else:
            frequencies = yarn_frequencies(config.qk_rope_head_dim, config.rope_theta, scaling.factor,
                                           scaling.original_max_position_embeddings, scaling.beta_fast,
                                           scaling.beta_slow)
            # Without both factors YaRN's own temperature applies to cos and sin; DeepSeek's two cancel here (where
            # equal) and act through the softmax scale instead.
            self.magnitude = yarn_mscale(scaling.factor, 1.0)
            if scaling.mscale and scaling.mscale_all_dim:
                self.magnitude = (yarn_mscale(scaling.factor, scaling.mscale)
                                  / yarn_mscale(scaling.factor, scaling.mscale_all_dim))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [...] to cos and sin [..., R/2]."""
        angles = positions[..., None].to(self.frequencies.dtype) * self.frequencies
        return angles.cos() * self.magnitude, angles.sin() * self.magnitude


class MultiHeadLatentAttention(nn.Module):
    """MLA with or without the query latent; parameter names are the published ones."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        heads, hidden = config.num_attention_heads, config.hidden_size
        if config.q_lora_rank is None:
            self.q_proj = Linear(hidden, heads * config.qk_head_dim)
        else:
            self.q_a_proj = Linear(hidden, config.q_lora_rank, bias=config.attention_bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(hidden, config.kv_lora_rank + config.qk_rope_head_dim,
                                         bias=config.attention_bias)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, LATENT_NORM_EPS)
        self.kv_b_proj = Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = Linear(heads * config.v_head_dim, hidden, bias=config.attention_bias)
        self.scale = config.qk_head_dim**-0.5
        if config.rope_scaling is not None and config.rope_scaling.mscale_all_dim:
            self.scale *= yarn_mscale(config.rope_scaling.factor, config.rope_scaling.mscale_all_dim) ** 2

    def _queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Per-head queries without and with rotation: [..., H, nope] and [..., H, R]."""
        config = self.config
        q = self.q_proj(x) if config.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.unflatten(-1, (config.num_attention_heads, config.qk_head_dim))
        q_nope, q_rope = q.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        return q_nope, apply_rope(q_rope, cos[..., None, :], sin[..., None, :], config.rope_interleave)

    def _latents(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """The normed latent [..., C] and the rotated key that all heads share [..., R]: what the cache holds."""
        config = self.config
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        return self.kv_a_layernorm(latent), apply_rope(k_rope, cos, sin, config.rope_interleave)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """Whole sequences: [B, T, D] to [B, T, D]; cos and sin [B, T, R/2]; mask as `ops.causal_attention` takes it."""
        config = self.config
        q_nope, q_rope = self._queries(x_BTD, cos, sin)
        latent_BTC, k_rope_BTR = self._latents(x_BTD, cos, sin)
        kv = self.kv_b_proj(latent_BTC).unflatten(-1, (config.num_attention_heads, -1))
        k_nope, v_BTHV = kv.split([config.qk_nope_head_dim, config.v_head_dim], dim=-1)
        q_BTHK = torch.cat((q_nope, q_rope), dim=-1)
        k_BTHK = torch.cat((k_nope, k_rope_BTR[..., None, :].expand_as(q_rope)), dim=-1)
        out_BHTV = causal_attention(q_BTHK.transpose(1, 2), k_BTHK.transpose(1, 2), v_BTHV.transpose(1, 2), mask,
                                    self.scale)
        result: Tensor = self.o_proj(out_BHTV.transpose(1, 2).flatten(2))
        return result

    def decode(self, x_ND: Tensor, cos: Tensor, sin: Tensor, flat: FlatTokens, entries: Tensor) -> Tensor:
        """Flat tokens against the cache: [N, D] to [N, D]; `entries` [slots, C + R] is written first, then read.

        Scores are softmax(scale * (W_k^T q . c + q_rope . k_rope)) in float32 and the output is W_v (sum p c).
        """
        config, heads = self.config, self.config.num_attention_heads
        q_nope_NHK, q_rope_NHR = self._queries(x_ND, cos, sin)
        latent_NC, k_rope_NR = self._latents(x_ND, cos, sin)
        entries.index_copy_(0, flat.slots_N, torch.cat((latent_NC, k_rope_NR), dim=-1).to(entries.dtype))
        expand = self.kv_b_proj.weight.to(x_ND.dtype).view(heads, -1, config.kv_lora_rank)
        w_key_HKC, w_value_HVC = torch.split(expand, [config.qk_nope_head_dim, config.v_head_dim], dim=1)
        q_NHC = torch.cat((torch.einsum("nhk,hkc->nhc", q_nope_NHK, w_key_HKC), q_rope_NHR), dim=-1)

        rows, columns, table_SL = flat.rows_N, flat.columns_N, flat.slot_table_SL
        sequences, length = table_SL.shape
        chunk = int(columns.max()) + 1
        q_SQHC = q_NHC.new_zeros(sequences, chunk, heads, q_NHC.shape[-1])
        q_SQHC[rows, columns] = q_NHC
        limit_SQ = torch.zeros(sequences, chunk, dtype=torch.int64, device=rows.device)
        limit_SQ[rows, columns] = flat.positions_N
        context_SLC = entries.index_select(0, table_SL.flatten()).view(sequences, length, -1).to(x_ND.dtype)
        scores = (q_SQHC.flatten(1, 2) @ context_SLC.transpose(1, 2)).view(sequences, chunk, heads, length)
        ahead = torch.arange(length, device=rows.device) > limit_SQ[..., None]
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * self.scale
        weights = scores.masked_fill(ahead[:, :, None], float("-inf")).softmax(-1).to(x_ND.dtype)
        read_SQHC = (weights.flatten(1, 2) @ context_SLC[..., :config.kv_lora_rank]).view(sequences, chunk, heads, -1)
        out_NHV = torch.einsum("nhc,hvc->nhv", read_SQHC[rows, columns], w_value_HVC)
        result: Tensor = self.o_proj(out_NHV.flatten(1))
        return result

