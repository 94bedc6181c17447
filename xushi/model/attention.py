"""Multi-head latent attention (MLA; DeepSeek-V2, arXiv:2405.04434, section 2.1), as transformers'
`DeepseekV3Attention`; with V3.2's indexer as `DeepseekV32Attention`, which attends only to the
tokens that the indexer chose.

One function in two forms. `forward` expands latents into keys and values, for whole sequences.
`decode` works on cached latents, with the expansion absorbed into query and output: the same
products in another order.

Axes: B batch, T tokens, D hidden, H heads, K query and key width (nope + rope), V value width, C
latent rank, R rotated width, N flat tokens, S sequences of a decoding call, Q new tokens of a
sequence, L cached positions, J and I the indexer's heads and width.
"""

import torch
from torch import Tensor, nn

from xushi.model.cache import by_sequence, read_slots
from xushi.model.config import ModelConfig
from xushi.model.indexer import LightningIndexer
from xushi.model.layers import Linear, RMSNorm
from xushi.model.sequences import Angles, Decoding, Sequences
from xushi.ops import (
    apply_rope,
    attention_shares,
    best_keys,
    causal_attention,
    expand_heads,
    index_divergence,
    index_scores,
    largest_scores,
    latent_attention,
    rotated_attention,
)
from xushi.ops.rope import yarn_mscale

# The published model code builds the two latent norms without the config's eps, so they always use
# this default.
LATENT_NORM_EPS = 1e-6


