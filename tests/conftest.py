"""What every test shares: no network, one thread, an empty cache for the session, fresh examples
for property tests, one run of the miniature recipe, and a session that fails where a whole file of
tests no longer runs.
"""

import contextlib
import functools
import os
import random
import re
import shutil
import signal
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

# Before any library reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

from .miniature import ROOT, Chain, run_miniature

IN_CI = bool(os.environ.get("CI"))

# Files that may be skipped as a whole, with what they need.
MAY_BE_SKIPPED = {
    "tests/gpu/test_cuda.py": "a GPU",
    "tests/model/test_gguf_llama_cpp.py": "llama-cpp-python",
    "tests/serve/test_page.py": "Chromium and playwright",  # its slow tests
}
# Groups that take ten seconds and more, the longest first.
FIRST = (
    "miniature",
    "tests/train/test_layouts.py",
    "tests/plan/test_memory.py",
    "tests/contracts/test_contracts.py",
    "tests/run/test_update.py",
    "tests/train/test_training.py",
    "tests/model/test_parity_transformers.py",
)
outcomes: defaultdict[str, set[str]] = defaultdict(set)
workers: defaultdict[str, set[str]] = defaultdict(set)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Property tests draw other examples in each run, and a failure prints their seed. In CI they
    draw the same ones each time: a change must not fail by what it did not touch.

    The session has an empty cache, which workers of pytest-xdist share. Compiled kernels are taken
    from, and kept in, the user's own cache: to compile them takes as long as many tests.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # As in a shell's background job. Programs that tests start and stop would ignore it, too.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    fresh = not IN_CI
    settings.register_profile(
        "xushi", deadline=None, max_examples=50, print_blob=True, derandomize=not fresh
    )
    settings.load_profile("xushi")
    if config.option.hypothesis_seed is None and fresh:
        config.option.hypothesis_seed = str(random.SystemRandom().randrange(2**32))
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


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """The miniature run, made once for all tests that look at what it leaves behind."""
    return run_miniature(tmp_path_factory.mktemp("chain") / "miniature")


def group(nodeid: str) -> str:
    """What runs in one process: a file, or all files that use the fixture `chain`."""
    file = nodeid.split("::")[0]
    return "miniature" if uses_chain(file) else file


@functools.cache
def uses_chain(file: str) -> bool:
    """Whether a file's tests look at the miniature run, which is made once for all of them."""
    text = (ROOT / file).read_text(encoding="utf-8")
    return re.search(r"def \w+\([^)]*\bchain\b", text) is not None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Two processes share the tests by groups. (--dist loadgroup does not work: pytest-xdist 3.8
    appends the group to a node's id, which pytest 9.2 ignores.)
    """

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    return ByGroup(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes longest begins first, so that both processes end at about the same time."""
    if hasattr(config, "workerinput"):
        last = len(FIRST)
        groups = {item: group(item.nodeid) for item in items}
        items.sort(key=lambda item: FIRST.index(groups[item]) if groups[item] in FIRST else last)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        outcomes[report.nodeid].add("skipped")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    workers[group(report.nodeid)].add(getattr(report, "worker_id", ""))
    if report.when == "call" or not report.passed:
        outcomes[report.nodeid.split("::")[0]].add(report.outcome)


def skipped_files() -> list[str]:
    """Files of which every test that was asked for was skipped, and that must not be."""
    return sorted(
        file
        for file, found in outcomes.items()
        if found == {"skipped"} and file not in MAY_BE_SKIPPED
    )


def split_groups() -> list[str]:
    """Groups that did not run in one process: what they share was made more than once."""
    return sorted(name for name, found in workers.items() if len(found) > 1)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if split_groups() or (skipped_files() and os.environ.get("CI")):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    for file in skipped_files():
        terminalreporter.write_line(f"every test of {file} was skipped; with CI set this fails")
    for name in split_groups():
        terminalreporter.write_line(f"{name} ran in more than one process, which is slow")
    seed = config.option.hypothesis_seed
    if terminalreporter.getreports("failed") and seed is not None:
        terminalreporter.write_line(f"to draw the same examples again: --hypothesis-seed={seed}")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Whatever an earlier test or a longer fixture has set."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
