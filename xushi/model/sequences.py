"""What all layers of one forward share: over whole sequences, and over flat tokens against a cache.

V4's compressed entries lie where a window of `rate` tokens of one document is complete; windows
restart with every document of a packed row, and a window that its document does not fill has no
entry.

Axes: B batch, T tokens, R/2 rotated pairs, W windows, M tokens of a window, N flat tokens, S
sequences of a call.
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
    """The windows of `rate` tokens in a batch, each row's in order and then padding."""

    # places in the row: the window's tokens, before them the window before's (2 * rate in all)
    members_BWM: Tensor
    has_previous_BW: Tensor  # whether that window before exists
    visible_BTW: Tensor  # whether a token may look at the window's entry
    angles: Angles  # of the windows' first positions


def windows_of(
    positions_BT: Tensor,
    segments_BT: Tensor | None,
    rate: int,
    angles_of: Callable[[Tensor], Angles],
) -> Windows:
    """A batch's windows; `angles_of` gives positions their angles.

    Positions count from 0 in every document of a row. A window closes at a token whose position is
    rate - 1 modulo `rate`, and is visible from there on to its own document.
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
    """Whole sequences. `angles` are the tokens' own; V4's compressed layers use `compress_angles`.

    `mask` and `starts_BT` are as `ops.causal_attention` takes them; blocks compute in `dtype`. With
    an indexer, `dense` attention looks at everything and not at its choice, and `index_loss` asks
    for its divergence from the attention. V4's layers further share the sliding window [B, T, T]
    and the windows by rate.
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
    """[B, T, T], True where a query may look: itself and the `window` - 1 tokens before it, in its
    own document.
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

    members_WM: (
        Tensor  # slots of the window's tokens, before them the window before's (2 * rate in all)
    )
    has_previous_W: Tensor  # whether that window before exists
    slots_W: Tensor  # of the tokens that close them, which keep the entries
    angles: Angles  # of the windows' first positions


def completed_windows(
    flat: FlatTokens, rate: int, angles_of: Callable[[Tensor], Angles]
) -> CompletedWindows:
    """What the call completes; `angles_of` gives positions their angles."""
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
    """Flat tokens against a cache, in the blocks' dtype; V4's compressed layers use
    `compress_angles`.
    """

    flat: FlatTokens
    angles: Angles
    dtype: torch.dtype
    compress_angles: Angles | None = None
    windows: dict[int, CompletedWindows] = field(default_factory=dict)  # by rate
