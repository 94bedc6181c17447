"""The exported models of a run directory and their cards. Not here: loading them (engine.LLM)."""

from pathlib import Path

from xushi.base.config import StrictConfig, parse
from xushi.base.errors import BadInput
from xushi.base.files import read_json

BASE = "base"
REASONING = "reasoning"
NAMES = (REASONING, BASE)


class CardTexts(StrictConfig):
    """What is said about a model in one language: a title, and `can` and `cannot`, one or two plain
    sentences each.
    """

    title: str = ""
    can: str = ""
    cannot: str = ""


class ModelCard(CardTexts):
    """What the chat page and the terminal chat say about a model. All fields are optional.

    `example` is an input to try. The page takes from `chinese` what there is.
    """

    example: str = ""
    chinese: CardTexts = CardTexts()


DEFAULT_CARDS = {
    BASE: ModelCard(
        title="Base",
        can="It continues text of the kind it was trained on.",
        cannot="It cannot chat: it was not trained on conversations.",
        chinese=CardTexts(
            title="基础模型",
            can="它续写与训练文本相似的文字。",
            cannot="它不会对话：它没有在对话上训练过。",
        ),
    ),
    REASONING: ModelCard(
        title="Reasoning",
        can="It thinks aloud, then answers the kind of task it was trained on.",
        chinese=CardTexts(title="推理模型", can="它先写出思考，再回答它训练过的那类任务。"),
    ),
}


def can_chat(name: str) -> bool:
    """Whether the model with this name was trained on conversations. The base model was not."""
    return name != BASE


def find_exports(run_directory: Path) -> dict[str, Path]:
    """The export directories of a run by model name, reasoning first.

    A run without exports is a `XushiError`.
    """
    if not run_directory.is_dir():
        raise BadInput(
            f"run directory {run_directory} does not exist",
            "give the directory of a run that xushi run made",
        )
    found = {
        name: path
        for name in NAMES
        if ((path := run_directory / "export" / name) / "config.json").is_file()
    }
    if not found:
        raise BadInput(
            f"run {run_directory} has no exported model in {run_directory / 'export'}",
            "finish its pretrain stage with xushi run first",
        )
    return found


def read_card(name: str, directory: Path) -> ModelCard:
    """The `model_card.json` of an export, or the default card for models with this name."""
    path = directory / "model_card.json"
    if not path.exists():
        return DEFAULT_CARDS.get(name, ModelCard(title=name))
    remedy = "remove it, or export the model again"
    return parse(ModelCard, read_json(path, remedy), str(path), remedy)
