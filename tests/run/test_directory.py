"""A run directory at the start of a run: whose it is, and what killed starts left in it."""

import os
import subprocess
import sys
from pathlib import Path

from xushi.run.directory import claim, own
from xushi.run.recipe import load_recipe

from ..miniature import MINIATURE


def test_what_killed_starts_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    """However young: the lock keeps other starts away. A living process's file stays, as that of
    `xushi report`, which takes no lock.
    """
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    recipe = load_recipe(MINIATURE, [])
    with own(tmp_path):
        claim(recipe, tmp_path, update=False)
    (tmp_path / "stages").mkdir()
    left = [f".results.json.{gone.pid}.partial", f"stages/.data.json.{gone.pid}.partial"]
    others = [f".report.html.{os.getpid()}.partial", ".mine.partial", "notes.partial"]
    for name in left + others:
        (tmp_path / name).touch()
    with own(tmp_path):
        claim(recipe, tmp_path, update=False)
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert found == {".lock", "run.json", "recipe.toml", "stages", *others}
