"""The latent cache against a plain dictionary of lists, for any calls in any order."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from xushi.base.errors import XushiError
from xushi.model import LatentCache, ModelConfig

CONFIG = ModelConfig(
    hidden_size=8, num_hidden_layers=2, num_attention_heads=1, kv_lora_rank=3, qk_rope_head_dim=2
)


class CacheMachine(RuleBasedStateMachine):
    """The expected state: `held` maps sequence ids to their tokens, `written` slots to their
    content.

    As in the model, a slot is written when `extend` returns it. A sequence's tokens must be read
    back through its slots for as long as it lives. A slot that is reused too early, or shared by
    mistake, gets overwritten, and this fails.
    """

    sequences = Bundle("sequences")

    @initialize(slots=st.integers(0, 12))
    def start(self, slots: int) -> None:
        self.slots, self.cache = slots, LatentCache(CONFIG, slots)
        self.held: dict[int, list[int]] = {}
        self.marks: dict[int, list[int]] = {}  # a unique mark per token, in place of its latent
        self.written: dict[int, int] = {}
        self.mark = 0

    @rule(target=sequences)
    def allocate(self) -> int:
        sequence = self.cache.allocate()
        assert sequence not in self.held
        self.held[sequence], self.marks[sequence] = [], []
        return sequence

    @rule(target=sequences, source=sequences)
    def fork(self, source: int) -> int:
        before = self.cache.available
        copy = self.cache.fork(source)
        assert copy not in self.held and self.cache.available == before, "a fork takes no slots"
        self.held[copy], self.marks[copy] = list(self.held[source]), list(self.marks[source])
        return copy

    @rule(
        which=st.lists(sequences, min_size=1, max_size=3, unique=True),
        sizes=st.lists(st.integers(1, 4), min_size=3, max_size=3),
        wanted=st.sampled_from(["last", "all"]),
    )
    def extend(self, which: list[int], sizes: list[int], wanted: str) -> None:
        additions = [
            (s, [100 * s + len(self.held[s]) + i for i in range(n)])
            for s, n in zip(which, sizes, strict=False)
        ]
        need, free = sum(len(tokens) for _, tokens in additions), self.cache.available
        if need > free:
            with pytest.raises(XushiError) as error:
                self.cache.extend(additions, wanted)
            assert (
                error.value.exit_code == 1
                and str(free) in error.value.problem
                and error.value.remedy
            )
            return  # and nothing has changed, as the invariants go on to see
        flat = self.cache.extend(additions, wanted)
        assert self.cache.available == free - need
        assert flat.tokens_N.tolist() == [token for _, tokens in additions for token in tokens]
        assert flat.rows_N.tolist() == [
            row for row, (_, tokens) in enumerate(additions) for _ in tokens
        ]
        assert flat.columns_N.tolist() == [i for _, tokens in additions for i in range(len(tokens))]
        assert flat.positions_N.tolist() == [
            len(self.held[s]) + i for s, tokens in additions for i in range(len(tokens))
        ]
        ends = [n for n in range(need) if n + 1 == need or flat.rows_N[n] != flat.rows_N[n + 1]]
        assert flat.wanted_M.tolist() == (ends if wanted == "last" else list(range(need)))
        slots = flat.slots_N.tolist()
        assert len(set(slots)) == need and all(0 <= slot < self.slots for slot in slots)
        for row, slot in zip(flat.rows_N.tolist(), slots, strict=True):
            self.mark += 1
            self.written[slot] = self.mark
            self.marks[which[row]].append(self.mark)
        longest = max(len(self.marks[s]) for s, _ in additions)
        assert flat.slot_table_SL.shape == (len(additions), longest)
        for row, (s, tokens) in enumerate(additions):
            self.held[s] += tokens
            table = flat.slot_table_SL[row].tolist()
            assert [self.written[slot] for slot in table[: len(self.marks[s])]] == self.marks[s]
            assert not any(table[len(self.marks[s]) :])

    @rule(sequence=sequences, data=st.data())
    def truncate(self, sequence: int, data: st.DataObject) -> None:
        length = data.draw(st.integers(0, len(self.held[sequence])))
        self.cache.truncate(sequence, length)
        del self.held[sequence][length:], self.marks[sequence][length:]

    @rule(sequence=sequences, beyond=st.integers(1, 3))
    def truncate_wrongly(self, sequence: int, beyond: int) -> None:
        for length in (-beyond, len(self.held[sequence]) + beyond):
            with pytest.raises(ValueError):
                self.cache.truncate(sequence, length)

    @rule(sequence=consumes(sequences))
    def free(self, sequence: int) -> None:
        self.cache.free(sequence)
        del self.held[sequence], self.marks[sequence]
        with pytest.raises(KeyError):
            self.cache.length(sequence)

    @rule(target=sequences, sequence=consumes(sequences))
    def unload_and_load(self, sequence: int) -> int:
        slots = self.cache._slots[sequence]
        for layer in self.cache.layers:
            for slot in slots:
                layer[slot] = self.written[slot]
        entries = self.cache.unload(sequence)
        if len(entries[0]) > self.cache.available:
            with pytest.raises(XushiError, match="free slots"):
                self.cache.load(entries)
            loaded = self.cache.allocate()
            self.marks[loaded], self.held[loaded] = [], []
        else:
            loaded = self.cache.load(entries)
            self.marks[loaded], self.held[loaded] = [], self.held[sequence]
            for slot, mark in zip(self.cache._slots[loaded], self.marks[sequence], strict=True):
                # What was shared with another sequence is a copy now.
                assert all(bool((layer[slot] == mark).all()) for layer in self.cache.layers)
                self.mark += 1
                self.written[slot] = self.mark
                self.marks[loaded].append(self.mark)
        del self.held[sequence], self.marks[sequence]
        return loaded

    @invariant()
    def lengths_and_slots_add_up(self) -> None:
        if not hasattr(self, "cache"):
            return
        assert all(self.cache.length(s) == len(tokens) for s, tokens in self.held.items())
        # Two sequences share tokens exactly if one was forked from the other and neither has
        # truncated them since.
        in_use = {mark for marks in self.marks.values() for mark in marks}
        assert self.cache.available == self.slots - len(in_use)

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            for sequence in list(self.held):
                self.cache.free(sequence)
            assert self.cache.available == self.slots, "a slot leaked"


CacheMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestCache = CacheMachine.TestCase


def test_entries_are_the_latent_and_the_rotated_key_of_each_layer() -> None:
    cache = LatentCache(CONFIG, 7, torch.bfloat16)
    assert [tuple(layer.shape) for layer in cache.layers] == [(7, 5), (7, 5)]
    assert all(layer.dtype == torch.bfloat16 for layer in cache.layers)


def test_a_full_cache_says_what_to_do_and_works_on() -> None:
    cache = LatentCache(CONFIG, 3)
    first = cache.allocate()
    cache.extend([(first, [1, 2])])
    with pytest.raises(XushiError, match="1 free slots and 2 are needed"):
        cache.extend([(first, [3, 4])])
    assert cache.length(first) == 2 and cache.available == 1
    cache.extend([(first, [3])])
    cache.free(first)
    assert cache.available == 3


def test_clearing_leaves_nothing_of_a_failed_call() -> None:
    """NaN would stay NaN where it is masked."""
    cache = LatentCache(CONFIG, 6)
    first = cache.allocate()
    slots = cache.extend([(first, [1, 2, 3])])
    assert slots is not None
    for layer in cache.layers:
        layer[:3] = float("nan")  # those given away, wherever they are
        layer[-3:] = float("nan")
    used = set(cache._slots[first])
    cache.clear()
    assert cache.available == 6
    for layer in cache.layers:
        assert all(not layer[slot].isnan().any() for slot in used)
