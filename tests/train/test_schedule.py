"""Warm-up, stable, decay: the three parts, their borders, and never below 0 or above 1."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xushi.train.schedule import warmup_stable_decay


def test_ten_steps_written_out() -> None:
    """Three steps up by quarters, a plateau, four steps down by fifths; the step after the last would be 0."""
    got = [warmup_stable_decay(step, 10, 3, 0.4) for step in range(10)]
    assert got == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


@given(steps=st.integers(1, 500), warmup=st.integers(0, 600), fraction=st.floats(0, 1))
def test_borders(steps: int, warmup: int, fraction: float) -> None:
    values = [warmup_stable_decay(step, steps, warmup, fraction) for step in range(steps)]
    assert all(0 < value <= 1 for value in values)
    decay = round(steps * fraction)
    plateau = values[warmup:steps - decay]
    assert all(value == 1 for value in plateau), "neither part may reach into the plateau"
    peak = values.index(max(values))
    assert values[:peak + 1] == sorted(values[:peak + 1]) and values[peak:] == sorted(values[peak:], reverse=True)
    if plateau:
        assert all(value < 1 for value in values[:warmup] + values[steps - decay:])
    if decay:
        assert values[-1] == pytest.approx(min(1 / (decay + 1), steps / (warmup + 1)))


def test_neither_warmup_nor_decay_is_constant() -> None:
    assert [warmup_stable_decay(step, 5, 0, 0.0) for step in range(5)] == [1.0] * 5
