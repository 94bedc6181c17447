"""Building the kernels: what can be compiled is, a build is kept, and one that fails means slower."""

import dataclasses
import os
from pathlib import Path

import pytest

from xushi.base.machine import inspect
from xushi.ops import native
from xushi.ops.native import build

compiled = pytest.mark.skipif(native.load() is None, reason=native.status())
MACHINE = inspect()


@pytest.fixture(autouse=True)
def nothing_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XUSHI_OPS", raising=False)


@pytest.mark.skipif(
    not MACHINE.compilers or not any(each.features <= MACHINE.features for each in build.BUILDS),
    reason="needs a C++ compiler, and a processor with AVX2 or NEON",
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_can_be_compiled_is(dtype: str) -> None:
    """Else a mistake in a kernel would only skip what tests it. A compiler too old for a form's
    instructions may refuse their flags.
    """
    line = native.status(dtype)
    too_old = "unrecognized" in line or "unknown argument" in line
    assert native.load(dtype) is not None or too_old, line
    assert "cannot compile" not in line or too_old, line


STUB = """extern "C" int xushi_lanes() { return XUSHI_LANES; }
extern "C" int xushi_granted() { return 1; }
"""


@pytest.fixture
def quick(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled is a stub that can say what it is: the compiler, its flags, the cache and
    the loader are the real ones, and the kernels themselves are compiled for the other tests.
    """
    sources = tmp_path_factory.mktemp("sources")
    (sources / "kernels.cpp").write_text(STUB)
    monkeypatch.setattr(build, "SOURCES", sources)


@compiled
@pytest.mark.usefixtures("quick")
def test_a_build_is_kept_and_a_damaged_one_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XUSHI_CACHE", str(tmp_path / "deep" / "cache"))
    assert build.build_and_load("fp32").library is not None
    (library,) = (tmp_path / "deep" / "cache" / "kernels").glob("*.so")
    written = library.stat().st_ino
    assert build.build_and_load("fp32").library is not None and library.stat().st_ino == written
    # Another directory, because dlopen would return the library that is already open at this path.
    monkeypatch.setenv("XUSHI_CACHE", str(tmp_path))
    (tmp_path / "kernels").mkdir()
    damaged = tmp_path / "kernels" / library.name
    damaged.write_bytes(library.read_bytes()[:5000])
    damaged.with_suffix(".sha256").write_text(library.with_suffix(".sha256").read_text())
    assert (
        build.build_and_load("fp32").library is not None
        and damaged.stat().st_size == library.stat().st_size
    )
    assert {path.suffix for path in (tmp_path / "kernels").iterdir()} == {".so", ".sha256"}


@compiled
@pytest.mark.usefixtures("quick")
def test_the_seal_is_that_of_what_was_compiled_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the rename and the seal another process puts its own library there: what is sealed is
    not that one.
    """
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        real(source, target)
        if Path(target).suffix == ".so":
            Path(target).write_bytes(b"another one")

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setenv("XUSHI_CACHE", str(tmp_path))
    loaded = build.build_and_load("fp32")
    assert loaded.library is None and "the file is damaged: its hash has changed" in loaded.line


AVX2 = frozenset({"avx2", "fma"})
BROKEN = {
    "no compiler": ("there is no C++ compiler", ()),
    "one that fails": (
        "cannot compile the kernels (sorry, error: no)",
        ("#!/bin/sh\necho 'sorry, error: no' >&2\nexit 1\n",),
    ),
    "one that writes nothing": ("was compiled but cannot be loaded", ("#!/bin/sh\nexit 0\n",)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_compiler_means_slower_and_a_plain_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message, scripts = BROKEN[name]
    for number, script in enumerate(scripts):
        (tmp_path / f"c{number}").write_text(script)
        (tmp_path / f"c{number}").chmod(0o755)
    features = AVX2
    monkeypatch.setattr(
        build,
        "inspect",
        lambda: Machine(
            features, tuple(str(tmp_path / f"c{number}") for number in range(len(scripts)))
        ),
    )
    monkeypatch.setenv("XUSHI_CACHE", str(tmp_path / "cache"))
    loaded = build.build_and_load("fp32")
    assert (
        loaded.library is None and message in loaded.line and "the PyTorch forms run" in loaded.line
    )
    assert "\n" not in loaded.line
    assert name == "one that writes nothing" or not list((tmp_path / "cache").rglob("*.so"))


class Machine:
    """The fields of a machine that `build` reads."""

    def __init__(self, features: frozenset[str], compilers: tuple[str, ...]) -> None:
        self.features, self.compilers = features, compilers


def test_a_cache_that_cannot_be_written_means_slower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(build, "inspect", lambda: Machine(AVX2, ("c++",)))
    monkeypatch.setenv("XUSHI_CACHE", str(tmp_path / "file"))
    loaded = build.build_and_load("fp32")
    assert loaded.library is None and "set XUSHI_CACHE" in loaded.line


def test_an_unknown_processor_is_never_given_instructions_that_it_lacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for features in (frozenset[str](), frozenset({"avx2"}), frozenset({"avx512f"})):
        monkeypatch.setattr(build, "inspect", lambda features=features: Machine(features, ("c++",)))
        assert build.build_and_load("fp32").library is None


@pytest.mark.parametrize(
    "features, fp32, bf16",
    [
        ({"amx_bf16", "avx512_bf16", "avx512f", "avx2", "fma"}, "avx-512-", "amx-"),
        ({"avx512_bf16", "avx512f", "avx2", "fma"}, "avx-512-", "avx-512-bf16-"),
        ({"avx512f", "avx2", "fma"}, "avx-512-", "avx-512-"),
        ({"avx2", "fma"}, "avx2-", "avx2-"),
        ({"neon"}, "neon-", "neon-"),
    ],
)
def test_each_processor_gets_its_own_build(
    features: set[str], fp32: str, bf16: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build never uses an instruction that the processor does not report."""
    asked: list[tuple[tuple[str, ...], str]] = []

    def compile_(compilers: tuple[str, ...], flags: tuple[str, ...], path: Path) -> str:
        asked.append((flags, path.name))
        return "not now"

    monkeypatch.setattr(build, "_compile", compile_)
    monkeypatch.setattr(build, "inspect", lambda: Machine(frozenset(features), ("c++",)))
    monkeypatch.setenv("XUSHI_CACHE", str(tmp_path))
    for dtype, form in (("fp32", fp32), ("bf16", bf16)):
        asked.clear()
        assert build.build_and_load(dtype).line == "not now; the PyTorch forms run"
        assert asked[0][1].startswith(f"kernels-{dtype}-{form}")  # the best build comes first
        for flags, name in asked:
            assert ("-DXUSHI_BF16=1" in flags) == (dtype == "bf16")
            instructions = {flag[2:] for flag in flags if flag.startswith("-m")} - {"amx-tile"}
            instructions = {
                flag.replace("avx512bf16", "avx512_bf16").replace("-", "_") for flag in instructions
            }
            assert instructions <= features
            assert ("amx_bf16" in instructions) == ("-amx-" in name) == ("-DXUSHI_TILES=1" in flags)
            assert ("avx512_bf16" in instructions) == ("avx-512-bf16" in name or "-amx-" in name)


@pytest.mark.skipif(
    not {"avx512_bf16", "avx512f", "avx2", "fma"} <= inspect().features, reason="needs AVX-512 BF16"
)
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "flag, problem",
    [
        ("-mno-such-thing", "cannot compile the kernels"),
        ("-DXUSHI_TILES=1", "does not grant this process the registers of AMX"),
    ],
)
def test_if_the_best_build_cannot_be_had_the_next_is_used(
    flag: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    avx512_bf16 = next(b for b in build.BUILDS if b.name == "AVX-512 BF16")
    amx = dataclasses.replace(avx512_bf16, name="AMX", flags=(*avx512_bf16.flags, flag))
    plain_open = build._open

    def open_(path: Path, lanes: int):
        library = plain_open(path, lanes)
        if "-amx-" in path.name and not isinstance(library, str):
            library.xushi_granted = lambda: 0
        return library

    monkeypatch.setattr(build, "BUILDS", (amx, avx512_bf16))
    monkeypatch.setattr(build, "_open", open_)
    monkeypatch.setenv("XUSHI_CACHE", str(tmp_path))
    loaded = build.build_and_load("bf16")
    assert loaded.library is not None and loaded.name == "C++ AVX-512 BF16"
    assert (
        loaded.line.startswith("C++ with AVX-512 BF16 for bf16, not with AMX: ")
        and problem in loaded.line
    )


@compiled
@pytest.mark.usefixtures("quick")
def test_a_library_of_another_width_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the cache had been copied from another machine: the library is compiled again."""
    monkeypatch.setenv("XUSHI_CACHE", str(tmp_path))
    assert build.build_and_load("fp32").library is not None
    (library,) = (tmp_path / "kernels").glob("*.so")
    assert "another vector width" in build._open(library, 1)
