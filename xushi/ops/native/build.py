"""Compiling and loading the kernels: by what the processor reports, once, under the hash of the
source.

Nothing here raises: where there is no library, `status` says in a line why, and the slower forms
run.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from xushi.base.artifacts import cache_directory
from xushi.base.files import sha256_file
from xushi.base.machine import inspect
from xushi.base.progress import say
from xushi.ops.dispatch import asked_form

SOURCES = Path(__file__).parent
BUILT = SOURCES / "built"  # what a wheel carries, if it was made to
COMMON = (
    "-std=c++17",
    "-O3",
    "-fno-math-errno",
    "-ffp-contract=fast",
    "-fPIC",
    "-shared",
    "-pthread",
)
# What the processor must report, the name, vector width in floats and flags; the first that fits is
# taken.
Form = tuple[frozenset[str], str, int, tuple[str, ...]]
FORMS: tuple[Form, ...] = (
    (
        frozenset({"amx_bf16", "avx512_bf16", "avx512f", "avx2", "fma"}),
        "AMX",
        16,
        (
            "-mamx-bf16",
            "-mamx-tile",
            "-mavx512bf16",
            "-mavx512f",
            "-mavx2",
            "-mfma",
            "-DXUSHI_TILES=1",
        ),
    ),
    (
        frozenset({"avx512_bf16", "avx512f", "avx2", "fma"}),
        "AVX-512 BF16",
        16,
        ("-mavx512bf16", "-mavx512f", "-mavx2", "-mfma"),
    ),
    (frozenset({"avx512f", "avx2", "fma"}), "AVX-512", 16, ("-mavx512f", "-mavx2", "-mfma")),
    (frozenset({"avx2", "fma"}), "AVX2", 8, ("-mavx2", "-mfma")),
    (frozenset({"neon"}), "NEON", 4, ()),
)
COMPILE_SECONDS = 120


@dataclass(frozen=True)
class Loaded:
    """The library, or None; and in a line which form it is, or why there is none."""

    library: ctypes.CDLL | None
    line: str
    name: str = "pytorch"


def status(dtype: str = "fp32") -> str:
    """Which form runs and why, for `xushi doctor`; compiles if that was not done yet and is not
    unwanted.
    """
    if asked := asked_form():
        return f"XUSHI_OPS={asked} asks for the {asked} forms, which are slower; unset it"
    return _loaded(dtype).line


def form(dtype: str = "fp32") -> str:
    """What runs: as XUSHI_OPS asks, else the compiled form's name, else "pytorch"."""
    return asked_form() or _loaded(dtype).name


def load(dtype: str = "fp32") -> ctypes.CDLL | None:
    """The kernels for tensors of "fp32" or "bf16", or None where there are none; a machine's first
    call compiles.
    """
    return _loaded(dtype).library


def source_hash(flags: tuple[str, ...]) -> str:
    """Of every source file and the flags."""
    digest = hashlib.sha256(repr(flags).encode())
    for path in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def _loaded(dtype: str) -> Loaded:
    loaded = build_and_load(dtype)
    if loaded.library is None:
        say(f"the compiled kernels are not used: {loaded.line}")
    return loaded


def build_and_load(dtype: str) -> Loaded:
    """Find or compile the library for this processor and tensors of "fp32" or "bf16", and load it.

    Where a form cannot be had, because the compiler is too old for it or the system keeps its
    registers, the next is taken.
    """
    machine, problem = inspect(), "this processor has neither AVX2 nor NEON"
    fitting = [form for form in _forms(dtype) if form[0] <= machine.features]
    for form in fitting:
        library, said = _library(form, dtype, machine.compilers)
        if library is not None:
            instead = "" if form is fitting[0] else f", not with {fitting[0][1]}: {problem}"
            return Loaded(
                library, f"C++ with {form[1]} for {dtype}{said}{instead}", f"C++ {form[1]}"
            )
        if form is fitting[0]:
            problem = said
    return Loaded(None, f"{problem}; the PyTorch forms run")


