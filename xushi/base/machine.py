"""The machine under this process: what of it we may use, what it can multiply, how much memory we
took.

Facts are read without importing torch, which only `doctor_report` does, to measure. Nothing here
decides how a run goes but `best_training_dtype`. Linux answers everything; elsewhere a fact that
cannot be had is None or empty.
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
from typing import NamedTuple

from xushi.base.errors import BadInput

OLDEST_TORCH = (2, 11)
GIB = 2**30
DEMO_MEMORY = 3 * GIB
DEMO_DISK = 2 * GIB
# The names that Linux and macOS give to instruction sets, by the name used here.
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
    """What this process has to work with. Bytes are bytes; None where the system does not say."""

    system: str
    cpu: str
    features: frozenset[str]  # keys of _FEATURES
    logical_cores: int  # that this process may run on
    physical_cores: int  # behind those
    core_quota: float | None  # cores' worth of time that a control group grants
    memory_total: int | None  # the machine's, or the control group's limit if lower
    memory_available: int | None
    compilers: tuple[str, ...]

    @property
    def usable_cores(self) -> int:
        """Threads worth starting: physical cores, and no more than the quota."""
        quota = self.physical_cores if self.core_quota is None else max(1, int(self.core_quota))
        return min(self.physical_cores, quota)


def inspect() -> Machine:
    """Read the machine's facts now; takes some milliseconds."""
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
    """("bf16" or "fp32", why): bf16 only where the CPU multiplies it in hardware.

    Without such instructions each bf16 product is emulated, and a matrix product takes many times
    as long as in fp32 (docs/plan.md, "What the machine can multiply").
    """
    features = _features() if features is None else features
    for name in ("amx_bf16", "avx512_bf16"):
        if name in features:
            return "bf16", f"this CPU multiplies bf16 in hardware ({name})"
    if "neon_bf16" in features:
        return (
            "fp32",
            "this CPU has bf16 instructions (neon_bf16), and training with them was never "
            "measured here",
        )
    return (
        "fp32",
        "this CPU has no bf16 multiplication (neither amx_bf16 nor avx512_bf16); emulated it is "
        "far slower",
    )


def chosen_device(device: str) -> str:
    """ "cpu" or "cuda": `device` itself, which must be there, or for "auto" the GPU where PyTorch
    sees one.
    """
    import torch

    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        raise BadInput(
            'device = "cuda", and PyTorch sees no GPU',
            'set device = "cpu", or install a PyTorch with CUDA and see that nvidia-smi lists the '
            "GPU",
        )
    return ("cuda" if there else "cpu") if device == "auto" else device


class Finding(NamedTuple):
    """One line of `xushi doctor`: a fact, and what it means or what to do about it."""

    name: str
    value: str
    verdict: str


def doctor_report(forms: str, directory: Path | None = None) -> list[Finding]:
    """Everything `xushi doctor` says, with runs kept in `directory` (by default here); takes about
    a second.

    `forms` is what `ops` says of its compiled forms, which this floor cannot ask.
    """
    machine = inspect()
    dtype, reason = best_training_dtype(machine.features)
    return [
        Finding("system", f"{machine.system}, Python {platform.python_version()}", "ok"),
        _cpu_finding(machine),
        _memory_finding(machine),
        _disk_finding(Path.cwd() if directory is None else directory),
        *_torch_findings(dtype),
        Finding("training dtype", dtype, reason),
        Finding(
            "op forms",
            forms,
            "PyTorch's run where compiled ones do not; no compiler and no GPU is needed",
        ),
        Finding(
            "compilers",
            ", ".join(machine.compilers) or "none",
            "one of them compiles the fast forms of ops; without one, PyTorch's run",
        ),
    ]


def _cpu_finding(machine: Machine) -> Finding:
    quota = "" if machine.core_quota is None else f", granted the time of {machine.core_quota:g}"
    value = (
        f"{machine.cpu}: {machine.physical_cores} cores, {machine.logical_cores} logical{quota}; "
        f"{' '.join(sorted(machine.features)) or 'no known vector instructions'}"
    )
    verdict = (
        "ok"
        if machine.usable_cores > 1
        else "one core: everything works and takes about twice the stated time"
    )
    return Finding("cpu", value, verdict)


def _memory_finding(machine: Machine) -> Finding:
    if machine.memory_total is None:
        return Finding("memory", "unknown", f"the demo needs {DEMO_MEMORY / GIB:g} GiB")
    free = machine.memory_total if machine.memory_available is None else machine.memory_available
    value = f"{free / GIB:.1f} GiB available of {machine.memory_total / GIB:.1f}"
    return Finding(
        "memory",
        value,
        "ok"
        if free >= DEMO_MEMORY
        else f"the demo needs {DEMO_MEMORY / GIB:g} GiB: close other programs or raise the limit",
    )


def _disk_finding(directory: Path) -> Finding:
    free = shutil.disk_usage(directory).free
    return Finding(
        "disk",
        f"{free / GIB:.1f} GiB free at {directory}",
        "ok"
        if free >= DEMO_DISK
        else f"free some space: with its checkpoints a run may take {DEMO_DISK / GIB:g} GiB",
    )


