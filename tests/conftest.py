"""What every test shares: no network, one thread, fresh examples for property tests, and a run that
fails where a whole file of tests no longer runs.
"""

import os
import random
import sys
from collections import defaultdict
from pathlib import Path

# Before any library reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # `make test` has two processes, each of one thread
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
from hypothesis import settings

settings.register_profile("xushi", deadline=None, max_examples=50, print_blob=True)
settings.load_profile("xushi")

# Files that may be skipped as a whole, with what they need.
MAY_BE_SKIPPED = {
    "tests/gpu/test_cuda.py": "a GPU",
    "tests/model/test_gguf_llama_cpp.py": "llama-cpp-python",
}
outcomes: defaultdict[str, set[str]] = defaultdict(set)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Property tests draw other examples in each run, from a seed that is printed when one fails."""
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = str(random.SystemRandom().randrange(2**32))


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


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        outcomes[report.nodeid].add("skipped")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or not report.passed:
        outcomes[report.nodeid.split("::")[0]].add(report.outcome)


def skipped_files() -> list[str]:
    """Files of which every test that was asked for was skipped, and that must not be."""
    return sorted(
        file
        for file, found in outcomes.items()
        if found == {"skipped"} and file not in MAY_BE_SKIPPED
    )


def pytest_sessionfinish(session: pytest.Session) -> None:
    if skipped_files() and os.environ.get("CI"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    for file in skipped_files():
        terminalreporter.write_line(f"every test of {file} was skipped; with CI set this fails")
    if terminalreporter.getreports("failed"):
        seed = config.option.hypothesis_seed
        terminalreporter.write_line(f"to draw the same examples again: --hypothesis-seed={seed}")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Whatever an earlier test or a longer fixture has set."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
