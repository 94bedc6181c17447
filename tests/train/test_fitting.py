"""Layouts that fit a model: layers are divided among stages, and what cannot work is refused with
something that can.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xushi.base.errors import XushiError
from xushi.train import LayoutConfig, check_layout
from xushi.train.fitting import stage_layers

from .layouts import MODELS, THIRD


@given(st.integers(1, 64), st.integers(0, 3), st.data())
def test_every_layer_is_in_one_stage_and_every_stage_has_one(
    depth: int, extra: int, data: st.DataObject
) -> None:
    stages = data.draw(st.integers(1, depth))
    model = MODELS["v3"].model_copy(
        update={"num_hidden_layers": depth, "num_nextn_predict_layers": extra}
    )
    parts = stage_layers(model, stages)
    assert [layer for first, end in parts for layer in range(first, end)] == list(range(depth))
    sizes = [end - first for first, end in parts]
    assert len(parts) == stages and min(sizes) >= 1
    assert max(sizes[:-1], default=0) - min(sizes[:-1], default=0) <= 1 or min(sizes) == 1


@pytest.mark.parametrize(
    "layout, processes, problem, remedy",
    [
        (
            {"data": 4},
            2,
            "layout.data=4 times layout.pipeline=1 is 4, and 2 processes",
            "layout.data=2",
        ),
        (
            {"data": 4, "pipeline": 2},
            4,
            "layout.data=4 times layout.pipeline=2 is 8, and 4 processes",
            "layout.data=2",
        ),
        (
            {"pipeline": 3},
            3,
            "layout.pipeline=3 has more stages than the model's 2 layers",
            "layout.pipeline=2 or less",
        ),
        (
            {"pipeline": 2},
            3,
            "layout.pipeline=2 does not divide the 3 processes",
            "set layout.pipeline=1, or start",
        ),
        (
            {"expert": 3},
            4,
            "layout.expert=3 does not work with layout.data=4 and 4 experts",
            "set layout.expert=2",
        ),
        ({"expert": 8}, 4, "layout.expert=8 does not work", "set layout.expert=4"),
        (
            {"expert": 1},
            5,
            "layout.expert=1 does not work with layout.data=5",
            "number of processes that divides",
        ),
    ],
)
def test_a_layout_that_cannot_be_is_refused_with_one_that_can(
    layout: dict, processes: int, problem: str, remedy: str
) -> None:
    with pytest.raises(XushiError) as error:
        check_layout(LayoutConfig(**layout), THIRD, processes)
    assert (
        problem in error.value.problem
        and remedy in error.value.remedy
        and error.value.exit_code == 2
    )


def test_a_batch_that_does_not_divide_is_refused_unless_shares_may_be_unequal() -> None:
    with pytest.raises(XushiError) as error:
        check_layout(LayoutConfig(pipeline=2), THIRD, 6, rows=8)
    assert error.value.problem == "a batch of 8 rows does not divide among layout.data=3 processes"
    assert error.value.remedy.startswith(
        "start 4 processes, take 9 rows (pretrain.batch_tokens), or set layout.fewest"
    )
    check_layout(LayoutConfig(pipeline=2), THIRD, 4, rows=8)
    check_layout(LayoutConfig(fewest=2), THIRD, 4, rows=6)
    with pytest.raises(XushiError, match="a batch of 2 rows"):  # more processes than rows
        check_layout(LayoutConfig(), THIRD, 4, rows=2)
