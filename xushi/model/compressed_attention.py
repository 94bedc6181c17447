"""V4's attention (DeepSeek-V4, section 2.3). All heads share one key per token, which is also its
value. A query attends to a sliding window of tokens and to compressed entries.

The layer's `compress_ratio` selects one of three kinds: the sliding window alone; heavily
compressed attention (HCA), which uses all entries; and compressed sparse attention (CSA), in which
an indexer chooses entries. Matches transformers' `DeepseekV4Attention`.

Axes: B batch, T tokens, D hidden, H heads, K head width, R rotated width, W windows or entries, C
width of an entry, I of an index key, N flat tokens, S sequences of a decoding call, Q new tokens of
a sequence, L keys in its windows, P width of a token's projections for the compressors.
"""

from typing import cast

import torch
from torch import Tensor, nn

from xushi.model.cache import FlatTokens, by_sequence, read_slots
from xushi.model.compressor import Compressor
from xushi.model.config import ModelConfig
from xushi.model.indexer import CompressedIndexer
from xushi.model.layers import Linear, RMSNorm
from xushi.model.sequences import Angles, CompletedWindows, Decoding, Sequences
from xushi.ops import (
    MaskedKeys,
    best_keys,
    entry_shares,
    index_divergence,
    index_scores,
    rms_norm,
    rotate_tail,
    shared_attention,
    windowed_attention,
)


class EntryCompressor(Compressor):
    """The layer's compressor. In a sparse layer it contains the indexer, as the parameter names
    require.
    """

    def __init__(self, config: ModelConfig, rate: int) -> None:
        super().__init__(config, rate, config.head_dim)
        self.indexer = CompressedIndexer(config) if self.overlaps else None


