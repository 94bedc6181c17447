"""DeepSeek-V2, V3, V3.2 and V4 as published: embedding, decoder layers, final norm, head, and MTP
layers.

The residual is kept in the weights' dtype. Blocks compute in `compute_dtype`, which is the same
unless training asks for bfloat16.

Not here: losses (objective.py), files (weights.py), sampling (engine).

Axes: B batch, T tokens, D hidden, V vocabulary, S streams of V4's residual, N flat tokens, M tokens
whose logits are wanted.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xushi.base.seeds import derive
from xushi.model.cache import FlatTokens, LatentCache
from xushi.model.config import ModelConfig
from xushi.model.decoder import DecoderLayer
from xushi.model.hyper_connections import HyperHead
from xushi.model.layers import Linear, RMSNorm
from xushi.model.moe import MixtureOfExperts, Router
from xushi.model.mtp import MultiTokenPredictionLayer, mtp_layer
from xushi.model.rotary import RotaryAngles
from xushi.model.sequences import Decoding, Sequences, completed_windows, sliding_window, windows_of
from xushi.ops import RouterChoice
from xushi.ops.attention import segment_mask, segment_starts


@dataclass(frozen=True)
class Logits:
    """`logits` [B, T, V] in the compute dtype."""

    logits: Tensor


@dataclass(frozen=True)
class Hidden:
    """The trunk's output.

    `hidden_BTD` is the input of the head, after the final norm. In a pipeline stage that is not the
    last it is the residual after the stage's layers, of whatever shape.
    """

    sequences: Sequences  # MTP layers use it too
    hidden_BTD: Tensor
    carried: Tensor  # the MTP layers' input: `hidden_BTD`, or V4's streams [B, T, S, D]
    routing: list[RouterChoice]  # of each MoE layer, first layer first
    index_divergence: list[Tensor]  # [B, T] of each indexer, if its loss was asked for


@dataclass(frozen=True)
class Decoded:
    """Float32 logits [M, V] of the wanted tokens, and on request the experts of all tokens [MoE
    layers, N, k].
    """

    logits_MV: Tensor
    routed_experts: Tensor | None


class Trunk(nn.Module):
    """Embedding, decoder layers and final norm. MTP layers are numbered after the decoder layers,
    as in the published files.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(
            config.vocab_size,
            config.hidden_size,
            _weight=torch.empty(config.vocab_size, config.hidden_size),
        )
        depth, extra = config.num_hidden_layers, config.num_nextn_predict_layers
        # Keyed by number, since a pipeline stage has only some of them.
        self.layers = nn.ModuleDict(
            {str(i): DecoderLayer(config, i) for i in range(depth)}
            | {str(depth + i): mtp_layer(config, depth + i) for i in range(extra)}
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.is_v4)
        self.hc_head = HyperHead(config) if config.is_v4 else None


