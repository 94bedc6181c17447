"""Facts about the machine: cores, instruction sets, memory limits, memory used, matrix speed.

Only `chosen_device` and `measure_matrix_gflops` import torch. Only `best_training_dtype` and
`chosen_device` decide anything about a run. Linux reports every fact; on other systems a fact that
is not available is None or empty. Not here: the advice that `xushi doctor` prints (`doctor`).
"""

import contextlib
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from xushi.base.errors import BadInput

GIB = 2**30
# The names of instruction sets on Linux and macOS, by the name used here.
_FEATURES = {
    "avx2": ("avx2", "avx2.0"),
    "fma": ("fma",),
    "avx512f": ("avx512f",),
    "avx512_bf16": ("avx512_bf16",),
    "amx_bf16": ("amx_bf16",),
    "neon": ("asimd", "neon", "advsimd"),
    "neon_bf16": ("bf16", "feat_bf16"),
}


@dataclass(frozen=True)
class Machine:
    """What this process may use. Memory is in bytes; None where the system does not report it."""

    system: str
    cpu: str
    features: frozenset[str]  # keys of _FEATURES
    logical_cores: int  # the cores this process may run on
    physical_cores: int  # the physical cores that those belong to
    core_quota: float | None  # CPU time limit of the control group, in cores
    memory_total: int | None  # of the machine, or the control group's limit if that is lower
    memory_available: int | None
    compilers: tuple[str, ...]

    @property
    def usable_cores(self) -> int:
        """How many threads to start: the physical cores, but no more than the quota."""
        quota = self.physical_cores if self.core_quota is None else max(1, int(self.core_quota))
        return min(self.physical_cores, quota)


def inspect() -> Machine:
    """Read the machine's facts. Takes a few milliseconds."""
    logical, physical = _cores()
    total, available = _memory()
    return Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=_cpu_name(),
        features=_features(),
        logical_cores=logical,
        physical_cores=physical,
        core_quota=_core_quota(),
        memory_total=total,
        memory_available=available,
        compilers=tuple(name for name in ("c++", "g++", "clang++") if shutil.which(name)),
    )


def best_training_dtype(features: frozenset[str] | None = None) -> tuple[str, str]:
    """("bf16" or "fp32", reason): bf16 only where the CPU has instructions that multiply it.

    Without them each bf16 product is emulated, and a matrix product takes many times as long as in
    fp32 (docs/plan.md, "What the machine can multiply").
    """
    features = _features() if features is None else features
    for name in ("amx_bf16", "avx512_bf16"):
        if name in features:
            return "bf16", f"this CPU has instructions that multiply bf16 ({name})"
    if "neon_bf16" in features:
        return (
            "fp32",
            "this CPU has bf16 instructions (neon_bf16), but training with them has not been "
            "measured",
        )
    return (
        "fp32",
        "this CPU cannot multiply bf16 (it has neither amx_bf16 nor avx512_bf16); emulated bf16 "
        "is far slower",
    )


