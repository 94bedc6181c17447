"""The layers of the package, checked on the real imports: a package imports only from lower ones."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "xushi"

LAYERS = {
    "base": 0,
    "ops": 1,
    "model": 2, "tokenizer": 2,
    "data": 3, "envs": 3, "engine": 3, "plan": 3,
    "evaluate": 4,
    "train": 5,
    "serve": 6, "rl": 6,
    "run": 7,
    "report": 8,
    "ladder": 9,
    "cli": 10,
}  # fmt: skip
FILES = {"__main__": 11}

PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
LONGEST_FILE = 400


def layer(package: str) -> float:
    return {**LAYERS, **FILES}[package]


def module_name(path: Path, package: Path) -> list[str]:
    parts = [package.name, *path.relative_to(package).with_suffix("").parts]
    return parts[:-1] if parts[-1] == "__init__" else parts


def imported(path: Path, package: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a file imports, at any depth and by any spelling."""
    here = module_name(path, package)
    folder = here if path.name == "__init__.py" else here[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = folder[: len(folder) - node.level + 1] if node.level else []
            origin = ".".join([*start, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            called = (
                node.func.attr
                if isinstance(node.func, ast.Attribute)
                else getattr(node.func, "id", "")
            )
            first = node.args[0]
            if called in ("import_module", "__import__") and isinstance(first, ast.Constant):
                yield node.lineno, str(first.value)


def layer_faults(package: Path) -> list[str]:
    faults = []
    for path in sorted(package.rglob("*.py")):
        place = module_name(path, package)
        own = place[1] if len(place) > 1 else None
        if own is not None and own not in LAYERS and own not in FILES:
            faults.append(f"{path}: {own} is not in LAYERS")
            continue
        for line, name in imported(path, package):
            parts = name.split(".")
            if parts[0] != package.name or len(parts) < 2 or parts[1] == own:
                continue
            other = parts[1]
            if other not in LAYERS and other not in FILES:
                continue  # a name defined by the package's own __init__
            if own is None:
                faults.append(f"{path}:{line}: the package's root imports {other}")
            elif layer(other) >= layer(own):
                faults.append(
                    f"{path}:{line}: {own} (layer {layer(own):g}) imports {other} (layer "
                    f"{layer(other):g})"
                )
    return faults


def pickle_faults(package: Path) -> list[str]:
    faults = []
    for path in sorted(package.rglob("*.py")):
        faults += [
            f"{path}:{line}: imports {name}"
            for line, name in imported(path, package)
            if name.split(".")[0] in PICKLES
        ]
        faults += [
            f"{path}:{node.lineno}: torch.{node.attr} pickles"
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Attribute)
            and node.attr in ("save", "load")
            and isinstance(node.value, ast.Name)
            and node.value.id == "torch"
        ]
    return faults


def form_faults(package: Path) -> list[str]:
    faults = []
    for path in sorted(package.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if not (ast.get_docstring(ast.parse(text)) or "").strip():
            faults.append(f"{path}: opens with no docstring")
        if len(text.splitlines()) > LONGEST_FILE:
            faults.append(
                f"{path}: {len(text.splitlines())} lines, and {LONGEST_FILE} is the limit"
            )
    return faults


@pytest.mark.parametrize("check", [layer_faults, pickle_faults, form_faults])
def test_package(check):
    assert PACKAGE.joinpath("base", "errors.py").exists(), "the check would pass on an empty folder"
    assert check(PACKAGE) == []


def build(root: Path, files: dict[str, str]) -> Path:
    package = root / "xushi"
    for name, text in {"__init__.py": '"""Root."""\n__version__ = "0"\n', **files}.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return package


@pytest.mark.parametrize(("name", "text"), [
    ("base/files.py", "import xushi.model\n"),
    ("base/files.py", "from xushi import model\n"),
    ("base/files.py", "from .. import model\n"),
    ("base/__init__.py", "from ..model import config\n"),
    ("base/files.py", "from ..model.config import ModelConfig\n"),
    ("base/files.py", "import importlib\nimportlib.import_module('xushi.model')\n"),
    ("model/blocks.py", "def late():\n    from xushi.train import loop\n"),
    ("model/blocks.py", "class Late:\n    def method(self):\n        if self:\n            import "
    "xushi.cli\n"),
    ("model/blocks.py", "try:\n    from xushi.tokenizer import encode\nexcept ImportError:\n    "
    "pass\n"),
    ("data/batch.py", "from xushi.envs import digit_sum\n"),
    ("run/runner.py", "from xushi.report import write_report\n"),
    ("train/loop.py", "from xushi.run.recipe import Recipe\n"),
    ("base/plugins.py", "from xushi.run import stages\n"),
    ("cellar/wine.py", "import os\n"),
    ("__init__.py", "from xushi.base import errors\n"),
])  # fmt: skip
def test_layer_check_finds(tmp_path, name, text):
    assert len(layer_faults(build(tmp_path, {name: text}))) == 1


def test_layer_check_allows(tmp_path):
    package = build(tmp_path, {
        "base/files.py": "from xushi import __version__\nfrom xushi.base import errors\nfrom . "
        "import config\n",
        "train/loop.py": "import torch\nfrom xushi.model.config import ModelConfig\nfrom ..data "
        "import batch\n",
        "run/stages.py": "from xushi.run.recipe import Recipe\nfrom xushi.rl import grpo\n",
        "cli.py": "def run():\n    from xushi.run import stages\n    from xushi.report import "
        "page\n",
    })  # fmt: skip
    assert layer_faults(package) == []


@pytest.mark.parametrize("text", [
    "import pickle\n", "def f():\n    from pickle import loads\n", "import torch\ntorch.save(1, "
    "'x')\n",
    "import torch\ndef f(): return torch.load('x')\n",
])  # fmt: skip
def test_pickle_check_finds(tmp_path, text):
    assert len(pickle_faults(build(tmp_path, {"base/files.py": text}))) == 1


def test_form_check_finds(tmp_path):
    package = build(
        tmp_path,
        {
            "base/bare.py": "x = 1\n",
            "base/long.py": '"""Long."""\n' + "x = 1\n" * 400,
            "base/fits.py": '"""Fits."""\n' + "x = 1\n" * 399,
        },
    )
    assert [fault.split(": ")[0].split("/")[-1] for fault in form_faults(package)] == [
        "bare.py",
        "long.py",
    ]