def _torch_findings(dtype: str) -> list[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:
        return [
            Finding(
                "torch",
                f"cannot be imported: {error}",
                "install it again, for example with make demo",
            )
        ]
    oldest = ".".join(map(str, OLDEST_TORCH))
    supported = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= OLDEST_TORCH
    findings = [
        Finding(
            "torch", torch.__version__, "ok" if supported else f"install torch {oldest} or newer"
        )
    ]
    for name in ("fp32", "bf16") if dtype == "bf16" else ("fp32",):
        findings.append(
            Finding(
                f"matrix product {name}",
                f"{measure_matrix_gflops(name):.0f} GFLOP/s",
                f"measured with {torch.get_num_threads()} threads; the ceiling for training here",
            )
        )
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(number)
            findings.append(
                Finding(
                    f"gpu {number}",
                    f"{card.name}, {card.total_memory / GIB:.0f} GiB",
                    'training takes it unless the recipe says device = "cpu"',
                )
            )
    return findings


def measure_matrix_gflops(
    dtype: str, size: int = 1024, repeats: int = 8, device: str = "cpu"
) -> float:
    """GFLOP/s (1e9 floating-point operations a second) of the fastest of `repeats` square products
    in fp32 or bf16.
    """
    import torch

    left = torch.ones(
        size, size, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype], device=device
    )
    fastest = float("inf")
    for _ in range(repeats):
        begun = time.perf_counter()
        left @ left
        if device == "cuda":
            torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - begun)
    return 2 * size**3 / fastest / 1e9


def peak_memory_bytes() -> int:
    """The most memory that this process ever held resident."""
    # getrusage also counts what a forking parent held before exec; the kernel's own high-water mark
    # does not.
    for line in _lines(Path("/proc/self/status")):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return _maximum_resident(resource.RUSAGE_SELF)


def children_peak_memory_bytes() -> int:
    """The most that any one finished child process held resident, with what it inherited at its
    start.
    """
    return _maximum_resident(resource.RUSAGE_CHILDREN)


def _maximum_resident(who: int) -> int:
    return resource.getrusage(who).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []  # not Linux, or the file system is hidden from us


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
    said = (
        f"{_cpuinfo('flags', 'Features')} {_sysctl('machdep.cpu.features')} "
        f"{_sysctl('machdep.cpu.leaf7_features')}"
    )
    words = set(said.lower().split())
    if _sysctl("hw.optional.arm.FEAT_BF16") == "1":
        words.add("feat_bf16")
    if sys.platform == "darwin" and platform.machine() == "arm64":
        words.add("advsimd")  # every Apple core has it and sysctl's name for it has changed
    return frozenset(name for name, spellings in _FEATURES.items() if words.intersection(spellings))


def _cores() -> tuple[int, int]:
    """(logical, physical) cores that this process may run on."""
    if not hasattr(os, "sched_getaffinity"):
        logical = os.cpu_count() or 1
        return logical, int(_sysctl("hw.physicalcpu") or logical)
    allowed = os.sched_getaffinity(0)
    places = set()
    for cpu in allowed:
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        place = (*_lines(topology / "physical_package_id"), *_lines(topology / "core_id"))
        places.add(place or (str(cpu),))
    return len(allowed), len(places)


def _control_groups(controller: str) -> list[Path]:
    """This process's control group and its ancestors, version 2 or 1; each may hold the limit in
    force.
    """
    groups: list[Path] = []
    for line in _lines(Path("/proc/self/cgroup")):
        number, controllers, place = line.split(":", 2)
        if number == "0":
            mount = Path("/sys/fs/cgroup")
        elif controller in controllers.split(","):
            mount = Path("/sys/fs/cgroup", controller)
        else:
            continue
        group = mount / place.lstrip("/")
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
    """Bytes of file cache that a control group counts as used and gives back when asked."""
    told = dict(line.split(maxsplit=1) for line in _lines(group / "memory.stat"))
    return int(told.get("total_inactive_file", told.get("inactive_file", 0)))


def _memory() -> tuple[int | None, int | None]:
    """(total, available) bytes under the tightest of the machine's and the control groups' limits."""
    told = {
        key: int(value.split()[0]) * 1024
        for key, _, value in (line.partition(":") for line in _lines(Path("/proc/meminfo")))
        if value.strip().endswith("kB")
    }
    total, available = told.get("MemTotal"), told.get("MemAvailable")
    if total is None:
        total = int(_sysctl("hw.memsize") or 0) or None
    for group in _control_groups("memory"):
        limit = _lines(group / "memory.max") or _lines(group / "memory.limit_in_bytes")
        used = _lines(group / "memory.current") or _lines(group / "memory.usage_in_bytes")
        with contextlib.suppress(
            ValueError, IndexError
        ):  # "max", or no such file: this group sets no limit
            free = max(0, int(limit[0]) - int(used[0]) + _reclaimable(group))
            total = int(limit[0]) if total is None else min(total, int(limit[0]))
            available = free if available is None else min(available, free)
    return total, available
