"""Compile and load the kernels: the best build for this processor, once per source hash.

`load` never raises, `form` and `status` only for an unknown XUSHI_OPS. Where there is no library,
`status` gives the reason in one line and the PyTorch forms run.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

from xushi.base.artifacts import cache_directory
from xushi.base.errors import XushiError
from xushi.base.files import remove_partials, sha256_file, write_atomic
from xushi.base.machine import inspect
from xushi.base.progress import say
from xushi.ops.dispatch import asked_form

SOURCES = Path(__file__).parent
BUILT = SOURCES / "built"  # libraries in an installed wheel made with XUSHI_KERNELS=1
COMMON = (
    "-std=c++17",
    "-O3",
    "-fno-math-errno",
    "-ffp-contract=fast",
    "-fPIC",
    "-shared",
    "-pthread",
)
COMPILE_SECONDS = 120


@dataclass(frozen=True)
class Build:
    """One way to compile the kernels."""

    name: str
    features: frozenset[str]  # what the processor must report
    lanes: int  # vector width in floats
    flags: tuple[str, ...]


# Best first: the first build that fits the processor and can be made is used.
BUILDS = (
    Build(
        "AMX",
        frozenset({"amx_bf16", "avx512_bf16", "avx512f", "avx2", "fma"}),
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
    Build(
        "AVX-512 BF16",
        frozenset({"avx512_bf16", "avx512f", "avx2", "fma"}),
        16,
        ("-mavx512bf16", "-mavx512f", "-mavx2", "-mfma"),
    ),
    Build(
        "AVX-512",
        frozenset({"avx512f", "avx2", "fma"}),
        16,
        ("-mavx512f", "-mavx2", "-mfma"),
    ),
    Build("AVX2", frozenset({"avx2", "fma"}), 8, ("-mavx2", "-mfma")),
    Build("NEON", frozenset({"neon"}), 4, ()),
)


@dataclass(frozen=True)
class Loaded:
    """The library or None, and in one line which build it is or why there is none."""

    library: ctypes.CDLL | None
    line: str
    name: str = "pytorch"


def status(dtype: str = "fp32") -> str:
    """Which form of the ops runs and why, in one line for `xushi doctor`.

    Compiles the kernels first if necessary, unless XUSHI_OPS asks for another form.
    """
    if asked := asked_form():
        return f"XUSHI_OPS={asked} selects the {asked} forms, which are slower; unset it"
    return _loaded(dtype).line


def form(dtype: str = "fp32") -> str:
    """The form that runs: what XUSHI_OPS asks for, else the build's name, else "pytorch"."""
    return asked_form() or _loaded(dtype).name


def load(dtype: str = "fp32") -> ctypes.CDLL | None:
    """The kernels for "fp32" or "bf16" tensors, or None if there are none. The first call on a
    machine compiles them.
    """
    return _loaded(dtype).library


def source_hash(flags: tuple[str, ...]) -> str:
    """Hash of the compiler flags and every source file: 16 hex digits."""
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
    """Find or compile the library for this processor and "fp32" or "bf16" tensors, and load it.

    If a build cannot be had (the compiler is too old for it, or the system does not grant its
    registers), the next one that fits is tried.
    """
    machine = inspect()
    fitting = [build for build in _builds(dtype) if build.features <= machine.features]
    problem = "this processor has neither AVX2 nor NEON"
    for number, build in enumerate(fitting):
        library, note = _library(build, dtype, machine.compilers)
        if library is not None:
            instead = f", not with {fitting[0].name}: {problem}" if number else ""
            line = f"C++ with {build.name} for {dtype}{note}{instead}"
            return Loaded(library, line, f"C++ {build.name}")
        if number == 0:
            problem = note
    return Loaded(None, f"{problem}; the PyTorch forms run")


def _library(
    build: Build, dtype: str, compilers: tuple[str, ...]
) -> tuple[ctypes.CDLL | None, str]:
    """The library and a note, or None and why it cannot be had.

    Taken from the installed wheel, else from the cache, else compiled into the cache.
    """
    installed = _open(BUILT / _file_name(build, dtype), build.lanes)
    library = installed
    note = ", as installed"
    if isinstance(installed, str):
        library = _cached_library(build, dtype, compilers)
        note = ""
    if isinstance(library, str):
        return None, library
    if not library.xushi_granted():
        return None, f"the system does not grant this process the registers of {build.name}"
    return library, note