def chosen_device(device: str) -> str:
    """Turn the recipe's `device` into "cpu" or "cuda". "auto" is the GPU if PyTorch finds one.

    A GPU that is asked for and not found is a `BadInput`.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise BadInput(
            'device = "cuda", but PyTorch finds no GPU',
            'set device = "cpu", or install PyTorch with CUDA and check nvidia-smi',
        )
    if device == "auto":
        return "cuda" if has_gpu else "cpu"
    return device


def measure_matrix_gflops(
    dtype: str, size: int = 1024, repeats: int = 8, device: str = "cpu"
) -> float:
    """GFLOP/s of PyTorch's matrix product [size, size] x [size, size] in fp32 or bf16.

    The fastest of `repeats` products counts. A GFLOP is 1e9 floating-point operations.
    """
    import torch

    left = torch.ones(
        size, size, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype], device=device
    )
    fastest = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        left @ left
        if device == "cuda":
            torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * size**3 / fastest / 1e9


def peak_memory_bytes() -> int:
    """The largest resident memory that this process has ever had, in bytes."""
    # ru_maxrss of a forked process also counts its parent's memory before exec; VmHWM does not.
    for line in _lines(Path("/proc/self/status")):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return _maximum_resident(resource.RUSAGE_SELF)


def children_peak_memory_bytes() -> int:
    """The largest resident memory of any one finished child process, in bytes.

    It includes the memory that the child inherited when it was forked.
    """
    return _maximum_resident(resource.RUSAGE_CHILDREN)


def _maximum_resident(who: int) -> int:
    return resource.getrusage(who).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []  # not Linux, or /proc and /sys are not mounted


def _sysctl(name: str) -> str:
    if sys.platform != "darwin":
        return ""
    try:
        done = subprocess.run(
            ["sysctl", "-n", name], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def _cpuinfo(*keys: str) -> str:
    for line in _lines(Path("/proc/cpuinfo")):
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return ""


def _cpu_name() -> str:
    return (
        _cpuinfo("model name", "Model", "Hardware")
        or _sysctl("machdep.cpu.brand_string")
        or platform.machine()
    )


def _features() -> frozenset[str]:
    reported = (
        f"{_cpuinfo('flags', 'Features')} {_sysctl('machdep.cpu.features')} "
        f"{_sysctl('machdep.cpu.leaf7_features')}"
    )
    words = set(reported.lower().split())
    if _sysctl("hw.optional.arm.FEAT_BF16") == "1":
        words.add("feat_bf16")
    if sys.platform == "darwin" and platform.machine() == "arm64":
        words.add("advsimd")  # every Apple core has it; sysctl's name for it has changed
    return frozenset(name for name, spellings in _FEATURES.items() if words.intersection(spellings))


def _cores() -> tuple[int, int]:
    """(logical, physical) cores that this process may run on."""
    if not hasattr(os, "sched_getaffinity"):
        logical = os.cpu_count() or 1
        return logical, int(_sysctl("hw.physicalcpu") or logical)
    allowed = os.sched_getaffinity(0)
    physical = set()
    for cpu in allowed:
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        core = (*_lines(topology / "physical_package_id"), *_lines(topology / "core_id"))
        physical.add(core or (str(cpu),))
    return len(allowed), len(physical)


def _control_groups(controller: str) -> list[Path]:
    """Directories of this process's control group and its ancestors (cgroup version 2 or 1).

    The tightest limit of all of them is in force.
    """
    groups: list[Path] = []
    for line in _lines(Path("/proc/self/cgroup")):
        number, controllers, path = line.split(":", 2)
        if number == "0":
            mount = Path("/sys/fs/cgroup")
        elif controller in controllers.split(","):
            mount = Path("/sys/fs/cgroup", controller)
        else:
            continue
        group = mount / path.lstrip("/")
        groups += [group, *(parent for parent in group.parents if parent.is_relative_to(mount))]
    return groups


def _core_quota() -> float | None:
    quotas = []
    for group in _control_groups("cpu"):
        words = " ".join(
            _lines(group / "cpu.max")
            or _lines(group / "cpu.cfs_quota_us") + _lines(group / "cpu.cfs_period_us")
        ).split()
        if len(words) == 2 and words[0] not in ("max", "-1"):
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def _reclaimable(group: Path) -> int:
    """Bytes of file cache that count as used but are freed as soon as memory is needed."""
    figures = dict(line.split(maxsplit=1) for line in _lines(group / "memory.stat"))
    return int(figures.get("total_inactive_file", figures.get("inactive_file", 0)))


def _memory() -> tuple[int | None, int | None]:
    """(total, available) bytes under the lowest limit of the machine and its control groups."""
    figures = {
        key: int(value.split()[0]) * 1024
        for key, _, value in (line.partition(":") for line in _lines(Path("/proc/meminfo")))
        if value.strip().endswith("kB")
    }
    total = figures.get("MemTotal")
    available = figures.get("MemAvailable")
    if total is None:
        total = int(_sysctl("hw.memsize") or 0) or None
    for group in _control_groups("memory"):
        limit = _lines(group / "memory.max") or _lines(group / "memory.limit_in_bytes")
        used = _lines(group / "memory.current") or _lines(group / "memory.usage_in_bytes")
        # A value "max" or a missing file means that the group sets no limit.
        with contextlib.suppress(ValueError, IndexError):
            free = max(0, int(limit[0]) - int(used[0]) + _reclaimable(group))
            total = int(limit[0]) if total is None else min(total, int(limit[0]))
            available = free if available is None else min(available, free)
    return total, available
