"""The models of a directory, a run's exports or a model by itself, and their cards.

Not here: loading them (engine.LLM).
"""

from pathlib import Path

from xushi.base.config import StrictConfig, parse
from xushi.base.errors import BadInput
from xushi.base.files import read_json
from xushi.base.model_directory import (
    has_chat_template,
    is_model_directory,
    model_name,
    read_templates,
    snapshot_remedy,
)
from xushi.model.weights import settle_directory

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


def find_models(directory: Path) -> dict[str, Path]:
    """The model directories that `directory` stands for, by name: itself if it holds a model, else
    the exports of a run, reasoning first.

    A directory with neither is a `XushiError`. What a killed save left is finished first.
    """
    if not directory.is_dir():
        raise BadInput(
            f"directory {directory} does not exist",
            "give a run that xushi run made, or a model in Hugging Face's layout",
        )
    settle_directory(directory)
    if is_model_directory(directory):
        return {model_name(directory): directory}
    found = {
        name: path for name in NAMES if is_model_directory(path := directory / "export" / name)
    }
    if not found:
        raise BadInput(
            f"{directory} holds no model: it has no config.json, and no exported model in "
            f"{directory / 'export'}",
            snapshot_remedy(directory)
            or "give a model's directory, or finish the run's pretrain stage with xushi run",
        )
    return found


def can_chat(directory: Path, template: Path | None = None) -> bool:
    """Whether the model of a directory answers conversations: there is a chat template for it."""
    return template is not None or has_chat_template(read_templates(directory))


def read_card(name: str, directory: Path) -> ModelCard:
    """The `model_card.json` of an export, or the default card for models with this name."""
    path = directory / "model_card.json"
    if not path.exists():
        return DEFAULT_CARDS.get(name, ModelCard(title=name))
    remedy = "remove it, or export the model again"
    return parse(ModelCard, read_json(path, remedy), str(path), remedy)
