"""The command line's application, and the options that several commands share."""

from pathlib import Path
from typing import Annotated, Any

import typer

from xushi.base.errors import BadInput

app = typer.Typer(
    name="xushi",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Raw text in, a served DeepSeek-style reasoning model out.",
)

RecipeArgument = Annotated[
    Path | None, typer.Argument(help="the recipe; recipes/demo.toml if left out")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="override a key of the recipe"),
]
RunArgument = Annotated[Path, typer.Argument(help="a run directory, such as runs/demo")]
JsonOption = Annotated[bool, typer.Option("--json", help="print figures as JSON")]


DTYPES = {"auto": None, "fp32": "float32", "bf16": "bfloat16"}
"""What --dtype takes, and torch's names for it."""


def check_dtype(name: str) -> None:
    """Refuse what --dtype does not take."""
    if name not in DTYPES:
        raise BadInput(f"--dtype {name} is not known", f"use one of {', '.join(DTYPES)}")


def default_recipe() -> Path:
    """The demo's recipe: the checkout's, or the copy inside an installed package."""
    here = Path("recipes/demo.toml")
    packaged = Path(__file__).parent.parent / "recipes" / "demo.toml"
    return here if here.exists() else packaged


def print_table(values: dict[str, Any]) -> None:
    """Keys and values, one a line."""
    for key, value in values.items():
        shown = f"{value:,}" if isinstance(value, int) else value
        if isinstance(value, float):
            shown = f"{value:,.1f}" if value >= 10 else f"{value:.3g}"
        print(f"{key:<44} {shown}")
