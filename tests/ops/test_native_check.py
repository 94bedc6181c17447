"""Runs native_check.cpp, which compares every kernel with plain loops in double, compiled for each
vector width and sanitizer.

A vector width that this processor lacks is compiled for the instructions it has: the compiler
splits or joins the vectors, so the tiles and remainders of that width are still tested.
"""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from xushi.base.machine import inspect
from xushi.ops.native import build

pytestmark = pytest.mark.slow

SOURCE = Path(__file__).with_name("native_check.cpp")
MACHINE = inspect()
# The library's flags without those that make it a shared library.
RELEASE = tuple(flag for flag in build.COMMON if flag not in ("-fPIC", "-shared"))
SANITIZED = ("-std=c++17", "-pthread", "-O1", "-g1", "-fno-sanitize-recover=all")
AVX2 = ("-mavx2", "-mfma")
BF16, TILES = "-DXUSHI_BF16=1", "-DXUSHI_TILES=1"
ARM_COMPILER = "aarch64-linux-gnu-g++"


def native_compiler() -> str:
    if not MACHINE.compilers:
        pytest.skip("there is no C++ compiler")
    return MACHINE.compilers[0]


def need(*features: str) -> None:
    if missing := set(features) - MACHINE.features:
        pytest.skip(f"this processor has no {', '.join(sorted(missing))}")


def need_runtime(flags: tuple[str, ...], directory: Path) -> None:
    """Skip if the compiler has no library for this sanitizer."""
    (directory / "empty.cpp").write_text("int main() {}\n")
    done = subprocess.run(
        [native_compiler(), *flags, "empty.cpp", "-o", "empty"],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"{native_compiler()} cannot link {flags[-1]}")


def compile_check(compiler: str, flags: tuple[str, ...], directory: Path) -> Path:
    program = directory / "native_check"
    done = subprocess.run(
        [compiler, *flags, "-Wno-psabi", "-I", str(build.SOURCES), str(SOURCE), "-o", str(program)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return program


def run_check(*command: str | Path) -> None:
    # The thread pool is never freed, on purpose, so leak detection would report only that.
    environment = {
        **os.environ,
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "halt_on_error=1",
    }
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, check=False, env=environment
    )
    if "FATAL: ThreadSanitizer: unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer cannot lay out its memory on this kernel")
    assert done.returncode == 0 and done.stdout.startswith("ok "), done.stdout + done.stderr[:10000]


# The undefined-behaviour sanitizer runs for one width of each dtype: its findings hardly depend on
# the width, and it doubles the compile time.
@pytest.mark.parametrize(
    "lanes, sanitizers, special",
    [
        pytest.param(4, "address", (), id="4 lanes for any processor"),
        pytest.param(8, "address,undefined", AVX2, id="8 lanes for AVX2"),
        pytest.param(16, "address", AVX2, id="16 lanes for AVX2"),
        pytest.param(8, "address,undefined", (*AVX2, BF16), id="8 lanes for AVX2 in bf16"),
        pytest.param(16, "address", (*AVX2, BF16), id="16 lanes for AVX2 in bf16"),
        pytest.param(16, "address,undefined", (*AVX2, BF16, TILES), id="tiles as loops, in bf16"),
    ],
)
def test_memory_is_not_overrun(
    lanes: int, sanitizers: str, special: tuple[str, ...], tmp_path: Path
) -> None:
    need(*(flag.removeprefix("-m") for flag in special if flag.startswith("-m")))
    flags = (*SANITIZED, *special, f"-fsanitize={sanitizers}")
    need_runtime(flags, tmp_path)
    run_check(compile_check(native_compiler(), (*flags, f"-DXUSHI_LANES={lanes}"), tmp_path))


def test_threads_do_not_race(tmp_path: Path) -> None:
    need("avx2", "fma")
    flags = (*SANITIZED, *AVX2, "-fsanitize=thread")
    need_runtime(flags, tmp_path)
    program = compile_check(native_compiler(), (*flags, "-DXUSHI_LANES=8"), tmp_path)
    # Some Linux kernels randomise addresses into the range that the sanitizer needs; setarch -R
    # turns that off.
    plain = (shutil.which("setarch"), platform.machine(), "-R")
    fixed = (
        plain[0]
        and subprocess.run([*plain, "true"], capture_output=True, check=False).returncode == 0
    )
    run_check(*(plain if fixed else ()), program)


def test_avx512_as_released(tmp_path: Path) -> None:
    need("avx512f", "avx2", "fma")
    run_check(
        compile_check(
            native_compiler(), (*RELEASE, "-mavx512f", *AVX2, "-DXUSHI_LANES=16"), tmp_path
        )
    )


def test_avx512_bf16_as_released(tmp_path: Path) -> None:
    need("avx512_bf16", "avx512f", "avx2", "fma")
    flags = (*RELEASE, "-mavx512bf16", "-mavx512f", *AVX2, "-DXUSHI_LANES=16", BF16)
    run_check(compile_check(native_compiler(), flags, tmp_path))


def test_amx_as_released(tmp_path: Path) -> None:
    need("amx_bf16", "avx512_bf16", "avx512f", "avx2", "fma")
    amx = build.BUILDS[0]
    flags = (*RELEASE, *amx.flags, f"-DXUSHI_LANES={amx.lanes}", BF16)
    run_check(compile_check(native_compiler(), flags, tmp_path))


@pytest.mark.parametrize("dtype", [(), (BF16,)], ids=["fp32", "bf16"])
def test_avx2_as_released(dtype: tuple[str, ...], tmp_path: Path) -> None:
    need("avx2", "fma")
    run_check(
        compile_check(native_compiler(), (*RELEASE, *AVX2, "-DXUSHI_LANES=8", *dtype), tmp_path)
    )


@pytest.mark.parametrize("dtype", [(), (BF16,)], ids=["fp32", "bf16"])
def test_neon_as_released(dtype: tuple[str, ...], tmp_path: Path) -> None:
    """Runs on an ARM processor directly, elsewhere in an emulator."""
    flags = (*RELEASE, "-DXUSHI_LANES=4", *dtype)
    if platform.machine() in ("aarch64", "arm64"):
        run_check(compile_check(native_compiler(), flags, tmp_path))
        return
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if not emulator or not shutil.which(ARM_COMPILER):
        pytest.skip(
            f"{ARM_COMPILER} and qemu-aarch64 are not both installed "
            "(on Debian: g++-aarch64-linux-gnu, qemu-user)"
        )
    run_check(emulator, compile_check(ARM_COMPILER, (*flags, "-static"), tmp_path))
