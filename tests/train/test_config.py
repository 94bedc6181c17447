"""The training parts of a recipe: an unbalanced mixture is refused, and so is what would divide by
zero later.
"""

import math

import pytest
from pydantic import ValidationError

from xushi.base.config import parse
from xushi.base.errors import XushiError
from xushi.train import ObjectiveConfig, PretrainConfig, SFTConfig

SOUND = {"steps": 10, "learning_rate": 0.01}


def test_a_mixture_without_balancing_is_refused_unless_asked_for() -> None:
    off = SOUND | {"balance_weight": 0.0, "bias_speed": 0.0}
    with pytest.raises(XushiError) as error:
        parse(ObjectiveConfig, off, "recipes/mine.toml: pretrain")
    assert "unbalanced" in error.value.problem and "allow_unbalanced" in error.value.problem
    assert parse(ObjectiveConfig, off | {"allow_unbalanced": True}, "here").bias_speed == 0
    for one in ({"balance_weight": 0.0}, {"bias_speed": 0.0}):
        ObjectiveConfig(**(SOUND | one))


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0},
        {"checkpoint_every": 0},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"gradient_clip": 0.0},
        {"warmup_steps": -1},
        {"weight_decay": -0.1},
        {"mtp_weight": -1.0},
        {"balance_weight": -1.0},
        {"bias_speed": -1.0},
        {"beta1": 1.0},
        {"epsilon": 0.0},
        {"beta2": -0.1},
        {"decay_fraction": 1.1},
        {"optimizer": "sgd"},
        {"dtype": "fp16"},
        {"step": 10},
    ],
)
def test_unsound_values(changes: dict) -> None:
    with pytest.raises(ValidationError, match=next(iter(changes))):
        ObjectiveConfig(**(SOUND | changes))


@pytest.mark.parametrize(
    "config, sound, changes",
    [
        (PretrainConfig, {"batch_tokens": 64}, {"batch_tokens": 0}),
        (PretrainConfig, {"batch_tokens": 64}, {"evaluate_every": 0}),
        (PretrainConfig, {"batch_tokens": 64}, {"evaluate_tokens": 0}),
        (SFTConfig, {"batch_examples": 8}, {"batch_examples": 0}),
        (SFTConfig, {"batch_examples": 8}, {"sequence_length": 0}),
        (SFTConfig, {"batch_examples": 8}, {"thinking_share": 1.1}),
        (SFTConfig, {"batch_examples": 8}, {"follow_up_share": 1.0}),
    ],
)
def test_unsound_sizes(config: type, sound: dict, changes: dict) -> None:
    config(**SOUND, **sound)
    with pytest.raises(ValidationError, match=next(iter(changes))):
        config(**(SOUND | sound | changes))
