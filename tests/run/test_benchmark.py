"""`xushi bench train` through the command line, and the line through its points."""

import json
from math import isfinite

import pytest

from xushi.run.benchmark import PARTS, line_through, named_shape

from .conftest import MINIATURE, xushi_here


def test_a_recipe_is_timed_and_its_time_shared_out() -> None:
    done = xushi_here("bench", "train", MINIATURE, "--rounds", "2", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 0 < found["bench.tokens_per_second_slowest"] <= found["bench.tokens_per_second"]
    assert found["bench.tokens_per_second"] <= found["bench.tokens_per_second_fastest"]
    shares = [found[f"bench.time_{part.lower()}"] for part in (*PARTS, "other")]
    assert sum(shares) == pytest.approx(1) and min(shares) >= 0
    assert isfinite(found["bench.seconds_per_token"])  # a slope: noise can make it negative
    assert found["memory.peak_bytes"] > 1e8
    assert "step 2 of 2" in done.stderr


def test_its_figures_can_be_read() -> None:
    done = xushi_here("bench", "train", MINIATURE, "--rounds", "1", "--dtype", "fp32")
    assert done.returncode == 0, done.stderr
    for said in ("fp32 by", "tokens a second", "GFLOP/s", "time: Linear", "peak memory"):
        assert said in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--rounds", "0"), "'--rounds'"),
        (("--dtype", "int8"), "--dtype int8"),
        (("nowhere.toml",), "nowhere.toml"),
    ],
)
def test_bad_input_is_two_lines(arguments: tuple[str, ...], said: str) -> None:
    done = xushi_here("bench", "train", *arguments)
    assert (
        done.returncode == 2 and said in done.stderr and len(done.stderr.strip().splitlines()) == 2
    )


def test_a_line_is_found_again() -> None:
    assert line_through([(x, 3 + 0.5 * x) for x in (1, 4, 10)]) == pytest.approx((3, 0.5))


def test_the_shapes_are_those_of_the_peers() -> None:
    from xushi.plan import count_parameters

    assert [
        round(count_parameters(named_shape(name).config).total / 1e6) for name in ("S", "M")
    ] == [20, 307]
