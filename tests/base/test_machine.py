"""The machine's facts, compared with the system's own and read from invented machines."""

import os
import subprocess
import sys

import pytest

from xushi.base import machine
from xushi.base.errors import XushiError


def test_facts_agree_with_the_system():
    facts = machine.inspect()
    assert (
        1
        <= facts.usable_cores
        <= facts.physical_cores
        <= facts.logical_cores
        <= (os.cpu_count() or 1)
    )
    if sys.platform == "linux":
        assert facts.logical_cores == len(os.sched_getaffinity(0))
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        assert 0 < facts.memory_available <= facts.memory_total <= total
        assert facts.cpu


def test_features_agree_with_torch():
    import torch

    ours, theirs = machine.inspect().features, torch.backends.cpu.get_cpu_capability()
    if theirs in ("AVX2", "AVX512"):
        assert "avx2" in ours and ("avx512f" in ours) == (theirs == "AVX512")


def test_reading_facts_does_not_import_torch():
    script = (
        "import sys; from xushi.base import machine; machine.inspect(); "
        "machine.best_training_dtype(); "
        "machine.peak_memory_bytes(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.parametrize(("features", "dtype"), [
    ({"avx2"}, "fp32"), ({"avx2", "avx512f"}, "fp32"), ({"neon", "neon_bf16"}, "fp32"), (set(), "fp32"),
    ({"avx2", "avx512f", "avx512_bf16"}, "bf16"), ({"avx2", "amx_bf16"}, "bf16"),
])  # fmt: skip
def test_bf16_only_where_hardware_multiplies_it(features, dtype):
    chosen, reason = machine.best_training_dtype(frozenset(features))
    assert chosen == dtype and reason


@pytest.mark.parametrize(("flags", "expected"), [
    ("fpu sse2 avx2 avx512f avx512_bf16 amx_bf16 amx_tile", {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}),
    ("fp asimd evtstrm sve bf16 i8mm", {"neon", "neon_bf16"}),
    ("", set()),
])  # fmt: skip
def test_features_of_other_processors(monkeypatch, flags, expected):
    monkeypatch.setattr(machine, "_cpuinfo", lambda *keys: flags)
    monkeypatch.setattr(machine, "_sysctl", lambda name: "")
    monkeypatch.setattr(machine.platform, "machine", lambda: "x86_64")
    assert machine._features() == expected


def files(monkeypatch, contents: dict[str, str]) -> None:
    monkeypatch.setattr(machine, "_lines", lambda path: contents.get(str(path), "").splitlines())
    monkeypatch.setattr(machine, "_sysctl", lambda name: "")


def test_version_2_control_group_limits(monkeypatch):
    files(monkeypatch, {
        "/proc/self/cgroup": "0::/user/shell\n",
        "/sys/fs/cgroup/user/shell/cpu.max": "max 100000\n",
        "/sys/fs/cgroup/user/cpu.max": "150000 100000\n",
        "/proc/meminfo": "MemTotal: 8000 kB\nMemFree: 10 kB\nMemAvailable: 6000 "
        "kB\nHugePages_Total: 0\n",
        "/sys/fs/cgroup/user/memory.max": "4096000\n",
        "/sys/fs/cgroup/user/memory.current": "3072000\n",
        "/sys/fs/cgroup/user/memory.stat": "anon 5\ninactive_file 1024000\n",
        "/sys/fs/cgroup/user/shell/memory.max": "max\n",
        "/sys/fs/cgroup/user/shell/memory.current": "1\n",
    })  # fmt: skip
    assert machine._core_quota() == 1.5
    assert machine._memory() == (4096000, 2048000)


def test_version_1_control_group_limits(monkeypatch):
    files(monkeypatch, {
        "/proc/self/cgroup": "5:cpu,cpuacct:/box\n4:memory:/box\n",
        "/sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "-1\n",
        "/sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000\n",
        "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
        "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        "/proc/meminfo": "MemTotal: 8000 kB\nMemAvailable: 6000 kB\n",
        "/sys/fs/cgroup/memory/box/memory.limit_in_bytes": "9223372036854771712\n",
        "/sys/fs/cgroup/memory/box/memory.usage_in_bytes": "5\n",
    })  # fmt: skip
    assert machine._core_quota() == 2.0
    assert machine._memory() == (8192000, 6144000)


def test_a_system_that_reports_nothing(monkeypatch):
    files(monkeypatch, {})
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    facts = machine.inspect()
    assert facts.core_quota is None and facts.memory_total is None and facts.usable_cores >= 1
    assert machine.peak_memory_bytes() > 2**20


def test_peak_memory_is_this_process_and_grows():
    script = (
        "from xushi.base.machine import peak_memory_bytes as peak; before = peak(); "
        "block = bytearray(80 * 2**20); after = peak(); print(before, after)"
    )
    # Memory of this process, which must not count as the child's.
    block = bytearray(b"\1") * (200 * 2**20)
    printed = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, timeout=60
    ).stdout
    before, after = map(int, printed.split())
    assert len(block) > before and 79 * 2**20 <= after - before <= 90 * 2**20
    assert machine.children_peak_memory_bytes() >= after


@pytest.mark.parametrize("has_gpu", [True, False])
def test_auto_is_the_gpu_if_there_is_one(has_gpu: bool, monkeypatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert machine.chosen_device("auto") == ("cuda" if has_gpu else "cpu")
    assert machine.chosen_device("cpu") == "cpu"
    if has_gpu:
        assert machine.chosen_device("cuda") == "cuda"
    else:
        with pytest.raises(XushiError, match="PyTorch finds no GPU") as error:
            machine.chosen_device("cuda")
        assert 'set device = "cpu"' in error.value.remedy
