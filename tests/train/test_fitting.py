"""Layouts that fit a model: layers are divided among stages, and what cannot work is refused with
something that can.
"""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xushi.base.errors import XushiError
from xushi.train import LayoutConfig, check_layout, fitting
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


DENSE = THIRD.model_copy(update={"first_k_dense_replace": 2, "num_nextn_predict_layers": 0})


@pytest.mark.parametrize(
    "layout, processes, problem, remedy",
    [
        (
            {"data": 4},
            2,
            "layout.data=4 times layout.pipeline=1 is 4, and 2 processes were started",
            "set layout.data=2, or start 4 processes",
        ),
        (
            {"data": 4, "pipeline": 2},
            4,
            "layout.data=4 times layout.pipeline=2 is 8, and 4 processes were started",
            "set layout.pipeline=1, or start 8 processes",
        ),
        (
            {"pipeline": 3},
            4,
            "layout.pipeline=3 has more stages than the model's 2 layers",
            "set layout.pipeline=2",
        ),
        (
            {"pipeline": 2},
            3,
            "layout.pipeline=2 does not divide the 3 processes that were started",
            "start 2 processes",
        ),
        (
            {"expert": 3},
            4,
            "layout.expert=3 does not divide the 4 processes that share a batch",
            "set layout.expert=2",
        ),
        (
            {"expert": 8},
            8,
            "layout.expert=8 does not divide the model's 4 experts",
            "set layout.expert=4",
        ),
        (
            {},
            5,
            "5 processes hold the same 4 experts (layout.data=5, layout.expert=1) and can cut "
            "neither their number nor both their widths 16 and 16 evenly",
            "start 4 processes",
        ),
        ({"fewest": 4}, 2, "layout.fewest=4 and 2 processes were started",
         "set layout.fewest=2, or start 4 processes"),
        (
            {"pipeline": 3, "fewest": 5},
            4,
            "layout.fewest=5 and 4 processes were started",
            "set layout.pipeline=2 and layout.fewest=4",
        ),
        ({"pipeline": 3}, 5, "has more stages", "leave the table [layout] out and start one"),
    ],
)  # fmt: skip
def test_a_layout_that_cannot_be_is_refused_with_one_that_can(
    layout: dict, processes: int, problem: str, remedy: str
) -> None:
    with pytest.raises(XushiError) as error:
        check_layout(LayoutConfig(**layout), THIRD, processes)
    assert problem in error.value.problem and error.value.exit_code == 2
    assert error.value.remedy.startswith(remedy)


def test_a_remedy_is_searched_among_few_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not among as many as there are processes, which an environment may claim without end."""
    tried: list[int] = []
    divisors = fitting._divisors

    def counted(number: int, most: int) -> list[int]:
        tried.append(min(number, most))
        assert tried[-1] <= max(THIRD.num_hidden_layers, THIRD.n_routed_experts)
        return divisors(number, most)

    monkeypatch.setattr(fitting, "_divisors", counted)
    with pytest.raises(XushiError, match="has more stages than the model"):
        check_layout(LayoutConfig(pipeline=3), THIRD, 2 * 10**12)
    assert len(tried) == 3  # of all processes, and of those that share a batch in 1 or 2 stages


def test_a_model_without_experts_has_no_experts_at_fault() -> None:
    """Any number of processes may share it, and groups that share out experts are refused as
    such.
    """
    for processes in range(1, 8):
        check_layout(LayoutConfig(), DENSE, processes)
    with pytest.raises(XushiError, match="and the model has no experts") as error:
        check_layout(LayoutConfig(expert=2), DENSE, 4)
    assert error.value.remedy == "set layout.expert=1"
    # The experts may be those of the MTP layer alone.
    extra = DENSE.model_copy(update={"num_nextn_predict_layers": 1})
    check_layout(LayoutConfig(expert=2), extra, 4)
    with pytest.raises(XushiError, match="hold the same 4 experts"):
        check_layout(LayoutConfig(), extra, 5)


@given(
    processes=st.integers(1, 13),
    rows=st.integers(0, 13),
    pipeline=st.integers(1, 5),
    expert=st.integers(1, 5),
    data=st.none() | st.integers(1, 8),
    fewest=st.none() | st.integers(1, 14),
    depth=st.integers(1, 4),
    experts=st.integers(2, 9),
    width=st.sampled_from([12, 14, 15]),
)
def test_every_remedy_is_one(
    processes, rows, pipeline, expert, data, fewest, depth, experts, width
) -> None:
    """Each alternative that a refusal offers is accepted when it is followed to the letter."""
    if data is not None and fewest is not None:
        fewest = data * pipeline  # another one is refused
    config = LayoutConfig(data=data, pipeline=pipeline, expert=expert, fewest=fewest)
    sizes = {
        "num_hidden_layers": depth,
        "n_routed_experts": experts,
        "moe_intermediate_size": width,
    }
    model = THIRD.model_copy(update=sizes)
    try:
        return check_layout(config, model, processes, rows)
    except XushiError as error:
        remedy = error.remedy
    for offer in remedy.split(", or "):
        keys = {key: int(n) for key, n in re.findall(r"layout\.(\w+)=(\d+)", offer)}
        if keys:
            check_layout(LayoutConfig(**(config.model_dump() | keys)), model, processes, rows)
        elif offer.startswith("start"):
            check_layout(config, model, int(offer.split()[1]), rows)
        elif offer.startswith("take"):
            check_layout(config, model, processes, int(offer.split()[1]))
        else:
            assert offer == "leave the table [layout] out and start one process"
            check_layout(LayoutConfig(), model, 1, rows)


def test_a_batch_that_does_not_divide_is_refused_unless_shares_may_be_unequal() -> None:
    model = THIRD.model_copy(update={"n_routed_experts": 6})
    with pytest.raises(XushiError) as error:
        check_layout(LayoutConfig(pipeline=2), model, 6, rows=8)
    assert error.value.problem == "a batch of 8 rows does not divide among layout.data=3 processes"
    assert error.value.remedy == (
        "start 4 processes, or take 9 rows (pretrain.batch_tokens), or "
        "set layout.fewest=6, which allows unequal shares"
    )
    check_layout(LayoutConfig(pipeline=2), THIRD, 4, rows=8)
    check_layout(LayoutConfig(pipeline=2), model, 6, rows=9)
    check_layout(LayoutConfig(fewest=2), THIRD, 4, rows=6)
    with pytest.raises(XushiError, match="a batch of 2 rows"):  # more processes than rows
        check_layout(LayoutConfig(), THIRD, 4, rows=2)
