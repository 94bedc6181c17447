"""The project as a newcomer meets it: the wheel away from its checkout, the speed of the door, the
pins.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import xushi

ROOT = Path(__file__).parent.parent
DATA_SUFFIXES = (".cpp", ".h", ".html", ".json", ".toml")
HELP = "import sys; from xushi.cli import main; sys.argv = ['xushi', '--help']; main()"


def command(*arguments: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def built(place: Path, **environment: str) -> Path:
    """A wheel, from a copy: a build leaves files behind, and stale ones in the checkout would hide
    a missing file.
    """
    source, dist = place / "source", place / "dist"
    source.mkdir()
    shutil.copytree(ROOT / "xushi", source / "xushi", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command(
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "-w",
        dist,
        ".",
        cwd=source,
        **environment,
    )
    return next(dist.glob("xushi-*.whl"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("wheel"))


def test_every_file_of_tests_has_some_and_is_found() -> None:
    """A file that lost its tests, or its name, would be missed by nobody."""
    for path in (ROOT / "tests").rglob("*.py"):
        found = re.search(r"^ *def test_|^class \w+\(.*Machine\)", path.read_text("utf-8"), re.M)
        assert bool(found) == path.name.startswith("test_"), path


@pytest.mark.slow
def test_wheel_holds_every_file(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "xushi").rglob("*")
        if path.suffix in (".py", *DATA_SUFFIXES)
    }
    assert wanted <= inside
    assert {name.split("/")[0] for name in inside} == {
        "xushi",
        f"xushi-{xushi.__version__}.dist-info",
    }


@pytest.mark.slow
def test_wheel_works_outside_the_checkout(wheel, tmp_path):
    target = tmp_path / "installed"
    command(
        "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel, cwd=tmp_path
    )
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((ROOT / "xushi").rglob("*.py"))
    ]
    # -P and the path first: the checkout, which may be installed in place, must not answer instead.
    script = (
        f"import importlib, xushi\nprint(xushi.__file__)\nfor m in {modules!r}: "
        "importlib.import_module(m)"
    )
    printed = command("-P", "-c", script, cwd=tmp_path, PYTHONPATH=str(target))
    assert Path(printed.strip()).is_relative_to(target)
    assert "run" in command("-P", "-c", HELP, cwd=tmp_path, PYTHONPATH=str(target))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_a_wheel_may_carry_kernels_which_need_no_compiler(tmp_path):
    """Where it is installed there is no compiler and no place to keep what one would make."""
    wheel = built(tmp_path, XUSHI_KERNELS="1")
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")
    target = tmp_path / "installed"
    command(
        "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel, cwd=tmp_path
    )
    script = (
        "from xushi.ops import native\nfor dtype in ('fp32', 'bf16'): print(native.status(dtype))\n"
        "import torch, xushi\nprint(xushi.__file__)\nassert native.serves(torch.ones(2, 2))"
    )
    (tmp_path / "file").write_text("no directory")
    printed = command(
        "-P",
        "-c",
        script,
        cwd=tmp_path,
        PYTHONPATH=str(target),
        PATH="/nowhere",
        XUSHI_CACHE=str(tmp_path / "file"),
        XUSHI_OPS="",
    ).splitlines()
    assert all(
        line.startswith("C++ with") and line.endswith("as installed") for line in printed[:2]
    ), printed
    assert Path(printed[2]).is_relative_to(target)


def test_help_answers_at_once():
    """Half a second of processor time at the very most, and nothing heavy imported: the clock on a
    wall would measure what else the machine does.
    """
    script = (
        "import resource, sys\nfrom xushi.cli import main\nsys.argv = ['xushi', '--help']\ntry:\n "
        "   main()\n"
        "except SystemExit:\n    pass\nused = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print('\\nLOADED', *sys.modules)\nprint('SECONDS', used.ru_utime + used.ru_stime)"
    )
    printed = [command("-c", script, cwd=ROOT) for _ in range(3)]
    assert "doctor" in printed[0]
    loaded = set(printed[0].split("LOADED")[1].split())
    assert not loaded & {
        "torch",
        "numpy",
        "pyarrow",
        "fastapi",
        "tokenizers",
        "pydantic",
        "transformers",
    }
    assert min(float(text.split("SECONDS")[1]) for text in printed) < 0.5


def pins() -> dict[str, str]:
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), lines
    return {canonical(name): version for name, version in (line.split("==") for line in lines)}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_requirement_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for group in project["optional-dependencies"].values() for line in group]
    names = {
        canonical(re.split(r"[\[<>=!~ ;]", line)[0]) for line in project["dependencies"] + extras
    } - {"xushi"}
    assert names <= set(pins())


def test_the_demos_text_comes_with_the_package_alone():
    """Every package that the demo reads is installed by xushi itself, not only by what its tests
    need.
    """
    wanted, closure = ["xushi"], set()
    while wanted:
        name = wanted.pop()
        if name not in closure:
            closure.add(name)
            for line in metadata.requires(name) or []:
                requirement = Requirement(line)
                if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                    wanted.append(canonical(requirement.name))
    recipe = tomllib.loads((ROOT / "recipes" / "demo.toml").read_text(encoding="utf-8"))
    assert {
        canonical(name) for source in recipe["data"]["sources"] for name in source["packages"]
    } <= closure


def test_every_import_is_a_declared_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = project["dependencies"] + project["optional-dependencies"]["gguf"]
    declared = {canonical(re.split(r"[<>=!~ ;]", line)[0]) for line in lines}
    imported = {
        name.name if isinstance(node, ast.Import) else node.module or ""
        for path in (ROOT / "xushi").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and not node.level)
        for name in node.names
    }
    outside = {name.split(".")[0] for name in imported} - set(sys.stdlib_module_names) - {"xushi"}
    makers = metadata.packages_distributions()
    assert "numpy" in outside
    assert {
        name
        for name in outside
        if not declared & {canonical(maker) for maker in makers.get(name, [])}
    } == set()


def test_pins_hold_for_what_is_installed():
    installed = {
        canonical(each.metadata["Name"]): each.version for each in metadata.distributions()
    }
    unlike = {
        name: (version, installed[name])
        for name, version in pins().items()
        if name in installed and installed[name].split("+")[0] != version
    }
    assert not unlike, "make reinstalls when constraints.txt changes; run it, or correct the pins"


def test_the_pictures_of_the_architecture_are_up_to_date() -> None:
    command(ROOT / "tools" / "draw_architecture.py", "--check", cwd=ROOT)