def _cached_library(build: Build, dtype: str, compilers: tuple[str, ...]) -> ctypes.CDLL | str:
    """The library from the cache, compiled if missing or damaged; or why it cannot be had."""
    try:
        path = cache_directory() / "kernels" / _file_name(build, dtype)
        library = _open(path, build.lanes)
        if isinstance(library, str):
            if problem := _compile(compilers, _flags(build, dtype), path):
                return problem
            library = _open(path, build.lanes)
        with contextlib.suppress(OSError):  # the time of the last use, which `xushi cache` shows
            os.utime(path)
    except (OSError, RuntimeError, XushiError) as error:  # RuntimeError: there is no home directory
        problem = error.problem if isinstance(error, XushiError) else str(error)
        return (
            f"compiled kernels cannot be stored ({problem}); set XUSHI_CACHE to a writable "
            "directory"
        )
    if isinstance(library, str):
        return (
            f"{path} was compiled but cannot be loaded ({library}); set XUSHI_CACHE to another "
            "directory, or use another compiler"
        )
    return library


def compile_all(directory: Path) -> list[str]:
    """Compile every build for this kind of processor into `directory`, for a wheel. Returns the
    file names.

    Raises RuntimeError if one cannot be compiled.
    """
    arm = platform.machine().lower() in ("aarch64", "arm64")
    names = []
    for dtype in ("fp32", "bf16"):
        for build in _builds(dtype):
            if ("neon" in build.features) != arm:
                continue
            name = _file_name(build, dtype)
            if problem := _compile(inspect().compilers, _flags(build, dtype), directory / name):
                raise RuntimeError(problem)
            names.append(name)
    return names


def _builds(dtype: str) -> list[Build]:
    """The builds for "fp32" or "bf16" tensors; bf16 instructions are of no use to fp32."""
    if dtype == "bf16":
        return list(BUILDS)
    return [build for build in BUILDS if not any("bf16" in feature for feature in build.features)]


def _flags(build: Build, dtype: str) -> tuple[str, ...]:
    bf16 = ("-DXUSHI_BF16=1",) if dtype == "bf16" else ()
    return (*COMMON, *build.flags, f"-DXUSHI_LANES={build.lanes}", *bf16)


def _file_name(build: Build, dtype: str) -> str:
    name = build.name.lower().replace(" ", "-")
    return f"kernels-{dtype}-{name}-{source_hash(_flags(build, dtype))}.so"


def _open(path: Path, lanes: int) -> ctypes.CDLL | str:
    """The library at `path`, or what is wrong with it."""
    try:
        # dlopen maps the file unchecked: a truncated one would kill the process.
        if _seal(path).read_text(encoding="utf-8") != sha256_file(path):
            return "the file is damaged: its hash has changed"
        library = ctypes.CDLL(str(path))
        return library if library.xushi_lanes() == lanes else "it is for another vector width"
    except (OSError, ValueError, AttributeError) as error:
        return str(error)


def _seal(path: Path) -> Path:
    """The file beside a library that holds its SHA-256."""
    return path.with_suffix(".sha256")


def _compile(compilers: tuple[str, ...], flags: tuple[str, ...], path: Path) -> str:
    """Compile to a temporary file and rename it to `path`, then seal it. Returns what went wrong,
    or "". Between the two a reader finds no seal that fits, and compiles for itself.
    """
    if not compilers:
        return "there is no C++ compiler (on Debian and Ubuntu: apt install g++)"
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_partials(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    temporary.touch()  # a compiler that writes nothing leaves an empty library
    try:
        say(f"compiling kernels for this processor, once, with {compilers[0]} (about ten seconds)")
        done = subprocess.run(
            [compilers[0], *flags, str(SOURCES / "kernels.cpp"), "-o", str(temporary)],
            text=True,
            capture_output=True,
            timeout=COMPILE_SECONDS,
            check=False,
        )
        if done.returncode:
            problem = _first_error(done.stderr)
            return (
                f"{compilers[0]} cannot compile the kernels ({problem}); install a newer g++ or "
                "clang++"
            )
        digest = sha256_file(temporary)  # of what was compiled here, not of what others put there
        os.replace(temporary, path)
        write_atomic(_seal(path), digest)
    except subprocess.TimeoutExpired:
        return f"{compilers[0]} took more than {COMPILE_SECONDS} seconds"
    finally:
        temporary.unlink(missing_ok=True)
    return ""


def _first_error(output: str) -> str:
    """The first line of a compiler's output that names an error, else its first line."""
    lines = output.splitlines()
    errors = [line for line in lines if "error" in line]
    return (errors or lines or ["?"])[0].strip()
