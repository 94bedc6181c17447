"""What `xushi doctor` prints: findings about the machine, each with advice.

Importing this module does not import torch; `doctor_report` does, to measure it. Not here: the
facts themselves (`machine`).
"""

import platform
import shutil
from pathlib import Path
from typing import NamedTuple

from xushi.base.machine import GIB, Machine, best_training_dtype, inspect, measure_matrix_gflops

OLDEST_TORCH = (2, 11)
DEMO_MEMORY = 3 * GIB
DEMO_DISK = 2 * GIB


class Finding(NamedTuple):
    """One entry of `xushi doctor`: a fact, and what it means or what to do about it."""

    name: str
    value: str
    verdict: str


def doctor_report(forms: str, directory: Path | None = None) -> list[Finding]:
    """All findings of `xushi doctor`, in the order of printing. Takes about a second.

    `forms` describes the forms of the ops in use; the caller passes it, since `base` does not
    import `ops`. `directory` is where runs will be kept, by default the current directory.
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
            "PyTorch's is used where no compiled form works; no compiler and no GPU is required",
        ),
        Finding(
            "compilers",
            ", ".join(machine.compilers) or "none",
            "one is enough to compile the fast forms of the ops; without one, PyTorch's are used",
        ),
    ]


def _cpu_finding(machine: Machine) -> Finding:
    quota = (
        "" if machine.core_quota is None else f", CPU time limited to {machine.core_quota:g} cores"
    )
    value = (
        f"{machine.cpu}: {machine.physical_cores} cores, {machine.logical_cores} logical{quota}; "
        f"{' '.join(sorted(machine.features)) or 'no known vector instructions'}"
    )
    verdict = (
        "ok"
        if machine.usable_cores > 1
        else "one core: everything works, but takes about twice as long as the documentation says"
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
        else f"free some space: a run with its checkpoints may need {DEMO_DISK / GIB:g} GiB",
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
                f"measured with {torch.get_num_threads()} threads; the limit for training here",
            )
        )
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(number)
            findings.append(
                Finding(
                    f"gpu {number}",
                    f"{card.name}, {card.total_memory / GIB:.0f} GiB",
                    'training uses it unless the recipe says device = "cpu"',
                )
            )
    return findings