class CompressedAttention(nn.Module):
    """V4's attention of one layer. Parameter names are transformers'."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.rate = config.compress_ratio(layer)
        heads = config.num_attention_heads
        width = config.head_dim
        eps = config.rms_norm_eps
        assert config.q_lora_rank is not None
        self.q_a_proj = Linear(config.hidden_size, config.q_lora_rank)
        self.q_a_norm = RMSNorm(config.q_lora_rank, eps, wide_weight=True)
        self.q_b_proj = Linear(config.q_lora_rank, heads * width)
        self.kv_proj = Linear(config.hidden_size, width)
        self.kv_norm = RMSNorm(width, eps, wide_weight=True)
        self.o_a_proj = Linear(
            heads * width // config.o_groups, config.o_groups * config.o_lora_rank
        )
        self.o_b_proj = Linear(config.o_groups * config.o_lora_rank, config.hidden_size)
        self.sinks = nn.Parameter(torch.empty(heads))
        self.compressor = EntryCompressor(config, self.rate) if self.rate else None
        self.scale = width**-0.5

    @property
    def indexer(self) -> CompressedIndexer | None:
        """The indexer, if this is a sparse layer."""
        return None if self.compressor is None else self.compressor.indexer

    def _queries(self, x: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
        """The normed query latent, and the queries [..., H, K]. Each head is normed without a
        weight and then rotated.
        """
        cos, sin = angles
        latent = self.q_a_norm(self.q_a_proj(x))
        q = self.q_b_proj(latent).unflatten(
            -1, (self.config.num_attention_heads, self.config.head_dim)
        )
        return latent, rotate_tail(
            rms_norm(q, None, self.config.rms_norm_eps), cos[..., None, :], sin[..., None, :]
        )

    def _output(self, out_HK: Tensor, angles: Angles) -> Tensor:
        """[..., H, K] to [..., D].

        Values are keys and so are rotated by their position. The output is rotated back by the
        query's position, which leaves the relative rotation. Then each group of heads is multiplied
        by its part of `o_a_proj`, and all groups together by `o_b_proj`.
        """
        cos, sin = angles
        out = rotate_tail(out_HK, cos[..., None, :], -sin[..., None, :])
        groups = self.config.o_groups
        grouped = out.reshape(*out.shape[:-2], groups, -1)
        weight = self.o_a_proj.weight.to(out.dtype).view(groups, -1, grouped.shape[-1])
        mixed = torch.einsum("...gk,grk->...gr", grouped, weight)
        result: Tensor = self.o_b_proj(mixed.flatten(-2))
        return result

    def forward(self, x_BTD: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor | None]:
        """Whole sequences: [B, T, D] to [B, T, D], and the indexer's divergence [B, T] if
        `sequences.index_loss`.
        """
        angles = cast(Angles, sequences.compress_angles) if self.rate else sequences.angles
        q_latent, q_BTHK = self._queries(x_BTD, angles)
        kv_BTK = rotate_tail(self.kv_norm(self.kv_proj(x_BTD)), *angles)
        window_BTT = cast(Tensor, sequences.window_BTT)
        tokens = MaskedKeys(kv_BTK, window_BTT)
        entries = MaskedKeys(kv_BTK[:, :0], window_BTT[..., :0])
        settings = (self.sinks, self.scale, self.config.sliding_window)
        divergence_BT = None
        if self.compressor is not None:
            entries_BWK = _window_entries(self.compressor, x_BTD, sequences)
            chosen_BTW = sequences.windows[self.rate].visible_BTW
            scores_BTW = None
            if self.indexer is not None:
                chosen_BTW, scores_BTW = self._select(self.indexer, x_BTD, q_latent, sequences)
            entries = MaskedKeys(entries_BWK, chosen_BTW)
            if scores_BTW is not None and sequences.index_loss:
                shares_BTW = entry_shares(q_BTHK, tokens, entries, *settings)
                divergence_BT = index_divergence(scores_BTW, shares_BTW, chosen_BTW)
        out_BTHK = windowed_attention(q_BTHK, tokens, entries, *settings)
        return self._output(out_BTHK, angles), divergence_BT

    def _select(
        self, indexer: CompressedIndexer, x_BTD: Tensor, q_latent: Tensor, sequences: Sequences
    ) -> tuple[Tensor, Tensor | None]:
        """The entries that each query attends to [B, T, W], and the indexer's scores [B, T, W] if
        they were computed.

        As in V3.2, the indexer's inputs are detached, so that its loss trains nothing else and no
        other loss trains it.
        """
        visible_BTW = sequences.windows[self.rate].visible_BTW
        sparse = not sequences.dense and visible_BTW.shape[-1] > self.config.index_topk
        if not sparse and not sequences.index_loss:
            return visible_BTW, None
        x_BTD = x_BTD.detach()
        q_latent = q_latent.detach()
        with torch.set_grad_enabled(sequences.index_loss and torch.is_grad_enabled()):
            q_BTJI, weights_BTJ = indexer.queries(
                x_BTD, q_latent, *cast(Angles, sequences.compress_angles)
            )
            scores_BTW = index_scores(
                q_BTJI, _window_entries(indexer, x_BTD, sequences), weights_BTJ
            )
        if not sparse:
            return visible_BTW, scores_BTW
        return best_keys(scores_BTW, visible_BTW, self.config.index_topk), scores_BTW

    def decode(self, x_ND: Tensor, decoding: Decoding, cache: Tensor) -> Tensor:
        """Flat tokens against the cache: [N, D] to [N, D]. Writes the new tokens and the entries of
        completed windows into `cache` [slots, width] before it reads it.
        """
        flat = decoding.flat
        angles = cast(Angles, decoding.compress_angles) if self.rate else decoding.angles
        q_latent, q_NHK = self._queries(x_ND, angles)
        kv_NK = rotate_tail(self.kv_norm(self.kv_proj(x_ND)), *angles)
        projections = [
            part.project(x_ND) for part in (self.compressor, self.indexer) if part is not None
        ]
        written = torch.cat((kv_NK, *projections), dim=-1)
        cache[:, : written.shape[-1]].index_copy_(0, flat.slots_N, written.to(cache.dtype))
        width = self.config.head_dim
        dtype = x_ND.dtype
        keys_SLK, allowed_SQL = _window_of(
            flat, cache[:, :width], self.config.sliding_window, dtype
        )
        if self.compressor is not None:
            entries = cache[:, written.shape[-1] :]
            self._write_entries(
                self.compressor,
                decoding.windows[self.rate],
                cache[:, width : written.shape[-1]],
                entries,
                dtype,
            )
            entries_SWC = read_slots(
                entries, flat.slot_table_SL[:, self.rate - 1 :: self.rate], dtype
            )
            chosen_SQW = self._choose(x_ND, q_latent, angles, flat, entries_SWC[..., width:])
            keys_SLK = torch.cat((keys_SLK, entries_SWC[..., :width]), 1)
            allowed_SQL = torch.cat((allowed_SQL, chosen_SQW), -1)
        out_SQHK = shared_attention(
            by_sequence(q_NHK, flat), keys_SLK, allowed_SQL, self.sinks, self.scale
        )
        return self._output(out_SQHK[flat.rows_N, flat.columns_N], angles)

    def _write_entries(
        self,
        compressor: EntryCompressor,
        new: CompletedWindows,
        projections: Tensor,
        entries: Tensor,
        dtype: torch.dtype,
    ) -> None:
        """Write the entries of the windows that the call completes. `projections` is [slots, P]."""
        parts: list[Compressor] = (
            [compressor] if compressor.indexer is None else [compressor, compressor.indexer]
        )
        projected_WMP = read_slots(projections, new.members_WM, dtype)
        each = torch.split(
            projected_WMP, [part.kv_proj.weight.shape[0] * 2 for part in parts], dim=-1
        )
        made = [
            part.entries(own, new.has_previous_W, *new.angles)
            for part, own in zip(parts, each, strict=True)
        ]
        entries.index_copy_(0, new.slots_W, torch.cat(made, dim=-1).to(entries.dtype))

    def _choose(
        self,
        x_ND: Tensor,
        q_latent: Tensor,
        angles: Angles,
        flat: FlatTokens,
        index_keys_SWI: Tensor,
    ) -> Tensor:
        """The entries that each new token attends to: [S, Q, W]."""
        entries = index_keys_SWI.shape[1]
        positions_SQ = by_sequence(flat.positions_N, flat)
        visible_SQW = (
            torch.arange(entries, device=positions_SQ.device)
            < ((positions_SQ + 1) // self.rate)[..., None]
        )
        if self.indexer is None or entries <= self.config.index_topk:
            return visible_SQW
        q_NJI, weights_NJ = self.indexer.queries(x_ND, q_latent, *angles)
        scores_SQW = index_scores(
            by_sequence(q_NJI, flat), index_keys_SWI, by_sequence(weights_NJ, flat)
        )
        return best_keys(scores_SQW, visible_SQW, self.config.index_topk)


def _window_entries(compressor: Compressor, x_BTD: Tensor, sequences: Sequences) -> Tensor:
    """A batch's entries [B, W, C] in the order of its windows. Rows with fewer windows are padded
    with entries that no query may attend to.
    """
    windows = sequences.windows[compressor.rate]
    batch, length = x_BTD.shape[:2]
    row_B11 = torch.arange(batch, device=x_BTD.device)[:, None, None] * length
    # index_select, because its gradient is summed in the same order for any number of threads.
    projected = compressor.project(x_BTD)
    members = projected.flatten(0, 1).index_select(0, (row_B11 + windows.members_BWM).flatten())
    return compressor.entries(
        members.view(*windows.members_BWM.shape, projected.shape[-1]),
        windows.has_previous_BW,
        *windows.angles,
    )


def _window_of(
    flat: FlatTokens, cache: Tensor, window: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The keys in the new tokens' sliding windows [S, L, K], and which of them each new token may
    attend to [S, Q, L].

    Reads only these from the cache: the `window` - 1 tokens before a sequence's first new one, and
    the new ones.
    """
    positions_SQ = by_sequence(flat.positions_N, flat)
    longest = flat.slot_table_SL.shape[1]
    offsets_L = torch.arange(1 - window, positions_SQ.shape[1], device=positions_SQ.device)
    positions_SL = positions_SQ[:, :1] + offsets_L
    slots_SL = flat.slot_table_SL.gather(1, positions_SL.clamp(0, longest - 1))
    distance_SQL = positions_SQ[..., None] - positions_SL[:, None]
    allowed_SQL = (distance_SQL >= 0) & (distance_SQL < window) & (positions_SL >= 0)[:, None]
    return read_slots(cache, slots_SL, dtype), allowed_SQL