class MultiHeadLatentAttention(nn.Module):
    """MLA, with or without a query latent and an indexer. Parameter names are the published ones.

    While `largest_H` [H] is set, training forwards keep each head's largest attention logit in it
    (QK-clip reads and resets it).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        heads = config.num_attention_heads
        hidden = config.hidden_size
        if config.q_lora_rank is None:
            self.q_proj = Linear(hidden, heads * config.qk_head_dim)
        else:
            self.q_a_proj = Linear(hidden, config.q_lora_rank, bias=config.attention_bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(
            hidden, config.kv_lora_rank + config.qk_rope_head_dim, bias=config.attention_bias
        )
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, LATENT_NORM_EPS)
        self.kv_b_proj = Linear(
            config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim)
        )
        self.o_proj = Linear(heads * config.v_head_dim, hidden, bias=config.attention_bias)
        self.indexer = LightningIndexer(config) if config.has_indexer else None
        self.largest_H: Tensor | None = None
        self.scale = config.qk_head_dim**-0.5
        scaling = config.rope_scaling
        if scaling is not None and scaling.mscale_all_dim:
            self.scale *= yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2

    def _queries(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The normed query latent (x itself if the model has none), and the queries [..., H, K]
        before the rotation of their last R values.
        """
        config = self.config
        latent = x if config.q_lora_rank is None else self.q_a_layernorm(self.q_a_proj(x))
        q = self.q_proj(latent) if config.q_lora_rank is None else self.q_b_proj(latent)
        return latent, q.unflatten(-1, (config.num_attention_heads, config.qk_head_dim))

    def _latents(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The normed latent [..., C] and the key part shared by all heads [..., R], before its
        rotation.
        """
        config = self.config
        latent, k_rope = self.kv_a_proj_with_mqa(x).split(
            [config.kv_lora_rank, config.qk_rope_head_dim], dim=-1
        )
        return self.kv_a_layernorm(latent), k_rope

    def forward(self, x_BTD: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor | None]:
        """Whole sequences: [B, T, D] to [B, T, D], and the indexer's divergence [B, T] if
        `sequences.index_loss`.
        """
        config = self.config
        q_latent, q_BTHK = self._queries(x_BTD)
        latent_BTC, k_rope_BTR = self._latents(x_BTD)
        kv_BTHW = self.kv_b_proj(latent_BTC).unflatten(-1, (config.num_attention_heads, -1))
        heads = q_BTHK, kv_BTHW, k_rope_BTR, sequences.angles, config.rope_interleave
        if self.indexer is None:
            if self._watches:
                self._watch(*expand_heads(*heads)[:2], sequences.mask)
            out_BTHV = rotated_attention(*heads, sequences.mask, self.scale, sequences.starts_BT)
            return self.o_proj(out_BTHV.flatten(2)), None
        q_BHTK, k_BHTK, v_BHTV = expand_heads(*heads)
        mask, scores_BTT = self._select(self.indexer, x_BTD, q_latent, sequences)
        starts_BT = sequences.starts_BT if mask is sequences.mask else None
        divergence_BT = None
        if scores_BTT is not None and sequences.index_loss:
            allowed = (_causal(x_BTD) if mask is None else mask)[:, 0].expand_as(scores_BTT)
            shares_BTT = attention_shares(q_BHTK, k_BHTK, allowed, self.scale)
            divergence_BT = index_divergence(scores_BTT, shares_BTT, allowed)
        if self._watches:
            self._watch(q_BHTK, k_BHTK, mask)
        out_BHTV = causal_attention(q_BHTK, k_BHTK, v_BHTV, mask, self.scale, starts_BT)
        return self.o_proj(out_BHTV.transpose(1, 2).flatten(2)), divergence_BT

    @property
    def _watches(self) -> bool:
        # Evaluation runs without gradients, and its logits must not count.
        return self.largest_H is not None and torch.is_grad_enabled()

    def _watch(self, q_BHTK: Tensor, k_BHTK: Tensor, mask: Tensor | None) -> None:
        """Update `largest_H`."""
        assert self.largest_H is not None
        found_H = largest_scores(q_BHTK.detach(), k_BHTK.detach(), mask, self.scale)
        self.largest_H = torch.maximum(self.largest_H, found_H.to(self.largest_H.dtype))

    def _select(
        self, indexer: LightningIndexer, x_BTD: Tensor, q_latent: Tensor, sequences: Sequences
    ) -> tuple[Tensor | None, Tensor | None]:
        """The mask of the keys that each query attends to, and the indexer's scores [B, T, T] if
        they were computed.

        The indexer's inputs are detached (V3.2, section 2.1.1): the language model's loss does not
        train the indexer, and the indexer's loss trains nothing else.
        """
        sparse = not sequences.dense and x_BTD.shape[1] > self.config.index_topk
        if not sparse and not sequences.index_loss:
            return sequences.mask, None
        x_BTD = x_BTD.detach()
        q_latent = q_latent.detach()
        with torch.set_grad_enabled(sequences.index_loss and torch.is_grad_enabled()):
            q_BTJI, weights_BTJ = indexer.queries(x_BTD, q_latent, *sequences.angles)
            scores_BTT = index_scores(q_BTJI, indexer.keys(x_BTD, *sequences.angles), weights_BTJ)
        if not sparse:
            return sequences.mask, scores_BTT
        allowed = _causal(x_BTD) if sequences.mask is None else sequences.mask
        return best_keys(scores_BTT, allowed[:, 0], self.config.index_topk)[:, None], scores_BTT

    def decode(self, x_ND: Tensor, decoding: Decoding, cache: Tensor) -> Tensor:
        """Flat tokens against the cache: [N, D] to [N, D]. Writes the new tokens into `cache`
        [slots, C + R (+ I)] before it reads it.

        Weights are softmax(scale * (W_k^T q . c + q_rope . k_rope)) in float32; the output is W_v
        (sum of weight * c).
        """
        flat = decoding.flat
        q_latent, q_NHK = self._queries(x_ND)
        self._write(x_ND, decoding, cache)
        w_key_HKC, w_value_HVC = self._expansions(x_ND.dtype)
        q_SQHC = by_sequence(self._absorbed_queries(q_NHK, w_key_HKC, decoding.angles), flat)
        context_SLC = read_slots(cache, flat.slot_table_SL, x_ND.dtype)
        length = context_SLC.shape[1]
        limit_SQ1 = by_sequence(flat.positions_N, flat)[..., None]
        allowed_SQL = torch.arange(length, device=limit_SQ1.device) <= limit_SQ1
        if self.indexer is not None:
            context_SLC, index_keys_SLI = torch.split(
                context_SLC, [q_SQHC.shape[-1], self.config.index_head_dim], dim=-1
            )
            if length > self.config.index_topk:
                queries = self.indexer.queries(x_ND, q_latent, *decoding.angles)
                q_SQJI, weights_SQJ = (by_sequence(x, flat) for x in queries)
                scores_SQL = index_scores(q_SQJI, index_keys_SLI, weights_SQJ)
                allowed_SQL = best_keys(scores_SQL, allowed_SQL, self.config.index_topk)
        read_SQHC = latent_attention(
            q_SQHC, context_SLC, allowed_SQL, self.scale, self.config.kv_lora_rank
        )
        out_NHV = torch.einsum("nhc,hvc->nhv", read_SQHC[flat.rows_N, flat.columns_N], w_value_HVC)
        result: Tensor = self.o_proj(out_NHV.flatten(1))
        return result

    def _write(self, x_ND: Tensor, decoding: Decoding, cache: Tensor) -> None:
        """Write the new tokens' latents, rotated keys and index keys into their slots."""
        cos, sin = decoding.angles
        latent_NC, k_rope_NR = self._latents(x_ND)
        written = [latent_NC, apply_rope(k_rope_NR, cos, sin, self.config.rope_interleave)]
        if self.indexer is not None:
            written.append(self.indexer.keys(x_ND, cos, sin))
        cache.index_copy_(0, decoding.flat.slots_N, torch.cat(written, dim=-1).to(cache.dtype))

    def _expansions(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The matrices that expand a latent to keys [H, K - R, C] and to values [H, V, C]."""
        config = self.config
        weight = self.kv_b_proj.weight.to(dtype)
        expand = weight.view(config.num_attention_heads, -1, config.kv_lora_rank)
        w_key_HKC, w_value_HVC = torch.split(
            expand, [config.qk_nope_head_dim, config.v_head_dim], dim=1
        )
        return w_key_HKC, w_value_HVC

    def _absorbed_queries(self, q_NHK: Tensor, w_key_HKC: Tensor, angles: Angles) -> Tensor:
        """Queries [N, H, C + R]: the key expansion applied to the part without rotation, then the
        rotated part.
        """
        cos, sin = angles
        widths = [self.config.qk_nope_head_dim, self.config.qk_rope_head_dim]
        q_nope_NHK, q_rope_NHR = torch.split(q_NHK, widths, dim=-1)
        q_rope_NHR = apply_rope(
            q_rope_NHR, cos[..., None, :], sin[..., None, :], self.config.rope_interleave
        )
        return torch.cat((torch.einsum("nhk,hkc->nhc", q_nope_NHK, w_key_HKC), q_rope_NHR), -1)


def _causal(x_BTD: Tensor) -> Tensor:
    """[1, 1, T, T], True at and below the diagonal."""
    length = x_BTD.shape[1]
    return torch.ones(1, 1, length, length, dtype=torch.bool, device=x_BTD.device).tril()
