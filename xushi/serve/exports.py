"""Which models a run directory offers, and what each says of itself. Not here: loading them
(engine.LLM).
"""

from pathlib import Path

from xushi.base.config import StrictConfig, parse
from xushi.base.errors import BadInput
from xushi.base.files import read_json

BASE = "base"
REASONING = "reasoning"
NAMES = (REASONING, BASE)


class ModelCard(StrictConfig):
    """What a reader of the page is told: one or two plain sentences each, and an input to try. All
    optional.
    """

    title: str = ""
    can: str = ""
    cannot: str = ""
    example: str = ""


DEFAULT_CARDS = {
    BASE: ModelCard(
        title="Base",
        can="It continues text of the kind it was trained on.",
        cannot="It cannot converse: it has never seen a conversation.",
    ),
    REASONING: ModelCard(
        title="Reasoning", can="It thinks aloud, then answers the kind of task it was trained on."
    ),
}


def can_chat(name: str) -> bool:
    """Whether the model of this name has seen conversations; the base has not."""
    return name != BASE


def find_exports(run_directory: Path) -> dict[str, Path]:
    """Export directories of a run by model name, reasoning first; a run without any is a
    `XushiError`.
    """
    if not run_directory.is_dir():
        raise BadInput(
            f"run directory {run_directory} does not exist",
            "give a directory that xushi run has made",
        )
    found = {
        name: path
        for name in NAMES
        if ((path := run_directory / "export" / name) / "config.json").is_file()
    }
    if not found:
        raise BadInput(
            f"run {run_directory} has no exported model in {run_directory / 'export'}",
            "let xushi run finish its pretrain stage first",
        )
    return found


def read_card(name: str, directory: Path) -> ModelCard:
    """The `model_card.json` of an export, or what can be said of any model of this name."""
    path = directory / "model_card.json"
    if not path.exists():
        return DEFAULT_CARDS.get(name, ModelCard(title=name))
    table = read_json(path, "remove it, or export the model again")
    return parse(ModelCard, table, str(path))
