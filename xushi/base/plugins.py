"""Classes that a recipe names by file: "game.py:Counting" is class Counting of the file game.py.

Loading a class runs its file, so only name files that you trust.
"""

import hashlib
import sys
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from xushi.base.errors import BadInput

Base = TypeVar("Base")

_PREFIX = "xushi_plugin_"  # of the modules' names


def is_file_spec(spec: str) -> bool:
    """Whether `spec` has the form "file.py:Class"."""
    file, colon, _ = spec.rpartition(":")
    return bool(colon) and file.endswith(".py")


def plugin_file(spec: str, folder: Path) -> Path:
    """The file that "file.py:Class" names; a relative path starts at `folder`."""
    try:
        return folder / Path(spec.rpartition(":")[0]).expanduser()
    except RuntimeError as error:  # ~nobody
        raise BadInput(f"{spec!r}: {error}", "write the whole path") from None


def is_there(file: Path) -> bool:
    """Whether `file` is a file; a name that cannot be one is none."""
    try:
        return file.is_file()
    except OSError:  # too long
        return False


def load_class(spec: str, base: type[Base], folder: Path) -> type[Base]:
    """The class that "file.py:Class" names, a subclass of `base`.

    A relative file name starts at `folder`. Raises `BadInput` if the spec, the file, the class or
    its base is wrong, or if running the file fails.
    """
    if not is_file_spec(spec):
        raise BadInput(f"{spec!r} does not name a class of a file", "write it as file.py:Class")
    file = plugin_file(spec, folder)
    name = spec.rpartition(":")[2]
    if not is_there(file):
        raise BadInput(
            f"{spec!r}: the file {file} does not exist",
            "correct the path; a relative one starts at the folder of the recipe",
        )
    found = getattr(_load_module(file, spec), name, None)
    if not isinstance(found, type):
        raise BadInput(f"{file} defines no class {name}", "correct the name after the colon")
    if not found.__module__.startswith(_PREFIX):
        raise BadInput(
            f"{name} of {file} is defined in another module, {found.__module__}",
            "name the file that defines it: its content is part of the recipe's hash",
        )
    if not issubclass(found, base):
        raise BadInput(
            f"{name} of {file} is not a subclass of {base.__name__}",
            f"derive it from {base.__module__}.{base.__name__}",
        )
    return found


def code_of(loaded: type) -> str:
    """The SHA-256 of the file that a class was loaded from; "" for a class of the package."""
    module = sys.modules[loaded.__module__]
    if not loaded.__module__.startswith(_PREFIX) or module.__file__ is None:
        return ""
    return str(vars(module)["__xushi_sha256__"])


def _load_module(file: Path, spec: str) -> ModuleType:
    """Run `file` as a module; the same file with the same content is run once."""
    try:
        source = file.read_bytes()
    except OSError as error:
        raise BadInput(
            f"{spec!r}: {file} cannot be read: {error.strerror}",
            "check the path and its permissions",
        ) from None
    digest = hashlib.sha256(source).hexdigest()
    place = hashlib.sha256(f"{file.resolve()}:{digest}".encode()).hexdigest()
    name = f"{_PREFIX}{file.stem}_{place[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    module = ModuleType(name)
    module.__file__ = str(file)
    vars(module)["__xushi_sha256__"] = digest
    sys.modules[name] = module  # before it runs: dataclasses look their module up there
    try:
        # Not by an import: that may take the bytecode of an older file of the same size and time.
        exec(compile(source, str(file), "exec", dont_inherit=True), vars(module))
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise BadInput(
            f"{spec!r}: running {file} failed: {type(error).__name__}: {error}",
            "correct the file; python FILE shows the whole error",
        ) from error
    return module
