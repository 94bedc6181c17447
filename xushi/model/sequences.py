"""The data that all layers of a forward share, for whole sequences and for decoding.

In V4 every complete window of `rate` tokens of a document has one compressed entry. Windows restart
with every document of a packed row, and an incomplete window at a document's end has no entry.

Axes: B batch, T tokens, R/2 rotated pairs, W windows, M tokens of a window and of the one before it
(2 * rate), N flat tokens, S sequences of a call, L cached positions.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from xushi.model.cache import FlatTokens
from xushi.ops.attention import segment_mask

Angles = tuple[Tensor, Tensor]  # cos and sin, [..., R/2]


@dataclass(frozen=True)
class Windows:
    """The windows of `rate` tokens in a batch. Each row's windows are in order, then padded."""

    members_BWM: Tensor  # columns of the previous window's tokens and then of the window's own
    has_previous_BW: Tensor  # whether the previous window exists
    visible_BTW: Tensor  # whether a token may attend to the window's entry
    angles: Angles  # of each window's first position


def windows_of(
    positions_BT: Tensor,
    segments_BT: Tensor | None,
    rate: int,
    angles_of: Callable[[Tensor], Angles],
) -> Windows:
    """A batch's windows of `rate` tokens. `angles_of` maps positions to angles.

    Positions start at 0 in every document of a row. A window ends at a token whose position is rate
    - 1 modulo `rate`; from that token on its document may attend to the window's entry.
    """
    length = positions_BT.shape[1]
    closes_BT = positions_BT % rate == rate - 1
    last_BW = closes_BT.long().argsort(dim=1, descending=True, stable=True)[:, : length // rate]
    number_BW = positions_BT.gather(1, last_BW) // rate
    visible_BTW = closes_BT.gather(1, last_BW)[:, None] & (
        number_BW[:, None] < (positions_BT[..., None] + 1) // rate
    )
    if segments_BT is not None:
        visible_BTW = visible_BTW & (
            segments_BT.gather(1, last_BW)[:, None] == segments_BT[..., None]
        )
    members_BWM = last_BW[..., None] + torch.arange(1 - 2 * rate, 1, device=last_BW.device)
    return Windows(
        members_BWM.clamp(min=0), number_BW > 0, visible_BTW, angles_of(number_BW * rate)
    )


@dataclass(frozen=True)
class Sequences:
    """The shared data of a forward over whole sequences.

    `mask` and `starts_BT` are arguments of `ops.causal_attention`. Blocks compute in `dtype`.
    `angles` are for all layers but V4's compressed ones, which use `compress_angles`. `dense`:
    attention ignores the indexer's choice and uses all keys. `index_loss`: indexers return their
    divergence from the attention. For V4 only: the mask of the sliding window and the compression
    windows by rate.
    """

    tokens_BT: Tensor
    angles: Angles
    mask: Tensor | None
    dtype: torch.dtype
    dense: bool = False
    index_loss: bool = False
    compress_angles: Angles | None = None
    window_BTT: Tensor | None = None
    windows: dict[int, Windows] = field(default_factory=dict)
    starts_BT: Tensor | None = None


def sliding_window(positions_BT: Tensor, segments_BT: Tensor | None, window: int) -> Tensor:
    """[B, T, T], True for the keys in a query's sliding window: itself and the `window` - 1 tokens
    before it, within its document.
    """
    length = positions_BT.shape[1]
    mask = None if segments_BT is None else segment_mask(segments_BT)
    ones = torch.ones(length, length, dtype=torch.bool, device=positions_BT.device)
    near = ones.tril() & ones.triu(1 - window)
    return (near[None] if mask is None else near & mask[:, 0]).expand(
        positions_BT.shape[0], length, length
    )


@dataclass(frozen=True)
class CompletedWindows:
    """The windows of `rate` tokens that a decoding call completes."""

    members_WM: Tensor  # slots of the previous window's tokens and then of the window's own
    has_previous_W: Tensor  # whether the previous window exists
    slots_W: Tensor  # slots of the windows' last tokens, which store the entries
    angles: Angles  # of each window's first position


def completed_windows(
    flat: FlatTokens, rate: int, angles_of: Callable[[Tensor], Angles]
) -> CompletedWindows:
    """The windows of `rate` tokens that a call completes. `angles_of` maps positions to angles."""
    closes_N = flat.positions_N % rate == rate - 1
    positions_W = flat.positions_N[closes_N]
    places_WM = (
        positions_W[:, None] + torch.arange(1 - 2 * rate, 1, device=positions_W.device)
    ).clamp(min=0)
    members_WM = flat.slot_table_SL.index_select(0, flat.rows_N[closes_N]).gather(1, places_WM)
    return CompletedWindows(
        members_WM, positions_W >= rate, flat.slots_N[closes_N], angles_of(positions_W + 1 - rate)
    )


@dataclass(frozen=True)
class Decoding:
    """The shared data of a decoding call. Blocks compute in `dtype`; V4's compressed layers use
    `compress_angles`.
    """

    flat: FlatTokens
    angles: Angles
    dtype: torch.dtype
    compress_angles: Angles | None = None
    windows: dict[int, CompletedWindows] = field(default_factory=dict)  # by rate
