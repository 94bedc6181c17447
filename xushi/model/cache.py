"""The cache and the flat tokens that the decoding forward takes.

A slot holds what one token of one sequence keeps in every layer, final once written: MLA's latent
and rotated key (DeepSeek-V2, arXiv:2405.04434, section 2.1), V3.2's index key beside them; in V4
the key of its window, what it gives to the compressor and, if it closes a compression window, that
window's entry. So a fork shares slots by counting references and never copies, and truncation drops
references: nothing else depends on where a sequence was cut.

V4's tokens keep all of it for as long as the sequence lives, more than the entries need; giving the
rest back beyond the sliding window is not done yet.

Axes: N flat tokens of one call, S sequences in it, L cached positions, Q new tokens of a sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xushi.base.errors import Failed
from xushi.model.config import ModelConfig


@dataclass(frozen=True)
class FlatTokens:
    """One decoding call: prefill chunks and single steps mixed. All tensors are int64."""

    tokens_N: Tensor
    rows_N: Tensor  # which sequence of the call, 0 <= row < S
    columns_N: Tensor  # place inside that sequence's new tokens
    positions_N: Tensor  # place inside that sequence
    slots_N: Tensor  # where the token's cache entry goes
    slot_table_SL: (
        Tensor  # slots of all positions of each sequence, new ones included; padded with 0
    )
    wanted_M: Tensor  # indices into N of the tokens whose logits are wanted


def by_sequence(values_N: Tensor, flat: FlatTokens) -> Tensor:
    """[N, ...] to [S, Q, ...], zero where a sequence has fewer than Q new tokens."""
    longest = int(flat.columns_N.max()) + 1
    values = values_N.new_zeros(flat.slot_table_SL.shape[0], longest, *values_N.shape[1:])
    values[flat.rows_N, flat.columns_N] = values_N
    return values


def read_slots(entries: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """A layer's cache [slots, width] at `slots` [...]: [..., width]."""
    return entries.index_select(0, slots.flatten()).view(*slots.shape, entries.shape[-1]).to(dtype)


def slot_widths(config: ModelConfig, layer: int) -> tuple[int, int]:
    """Values that a token keeps in layer `layer`, and of these, at the end, the compressed entry it
    may close.
    """
    if not config.is_v4:
        return config.kv_lora_rank + config.qk_rope_head_dim + (
            config.index_head_dim if config.has_indexer else 0
        ), 0
    key, rate = config.head_dim, config.compress_ratio(layer)
    if rate == 0:
        return key, 0
    # What goes to the compressor: values and gates, of one series (HCA) or of two (CSA).
    series, entry = (
        (1, key) if rate == config.compress_rate_hca else (2, key + config.index_head_dim)
    )
    return key + 2 * series * entry + entry, entry


class LatentCache:
    """Slots for `slots` tokens over all layers, with allocate, fork, truncate and free of
    sequences.
    """

    def __init__(
        self,
        config: ModelConfig,
        slots: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.layers = [
            torch.zeros(slots, slot_widths(config, layer)[0], dtype=dtype, device=device)
            for layer in range(config.num_hidden_layers)
        ]
        self._references = [0] * slots
        self._unused = list(range(slots - 1, -1, -1))
        self._slots: dict[int, list[int]] = {}
        self._next = 0

    @property
    def available(self) -> int:
        """Slots that no sequence holds."""
        return len(self._unused)

    def allocate(self) -> int:
        """A new, empty sequence; returns its id."""
        self._slots[self._next] = []
        self._next += 1
        return self._next - 1

    def fork(self, sequence: int) -> int:
        """A new sequence that begins with everything `sequence` holds; shares its slots."""
        copy = self.allocate()
        self._slots[copy] = list(self._slots[sequence])
        for slot in self._slots[copy]:
            self._references[slot] += 1
        return copy

    def length(self, sequence: int) -> int:
        """Tokens that `sequence` holds."""
        return len(self._slots[sequence])

    def truncate(self, sequence: int, length: int) -> None:
        """Forget everything from position `length` on."""
        slots = self._slots[sequence]
        if not 0 <= length <= len(slots):
            raise ValueError(f"cannot truncate a sequence of {len(slots)} tokens to {length}")
        for slot in slots[length:]:
            self._release(slot)
        del slots[length:]

    def free(self, sequence: int) -> None:
        """Forget the sequence altogether."""
        self.truncate(sequence, 0)
        del self._slots[sequence]

    def unload(self, sequence: int) -> list[Tensor]:
        """Free a sequence and return what it held: [tokens, width] of each layer, on the CPU."""
        slots = torch.tensor(self._slots[sequence], dtype=torch.int64, device=self.device)
        entries = [layer.index_select(0, slots).cpu() for layer in self.layers]
        self.free(sequence)
        return entries

    def load(self, entries: Sequence[Tensor]) -> int:
        """A new sequence that holds what `unload` returned; it takes a slot for each token."""
        sequence = self.allocate()
        slots = self._take(len(entries[0]))
        self._slots[sequence] = slots
        index = torch.tensor(slots, dtype=torch.int64, device=self.device)
        for layer, values in zip(self.layers, entries, strict=True):
            layer.index_copy_(0, index, values.to(self.device))
        return sequence

    def extend(
        self, additions: Sequence[tuple[int, Sequence[int]]], wanted: str = "last"
    ) -> FlatTokens:
        """Reserve slots for new tokens of some sequences and lay them out for `Deepseek.decode`.

        `additions` holds (sequence id, token ids), each sequence at most once and with at least one
        token; `wanted` is "last" (logits of each sequence's last new token, in the order given) or
        "all" (of every new token).
        """
        taken = self._take(sum(len(tokens) for _, tokens in additions))
        tokens_N: list[int] = []
        rows: list[int] = []
        columns: list[int] = []
        positions: list[int] = []
        slots_N: list[int] = []
        ends: list[int] = []
        for row, (sequence, tokens) in enumerate(additions):
            held = self._slots[sequence]
            start = len(held)
            new = taken[len(tokens_N) : len(tokens_N) + len(tokens)]
            held.extend(new)
            tokens_N.extend(tokens)
            rows.extend([row] * len(new))
            columns.extend(range(len(new)))
            positions.extend(range(start, start + len(new)))
            slots_N.extend(new)
            ends.append(len(tokens_N) - 1)
        longest = max(len(self._slots[sequence]) for sequence, _ in additions)
        table = [
            self._slots[sequence] + [0] * (longest - len(self._slots[sequence]))
            for sequence, _ in additions
        ]

        def on_device(values: list[int] | list[list[int]]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=self.device)

        return FlatTokens(
            on_device(tokens_N),
            on_device(rows),
            on_device(columns),
            on_device(positions),
            on_device(slots_N),
            on_device(table),
            on_device(ends if wanted == "last" else list(range(len(tokens_N)))),
        )

    def _take(self, count: int) -> list[int]:
        """Slots for `count` new tokens of one sequence each."""
        if count > self.available:
            raise Failed(
                f"the cache has {self.available} free slots and {count} are needed",
                "ask for fewer or shorter sequences at once, or give the cache more slots",
            )
        slots = [self._unused.pop() for _ in range(count)]
        for slot in slots:
            self._references[slot] = 1
        return slots

    def _release(self, slot: int) -> None:
        self._references[slot] -= 1
        if self._references[slot] == 0:
            self._unused.append(slot)
