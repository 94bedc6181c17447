"""The cache of latents, and the flat tokens that the decoding forward takes.

A slot holds what one token of one sequence keeps in every layer. For MLA: the latent and the
rotated key (DeepSeek-V2, arXiv:2405.04434, section 2.1), and V3.2's index key. For V4: the key for
the sliding window, the token's projections for the compressor, and, if the token closes a
compression window, that window's entry. A slot never changes once it is written. So a fork shares
slots by counting references and copies nothing, and truncation only drops references, wherever a
sequence is cut.

V4's tokens keep all of this for as long as the sequence lives. Freeing what is not needed beyond
the sliding window is not implemented.

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
    """The tokens of one decoding call, prefill chunks and single steps mixed. All are int64."""

    tokens_N: Tensor  # token ids
    rows_N: Tensor  # the token's sequence within the call, 0 <= row < S
    columns_N: Tensor  # its index among the sequence's new tokens
    positions_N: Tensor  # its position in the sequence
    slots_N: Tensor  # the slot it is written to
    slot_table_SL: Tensor  # slots of each sequence's positions, with the new ones; padded with 0
    wanted_M: Tensor  # indices into N of the tokens whose logits are wanted


def by_sequence(values_N: Tensor, flat: FlatTokens) -> Tensor:
    """[N, ...] to [S, Q, ...], padded with zeros for sequences with fewer than Q new tokens."""
    longest = int(flat.columns_N.max()) + 1
    values = values_N.new_zeros(flat.slot_table_SL.shape[0], longest, *values_N.shape[1:])
    values[flat.rows_N, flat.columns_N] = values_N
    return values


def read_slots(entries: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows `slots` [...] of a layer's cache [slots, width]: [..., width] in `dtype`."""
    return entries.index_select(0, slots.flatten()).view(*slots.shape, entries.shape[-1]).to(dtype)


def slot_widths(config: ModelConfig, layer: int) -> tuple[int, int]:
    """Values that a token keeps in layer `layer`, and how many of them, at the end of the slot, are
    the compressed entry.
    """
    if not config.is_v4:
        index_key = config.index_head_dim if config.has_indexer else 0
        return config.kv_lora_rank + config.qk_rope_head_dim + index_key, 0
    key = config.head_dim
    rate = config.compress_ratio(layer)
    if rate == 0:
        return key, 0
    # The compressor needs values and gates, of one series (HCA) or two (CSA, which also has the
    # indexer's compressor).
    series = 1 if rate == config.compress_rate_hca else 2
    entry = key if rate == config.compress_rate_hca else key + config.index_head_dim
    return key + 2 * series * entry + entry, entry


class LatentCache:
    """A cache of `slots` tokens over all layers; sequences can be allocated, forked, truncated and
    freed.
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
        self._slots: dict[int, list[int]] = {}
        self._next = 0
        self._touched = 0  # slots from this one on have never been given away
        self.clear()

    def clear(self) -> None:
        """Remove all sequences, in any state that a failed call has left."""
        # Such a call may have left NaN, which stays NaN where it is masked.
        for layer in self.layers:
            layer[: self._touched].zero_()
        slots = len(self.layers[0])
        self._slots.clear()
        self._references = [0] * slots
        self._unused = list(range(slots - 1, -1, -1))

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
        """A new sequence with all tokens of `sequence`, whose slots it shares; returns its id."""
        copy = self.allocate()
        self._slots[copy] = list(self._slots[sequence])
        for slot in self._slots[copy]:
            self._references[slot] += 1
        return copy

    def length(self, sequence: int) -> int:
        """The number of tokens of `sequence`."""
        return len(self._slots[sequence])

    def truncate(self, sequence: int, length: int) -> None:
        """Drop all tokens from position `length` on."""
        slots = self._slots[sequence]
        if not 0 <= length <= len(slots):
            raise ValueError(f"cannot truncate a sequence of {len(slots)} tokens to {length}")
        for slot in slots[length:]:
            self._release(slot)
        del slots[length:]

    def free(self, sequence: int) -> None:
        """Remove the sequence."""
        self.truncate(sequence, 0)
        del self._slots[sequence]

    def unload(self, sequence: int) -> list[Tensor]:
        """Free a sequence and return its slots' contents: [tokens, width] of each layer, on the
        CPU.
        """
        slots = torch.tensor(self._slots[sequence], dtype=torch.int64, device=self.device)
        entries = [layer.index_select(0, slots).cpu() for layer in self.layers]
        self.free(sequence)
        return entries

    def load(self, entries: Sequence[Tensor]) -> int:
        """A new sequence with the contents that `unload` returned, in as many slots; returns its
        id.
        """
        self._check_free(len(entries[0]))
        sequence = self.allocate()
        slots = self._append(sequence, len(entries[0]))
        index = torch.tensor(slots, dtype=torch.int64, device=self.device)
        for layer, values in zip(self.layers, entries, strict=True):
            layer.index_copy_(0, index, values.to(self.device))
        return sequence

    def extend(
        self, additions: Sequence[tuple[int, Sequence[int]]], wanted: str = "last"
    ) -> FlatTokens:
        """Reserve slots for new tokens of some sequences and lay them out for `Deepseek.decode`.

        `additions` holds (sequence id, token ids), each sequence at most once and with at least one
        token. `wanted` is "last" (logits of each sequence's last new token, in the order given) or
        "all" (of every new token).
        """
        self._check_free(sum(len(tokens) for _, tokens in additions))
        tokens_N: list[int] = []
        rows: list[int] = []
        columns: list[int] = []
        positions: list[int] = []
        slots_N: list[int] = []
        ends: list[int] = []
        for row, (sequence, tokens) in enumerate(additions):
            start = self.length(sequence)
            new = self._append(sequence, len(tokens))
            tokens_N.extend(tokens)
            rows.extend([row] * len(new))
            columns.extend(range(len(new)))
            positions.extend(range(start, start + len(new)))
            slots_N.extend(new)
            ends.append(len(tokens_N) - 1)
        table = self._padded([sequence for sequence, _ in additions])
        if wanted == "all":
            ends = list(range(len(tokens_N)))
        parts = (tokens_N, rows, columns, positions, slots_N, table, ends)
        return FlatTokens(
            *(torch.tensor(part, dtype=torch.int64, device=self.device) for part in parts)
        )

    def _check_free(self, needed: int) -> None:
        if needed > self.available:
            raise Failed(
                f"the cache has {self.available} free slots and {needed} are needed",
                "ask for fewer or shorter sequences at once, or give the cache more slots",
            )

    def _append(self, sequence: int, count: int) -> list[int]:
        """Give `sequence` `count` free slots."""
        new = [self._unused.pop() for _ in range(count)]
        self._touched = max([self._touched, *(slot + 1 for slot in new)])
        for slot in new:
            self._references[slot] = 1
        self._slots[sequence].extend(new)
        return new

    def _padded(self, sequences: list[int]) -> list[list[int]]:
        """The slots of some sequences, padded with 0 to the longest."""
        tables = [self._slots[sequence] for sequence in sequences]
        longest = max(len(slots) for slots in tables)
        return [slots + [0] * (longest - len(slots)) for slots in tables]

    def _release(self, slot: int) -> None:
        self._references[slot] -= 1
        if self._references[slot] == 0:
            self._unused.append(slot)
