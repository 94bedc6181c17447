"""What every test shares: no network, few threads, and property tests that draw the same examples
each time.
"""

import os
from pathlib import Path

# Before any library reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
from hypothesis import settings

settings.register_profile("xushi", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("xushi")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With two processes, tests of a file stay together, and so do those that look at the one chain
    in miniature.
    """
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            place = Path(item.path)
            item.add_marker(
                pytest.mark.xdist_group("run" if place.parent.name == "run" else place.name)
            )
