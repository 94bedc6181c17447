"""The reinforcement-learning part of a recipe refuses what could not learn."""

import pytest
from pydantic import ValidationError

from xushi.rl import RLConfig

SOUND = {"steps": 10, "learning_rate": 0.001}


@pytest.mark.parametrize("changes", [{"samples": 1}, {"prompts": 0}, {"max_tokens": 0}, {"sequence_length": 0},
                                     {"temperature": 0.0}, {"balance_weight": 0.0, "bias_speed": 0.0}])
def test_unsound_values(changes: dict) -> None:
    RLConfig(**SOUND)
    with pytest.raises(ValidationError, match=next(iter(changes))):
        RLConfig(**(SOUND | changes))


def test_the_clips_of_the_design() -> None:
    assert (RLConfig(**SOUND).clip_low, RLConfig(**SOUND).clip_high) == (0.2, 0.28)
