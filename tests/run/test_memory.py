"""A run that cannot fit into memory is refused before anything starts, with the numbers and with
what would fit.
"""

import shutil
from pathlib import Path

import pytest

from xushi.base.errors import BadInput, XushiError
from xushi.base.machine import GIB
from xushi.run import run, runner
from xushi.run.estimate import _bytes_per_process, check_memory
from xushi.run.recipe import load_recipe
from xushi.train import Layout

from .conftest import MINIATURE, Chain

LARGE = [
    "model.hidden_size=2048",
    "model.moe_intermediate_size=1024",
    "model.n_routed_experts=64",
    "model.num_hidden_layers=8",
    "pretrain.batch_tokens=1048576",
]


def test_what_fits_is_let_through() -> None:
    check_memory(load_recipe(MINIATURE, []), Layout(), 1 * GIB, 1)
    check_memory(
        load_recipe(MINIATURE, LARGE), Layout(), None, 1
    )  # nothing is known of the machine


def test_a_batch_that_is_too_large_is_refused_with_one_that_fits() -> None:
    recipe = load_recipe(MINIATURE, LARGE)
    alone = _bytes_per_process(recipe, Layout(), recipe.pretrain)
    with pytest.raises(XushiError, match=r"needs about [\d,.]+ GiB in each process") as error:
        check_memory(recipe, Layout(), alone // 2, 1)
    assert "pretrain.activations=recompute" in error.value.remedy and error.value.exit_code == 2
    tokens = error.value.remedy.partition("batch_tokens=")[2].split(" ")[0]
    smaller = load_recipe(
        MINIATURE,
        [
            *LARGE,
            "pretrain.activations='recompute'",
            *([f"pretrain.batch_tokens={tokens}"] if tokens else []),
        ],
    )
    check_memory(smaller, Layout(), alone // 2, 1)


def test_a_model_that_is_too_large_for_any_batch() -> None:
    with pytest.raises(XushiError) as error:
        check_memory(load_recipe(MINIATURE, LARGE), Layout(), 2 * GIB, 1)
    assert "use a smaller model" in error.value.remedy


def test_processes_share_the_machine_and_the_moments() -> None:
    recipe = load_recipe(MINIATURE, LARGE)
    alone, eighth = (
        _bytes_per_process(recipe, layout, recipe.pretrain) for layout in (Layout(), Layout(data=8))
    )
    assert eighth < alone / 2
    check_memory(recipe, Layout(data=8), 8 * eighth, 8)
    with pytest.raises(XushiError, match="for 8 of them"):
        check_memory(recipe, Layout(data=8), 8 * eighth - 8, 8)


def test_what_is_done_needs_no_memory(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished run that was moved to a smaller machine, and one whose pretraining would change."""

    def too_small(*_: object) -> None:
        raise BadInput("too small", "use another machine")

    monkeypatch.setattr(runner, "check_memory", too_small)
    shutil.copytree(chain.directory, moved := tmp_path / "moved")
    results = run(load_recipe(MINIATURE, []), moved)
    assert results is not None and results["pretrain.steps"] == chain.results["pretrain.steps"]
    with pytest.raises(BadInput, match="too small"):
        run(load_recipe(MINIATURE, ["pretrain.steps=3"]), moved, update=True)
