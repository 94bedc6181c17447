"""Environments by name and by file."""

from pathlib import Path

import pytest

from xushi.base.errors import BadInput
from xushi.envs import ENVIRONMENTS, DigitSum, Environment, environment_class

GAME = """
from xushi.envs import DigitSum

class Game(DigitSum):
    name = "game"
"""


def test_by_name(tmp_path: Path) -> None:
    assert environment_class("digit_sum", tmp_path) is DigitSum
    assert all(environment.name == kind for kind, environment in ENVIRONMENTS.items())


def test_by_file(tmp_path: Path) -> None:
    (tmp_path / "game.py").write_text(GAME)
    found = environment_class("game.py:Game", tmp_path)
    assert found.name == "game" and issubclass(found, Environment)


@pytest.mark.parametrize("kind", ["digit", "", "Game", "game.py", "game.py:Nothing", "no.py:Game"])
def test_what_is_no_environment_is_refused(kind: str, tmp_path: Path) -> None:
    (tmp_path / "game.py").write_text(GAME)
    with pytest.raises(BadInput) as error:
        environment_class(kind, tmp_path)
    assert error.value.remedy


def test_a_class_that_is_no_environment_is_refused(tmp_path: Path) -> None:
    (tmp_path / "game.py").write_text("class Game:\n    pass\n")
    with pytest.raises(BadInput, match="Environment"):
        environment_class("game.py:Game", tmp_path)
