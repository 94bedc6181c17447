"""Warm-up, stable, decay: the three parts, their borders, and never below 0 or above 1; and the
other schedules.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xushi.train import PretrainConfig
from xushi.train.schedule import cosine, ramp, warmup_stable_decay


def test_ten_steps_written_out() -> None:
    """Three steps up by quarters, a plateau, four steps down by fifths; the step after the last
    would be 0.
    """
    got = [warmup_stable_decay(step, 10, 3, 0.4) for step in range(10)]
    assert got == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


@given(steps=st.integers(1, 500), warmup=st.integers(0, 600), fraction=st.floats(0, 1))
def test_borders(steps: int, warmup: int, fraction: float) -> None:
    values = [warmup_stable_decay(step, steps, warmup, fraction) for step in range(steps)]
    assert all(0 < value <= 1 for value in values)
    decay = round(steps * fraction)
    plateau = values[warmup : steps - decay]
    assert all(value == 1 for value in plateau), "neither part may reach into the plateau"
    peak = values.index(max(values))
    assert values[: peak + 1] == sorted(values[: peak + 1]) and values[peak:] == sorted(
        values[peak:], reverse=True
    )
    if plateau:
        assert all(value < 1 for value in values[:warmup] + values[steps - decay :])
    if decay:
        assert values[-1] == pytest.approx(min(1 / (decay + 1), steps / (warmup + 1)))


def test_neither_warmup_nor_decay_is_constant() -> None:
    assert [warmup_stable_decay(step, 5, 0, 0.0) for step in range(5)] == [1.0] * 5


def test_the_rate_may_end_above_zero() -> None:
    got = [warmup_stable_decay(step, 10, 0, 0.4, final=0.1) for step in range(10)]
    assert got == pytest.approx([1] * 6 + [0.1 + 0.9 * part for part in (0.8, 0.6, 0.4, 0.2)])


@given(steps=st.integers(2, 60), warmup=st.integers(0, 20), final=st.floats(0, 1))
def test_cosine_is_pytorchs(steps: int, warmup: int, final: float) -> None:
    """torch.optim's CosineAnnealingLR after the warm-up."""
    steps += warmup
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - warmup, eta_min=final)
    for step in range(warmup, steps):
        assert cosine(step, steps, warmup, final) == pytest.approx(
            theirs.get_last_lr()[0], abs=1e-9
        )
        optimizer.step()
        theirs.step()
    assert [cosine(step, steps, warmup, final) for step in range(warmup)] == pytest.approx(
        [(step + 1) / (warmup + 1) for step in range(warmup)]
    )


def test_a_ramp_of_whole_numbers() -> None:
    assert [ramp(step, 4, 2, 10) for step in range(7)] == [2, 4, 6, 8, 10, 10, 10]
    assert [ramp(step, 0, 3, 3) for step in range(3)] == [3, 3, 3]
    config = PretrainConfig(
        steps=6, learning_rate=0.1, batch_tokens=80, batch_tokens_first=16, batch_ramp_steps=4
    )
    assert [config.rows_at(step, 8) for step in range(6)] == [2, 4, 6, 8, 10, 10] and config.tokens(
        8
    ) == 320


def test_what_training_ends_with() -> None:
    config = PretrainConfig(
        steps=10,
        learning_rate=0.1,
        batch_tokens=8,
        mtp_weight_late=0.1,
        mtp_late_fraction=0.3,
        bias_speed_late=0.0,
        bias_late_fraction=0.1,
    )
    assert [config.mtp_weight_at(step) for step in range(10)] == [0.3] * 7 + [0.1] * 3
    assert [config.bias_speed_at(step) for step in range(10)] == [1e-3] * 9 + [0.0]
    plain = PretrainConfig(steps=10, learning_rate=0.1, batch_tokens=8)
    assert {plain.mtp_weight_at(step) for step in range(10)} == {0.3}


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"batch_tokens_first": 8}, "needs both"),
        ({"batch_ramp_steps": 3}, "needs both"),
        ({"batch_tokens_first": 16, "batch_ramp_steps": 3}, "at most batch_tokens"),
        ({"schedule": "cosine", "decay_fraction": 0.2}, "decay_fraction=0.2 has no meaning"),
        ({"schedule": "cosine", "warmup_steps": 10}, "more steps than warmup_steps"),
        ({"final_rate": 1.5}, r"final_rate\n.*less than or equal to 1 "),
        ({"mtp_late_fraction": -1.0}, r"mtp_late_fraction\n.*greater than or equal to 0 "),
        ({"bias_speed_late": -1.0}, r"bias_speed_late\n.*greater than or equal to 0 "),
    ],
)
def test_what_cannot_be_is_refused(keys: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PretrainConfig(steps=10, learning_rate=0.1, batch_tokens=8, **keys)
