"""The reinforcement-learning part of a recipe refuses what could not learn."""

import pytest
from pydantic import ValidationError

from xushi.rl import RLConfig

SOUND = {"steps": 10, "learning_rate": 0.001}


@pytest.mark.parametrize(
    "changes",
    [
        {"samples": 1},
        {"prompts": 0},
        {"max_tokens": 0},
        {"sequence_length": 0},
        {"temperature": 0.0},
        {"bias_speed": -0.1},
    ],
)
def test_unsound_values(changes: dict) -> None:
    RLConfig(**SOUND)
    with pytest.raises(ValidationError, match=next(iter(changes))):
        RLConfig(**(SOUND | changes))


@pytest.mark.parametrize(
    "key", ["mtp_weight", "balance_weight", "indexer_weight", "allow_unbalanced"]
)
def test_what_reinforcement_learning_has_not_may_not_be_asked_of_it(key: str) -> None:
    with pytest.raises(ValidationError, match=key):
        RLConfig(**(SOUND | {key: 0.1}))


def test_the_clips_of_the_design() -> None:
    assert (RLConfig(**SOUND).clip_low, RLConfig(**SOUND).clip_high) == (0.2, 0.28)