class Deepseek(nn.Module):
    """The whole model. Its parameters are uninitialised until `initialise` or `load_pretrained`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = (
            None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)
        )
        self.compute_dtype: torch.dtype | None = None
        self.recompute = False  # True: layers keep only their inputs and run again in backward
        self.begins = True  # whether this pipeline stage has the first layer
        self.ends = True  # whether it has the last layer, final norm and head
        self.make_angles()

    def make_angles(self, device: torch.device | str | None = None) -> None:
        """Compute the rotations' frequencies, which no checkpoint contains. V4's compressed layers
        have their own.
        """
        config = self.config
        scaling = None if config.is_v4 else config.rope_scaling
        self.angles = RotaryAngles(config.qk_rope_head_dim, config.rope_theta, scaling).to(device)
        self.compress_angles = (
            RotaryAngles(
                config.qk_rope_head_dim,
                config.compress_rope_theta,
                config.rope_scaling,
                rescale=False,
            ).to(device)
            if config.is_v4
            else None
        )

    def keep_layers(self, first: int, end: int) -> None:
        """Keep only the trunk's layers `first` to `end` - 1, for one stage of a pipeline.

        The first stage also keeps the embedding. The last keeps the final norm, the head and the
        MTP layers, and the embedding if MTP layers or a tied head need it.
        """
        depth = self.config.num_hidden_layers
        self.begins = first == 0
        self.ends = end == depth
        for name in list(self.model.layers):
            if not (first <= int(name) < end or (self.ends and int(name) >= depth)):
                del self.model.layers[name]
        if not self.begins and not (self.ends and (self.mtp_layers or self.lm_head is None)):
            del self.model.embed_tokens
        if not self.ends:
            del self.model.norm
            self.model.hc_head = self.lm_head = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that blocks compute in."""
        return self.compute_dtype or next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    @property
    def head_VD(self) -> Tensor:
        """The output matrix [V, D]; the embedding itself if they are tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def decoder_layers(self) -> list[DecoderLayer]:
        """The trunk's layers that this stage holds, without MTP layers."""
        return [
            cast(DecoderLayer, layer)
            for name, layer in self.model.layers.items()
            if int(name) < self.config.num_hidden_layers
        ]

    @property
    def mtp_layers(self) -> list[MultiTokenPredictionLayer]:
        """The MTP layers, depth 1 first."""
        return [
            cast(MultiTokenPredictionLayer, layer)
            for name, layer in self.model.layers.items()
            if int(name) >= self.config.num_hidden_layers
        ]

    def routers(self) -> dict[str, Router]:
        """All routers by their layer's number as text, those of MTP layers included."""
        return {
            name: layer.mlp.gate
            for name, layer in self.model.layers.items()
            if isinstance(layer.mlp, MixtureOfExperts)
        }

    def initialise(self, seed: int) -> "Deepseek":
        """Initialise all weights: normal with standard deviation `initializer_range`; norms to 1;
        biases and sinks to 0. Each tensor has its own random stream, derived from `seed` and its
        name.
        """
        for name, parameter in self.named_parameters():
            with torch.no_grad():
                if name.endswith(("bias", "base", "sinks")):
                    parameter.zero_()
                elif parameter.dim() == 1:
                    parameter.fill_(1.0)
                else:
                    stream = torch.Generator().manual_seed(derive(seed, "initialise", name) >> 1)
                    parameter.copy_(
                        torch.empty(parameter.shape).normal_(
                            0.0, self.config.initializer_range, generator=stream
                        )
                    )
        for name, router in self.routers().items():
            router.initialise_table(
                torch.Generator().manual_seed(derive(seed, "tid2eid", name) >> 1)
            )
            if router.e_score_correction_bias is not None:
                router.e_score_correction_bias.zero_()
        return self

    def sequences(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor,
        segments_BT: Tensor | None = None,
        *,
        dense: bool = False,
        index_loss: bool = False,
    ) -> Sequences:
        """The data that the layers share in a forward over whole sequences; `dense` and
        `index_loss` as in `Sequences`.
        """
        config = self.config
        dtype = self.dtype
        angles = self.angles(positions_BT)
        if self.compress_angles is None:
            mask = None if segments_BT is None else segment_mask(segments_BT)
            starts_BT = None if mask is None or segments_BT is None else segment_starts(segments_BT)
            return Sequences(tokens_BT, angles, mask, dtype, dense, index_loss, starts_BT=starts_BT)
        windows = {}
        for rate in sorted(set(config.compress_ratios or []) - {0}):
            windows[rate] = windows_of(positions_BT, segments_BT, rate, self.compress_angles)
        return Sequences(
            tokens_BT,
            angles,
            None,
            dtype,
            dense,
            index_loss,
            self.compress_angles(positions_BT),
            sliding_window(positions_BT, segments_BT, config.sliding_window),
            windows,
        )

    def decoding(self, flat: FlatTokens, dtype: torch.dtype) -> Decoding:
        """The data that the layers share in a decoding call."""
        angles = self.angles(flat.positions_N)
        if self.compress_angles is None:
            return Decoding(flat, angles, dtype)
        windows = {}
        for rate in sorted(set(self.config.compress_ratios or []) - {0}):
            windows[rate] = completed_windows(flat, rate, self.compress_angles)
        return Decoding(flat, angles, dtype, self.compress_angles(flat.positions_N), windows)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [...] to the residual [..., D], or to V4's [..., S, D] with equal streams."""
        x = F.embedding(tokens, self.model.embed_tokens.weight)
        if not self.config.is_v4:
            return x
        return x[..., None, :].expand(*x.shape[:-1], self.config.hc_mult, -1)

    def finish(self, x: Tensor) -> Tensor:
        """The residual after the last layer to the head's input [..., D]."""
        normed: Tensor = self.model.norm(x if self.model.hc_head is None else self.model.hc_head(x))
        return normed

    def hidden(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        segments_BT: Tensor | None = None,
        pinned: list[Tensor] | None = None,
        *,
        dense: bool = False,
        index_loss: bool = False,
        residual: Tensor | None = None,
    ) -> Hidden:
        """Run the trunk. Without positions and segments each row is one document from position 0.

        `pinned` replaces the routers' choices, except in rows of -1: one [B*T, k] tensor per MoE
        layer. `dense` and `index_loss` as in `Sequences`. `residual` is the output of the previous
        pipeline stage, if there is one.
        """
        if positions_BT is None:
            positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(
                tokens_BT
            )
        sequences = self.sequences(
            tokens_BT, positions_BT, segments_BT, dense=dense, index_loss=index_loss
        )
        x = self.embed(tokens_BT) if residual is None else residual
        routing: list[RouterChoice] = []
        divergences: list[Tensor] = []
        for layer in self.decoder_layers:
            is_moe = isinstance(layer.mlp, MixtureOfExperts)
            x, choice, divergence_BT = self.block(
                layer, x, sequences, pinned[len(routing)] if pinned and is_moe else None
            )
            if choice is not None:
                routing.append(choice)
            if divergence_BT is not None:
                divergences.append(divergence_BT)
        hidden_BTD = self.finish(x) if self.ends else x
        return Hidden(
            sequences, hidden_BTD, x if self.config.is_v4 else hidden_BTD, routing, divergences
        )

    def block(self, run: Callable[..., Any], *arguments: Any) -> Any:
        """Call `run`; with `recompute`, its activations are recomputed in the backward pass."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=False)
        return run(*arguments)

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        segments_BT: Tensor | None = None,
        pinned: list[Tensor] | None = None,
    ) -> Logits:
        """Token ids [B, T] to logits [B, T, V]."""
        x_BTD = self.hidden(tokens_BT, positions_BT, segments_BT, pinned).hidden_BTD
        dtype = self.compute_dtype or x_BTD.dtype
        return Logits(F.linear(x_BTD.to(dtype), self.head_VD.to(dtype)))

    @torch.no_grad()
    def decode(self, flat: FlatTokens, cache: LatentCache, routing: bool = False) -> Decoded:
        """The inference forward: new tokens of many sequences against the cache, prefill and
        decoding mixed. Writes the tokens into the cache. `routing`: return the chosen experts too.
        """
        dtype = self.dtype
        decoding = self.decoding(flat, dtype)
        x = self.embed(flat.tokens_N)
        experts: list[Tensor] = []
        for layer, entries in zip(self.decoder_layers, cache.layers, strict=True):
            x, choice = layer.decode(x, decoding, entries)
            if routing and choice is not None:
                experts.append(choice.indices_Nk)
        x_MD = self.finish(x.index_select(0, flat.wanted_M)).to(dtype)
        logits_MV = F.linear(x_MD, self.head_VD.to(dtype)).float()
        return Decoded(logits_MV, torch.stack(experts) if experts else None)
