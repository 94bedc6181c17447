"""The Python files that a recipe names: found when it is read, copied into the run directory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xushi.base.errors import BadInput
from xushi.base.plugins import is_file_spec, is_there, plugin_file


def file_specs(table: dict[str, Any]) -> list[str]:
    """The entries of `stages` that name classes of files."""
    stages = table.get("stages", [])
    return [s for s in stages if isinstance(s, str) and is_file_spec(s)]


def collect_files(
    table: dict[str, Any], folder: Path, known: Mapping[str, Path] | None = None
) -> dict[str, Path]:
    """Find the Python files that a recipe names, and leave only their names in the recipe.

    A relative path starts at the recipe's folder or else at the current directory. `known` has
    files that were found before, by name.
    """
    files: dict[str, Path] = {}

    def collect(spec: str) -> str:
        written = spec.rpartition(":")[0]
        file = (known or {}).get(written) or plugin_file(spec, folder)
        if not is_there(file):
            file = plugin_file(spec, Path.cwd())
        if not is_there(file):
            raise BadInput(
                f"{spec!r}: there is no file {plugin_file(spec, folder)}",
                "correct the path; a relative one starts at the folder of the recipe",
            )
        if files.setdefault(file.name, file).resolve() != file.resolve():
            raise BadInput(
                f"the recipe names two files {file.name}: {files[file.name]} and {file}",
                "rename one of them: both are copied into the run directory",
            )
        return f"{file.name}:{spec.rpartition(':')[2]}"

    stages = table.get("stages")
    if isinstance(stages, list):
        specs = file_specs(table)
        table["stages"] = [collect(entry) if entry in specs else entry for entry in stages]
    environment = table.get("environment")
    if isinstance(environment, dict):
        kind = environment.get("kind")
        if isinstance(kind, str) and is_file_spec(kind):
            environment["kind"] = collect(kind)
    return files
