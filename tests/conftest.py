"""What every test shares: no network, few threads, an empty cache for the session, property tests
that draw the same examples each time, and one run of the miniature recipe.
"""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

# Before any library reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
from hypothesis import settings

from .miniature import Chain, run_miniature

settings.register_profile("xushi", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("xushi")


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """The miniature run, made once for all tests that look at what it leaves behind."""
    return run_miniature(tmp_path_factory.mktemp("chain") / "miniature")


def pytest_configure(config: pytest.Config) -> None:
    """Give the session an empty cache; workers of pytest-xdist share their controller's.

    Compiled kernels are taken from, and kept in, the user's own cache: to compile them takes as
    long as many tests.
    """
    if hasattr(config, "workerinput"):
        return
    from xushi.base.artifacts import cache_directory

    cache = Path(tempfile.mkdtemp(prefix="xushi-cache-"))
    with contextlib.suppress(OSError, RuntimeError):  # no home directory, or a read-only one
        kernels = cache_directory() / "kernels"
        kernels.mkdir(parents=True, exist_ok=True)
        (cache / "kernels").symlink_to(kernels.absolute())
    os.environ["XUSHI_CACHE"] = str(cache)
    config.add_cleanup(lambda: shutil.rmtree(cache))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With two processes, tests of a file run in one, and so do all that use the miniature run."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        place = Path(item.path)
        shared = place.parent.name == "run" or "chain" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group("run" if shared else place.name))