def _library(form: Form, dtype: str, compilers: tuple[str, ...]) -> tuple[ctypes.CDLL | None, str]:
    """As a wheel carries it, or as it was compiled before or is now; None with the reason where it
    cannot be had.
    """
    file, lanes, said = _file_name(form, dtype), form[2], ", as installed"
    if isinstance(library := _open(BUILT / file, lanes), str):
        said = ""
        try:
            path = cache_directory() / "kernels" / file
            if isinstance(library := _open(path, lanes), str):  # missing or damaged
                if problem := _compile(compilers, _flags(form, dtype), path):
                    return None, problem
                library = _open(path, lanes)
            with contextlib.suppress(OSError):  # the time of its last use, for `xushi cache`
                os.utime(path)
        except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
            return None, (
                f"compiled kernels cannot be kept ({error}); set XUSHI_CACHE to a directory that "
                "can be written"
            )
        if isinstance(library, str):
            return None, (
                f"{path} was compiled and cannot be loaded ({library}); set XUSHI_CACHE to another "
                "directory, or use another compiler"
            )
    if not library.xushi_granted():
        return None, f"the system keeps the registers of {form[1]} from this process"
    return library, said


def compile_all(directory: Path) -> list[str]:
    """Compile every form for this kind of processor into `directory`, for a wheel to carry; their
    files' names.

    Raises RuntimeError where one cannot be compiled.
    """
    arm, names = platform.machine().lower() in ("aarch64", "arm64"), []
    for dtype in ("fp32", "bf16"):
        for form in _forms(dtype):
            if ("neon" in form[0]) == arm:
                names.append(_file_name(form, dtype))
                if problem := _compile(
                    inspect().compilers, _flags(form, dtype), directory / names[-1]
                ):
                    raise RuntimeError(problem)
    return names


def _forms(dtype: str) -> list[Form]:
    """Those for tensors of "fp32" or "bf16"; instructions that multiply bf16 are of use to that
    alone.
    """
    return [
        form
        for form in FORMS
        if dtype == "bf16" or not any("bf16" in feature for feature in form[0])
    ]


def _flags(form: Form, dtype: str) -> tuple[str, ...]:
    return (
        *COMMON,
        *form[3],
        f"-DXUSHI_LANES={form[2]}",
        *(("-DXUSHI_BF16=1",) if dtype == "bf16" else ()),
    )


def _file_name(form: Form, dtype: str) -> str:
    return (
        f"kernels-{dtype}-{form[1].lower().replace(' ', '-')}-{source_hash(_flags(form, dtype))}.so"
    )


def _open(path: Path, lanes: int) -> ctypes.CDLL | str:
    """The library, or what is wrong with it."""
    try:
        # The loader maps the file without looking: one that was cut short would end the process.
        if _seal(path).read_text(encoding="utf-8") != sha256_file(path):
            return "it is not what was compiled"
        library = ctypes.CDLL(str(path))
        return library if library.xushi_lanes() == lanes else "it is for vectors of another width"
    except (OSError, ValueError, AttributeError) as error:
        return str(error)


def _seal(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _compile(compilers: tuple[str, ...], flags: tuple[str, ...], path: Path) -> str:
    """Compile aside and rename into place; what is wrong, or nothing."""
    if not compilers:
        return "there is no C++ compiler (on Debian and Ubuntu: apt install g++)"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    try:
        say(f"compiling kernels for this processor, once, with {compilers[0]} (about ten seconds)")
        done = subprocess.run(
            [compilers[0], *flags, str(SOURCES / "kernels.cpp"), "-o", aside],
            text=True,
            capture_output=True,
            timeout=COMPILE_SECONDS,
            check=False,
        )
        if done.returncode:
            lines = (
                [line for line in done.stderr.splitlines() if "error" in line]
                or done.stderr.splitlines()
                or ["?"]
            )
            return (
                f"{compilers[0]} cannot compile them ({lines[0].strip()}); install a newer g++ "
                "or clang++"
            )
        os.replace(aside, path)
        _seal(path).write_text(sha256_file(path), encoding="utf-8")
    except subprocess.TimeoutExpired:
        return f"{compilers[0]} took more than {COMPILE_SECONDS} seconds"
    finally:
        Path(aside).unlink(missing_ok=True)
    return ""
