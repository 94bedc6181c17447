"""Export: every usable model in the Hugging Face layout, read back and compared."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from xushi.base.files import directory_in_place, write_json
from xushi.model import Deepseek, load_pretrained, save_pretrained
from xushi.run.place import RunPlace
from xushi.run.stages.base import Fact, Results
from xushi.run.stages.pretrain import Pretrain
from xushi.run.stages.training import ModelStage, last_main_stage
from xushi.tokenizer import Tokenizer

if TYPE_CHECKING:
    from xushi.run.recipe import Recipe

COMPARED_TOKENS = 64


class ExportFigures(Results):
    """The models' names, and the largest difference of logits between a model and its export."""

    models: str
    max_logit_difference: float


class ExportResults(Results):
    """What export returns."""

    export: ExportFigures


class Export(ModelStage):
    """Reads the checkpoints and the tokenizer; writes export/base and export/reasoning."""

    name = "export"
    title = "Export"
    in_recipe = False
    facts = (
        Fact(
            "export.max_logit_difference",
            "logits read back differ by at most {}",
            "digits",
        ),
    )

    def __init__(self, recipe: "Recipe") -> None:
        super().__init__(recipe)
        self.run_name = recipe.name
        self.environment = recipe.environment
        self.is_code = any(source.kind == "packages" for source in recipe.data.sources)
        base = Pretrain.name if Pretrain.wanted(recipe) else None
        final = last_main_stage(recipe)
        self.models = {"base": base}
        if final not in (None, base):
            self.models["reasoning"] = final

    @classmethod
    def wanted(cls, recipe: "Recipe") -> bool:
        """Always."""
        return True

    def run(self, place: RunPlace) -> ExportResults:
        """Write every model, with tokenizer and card, and read each back."""
        tokenizer = place.tokenizer()
        difference = 0.0
        with directory_in_place(place.path("export")) as aside:
            for name, stage in self.models.items():
                model = self.trained_model(place, stage)
                self._write(model, tokenizer, name, aside / name)
                difference = max(difference, _difference(model, aside / name))
        return ExportResults(
            export=ExportFigures(models=", ".join(self.models), max_logit_difference=difference)
        )

    def _write(self, model: Deepseek, tokenizer: Tokenizer, name: str, directory: Path) -> None:
        save_pretrained(model, directory)
        tokenizer.save(directory, chat=name != "base")  # the base never saw a conversation
        generation = {
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
            "pad_token_id": tokenizer.pad_id,
        }
        write_json(directory / "generation_config.json", generation)
        write_json(directory / "model_card.json", self._card(name))

    def _card(self, name: str) -> dict[str, Any]:
        """What the chat page says of a model: what it can do and what not."""
        title = f"{self.run_name}: {name}"
        if name == "reasoning" and self.environment is not None:
            card = self.environment.make().card()
            shown: dict[str, Any] = {
                "title": title,
                "can": card.can,
                "cannot": card.cannot,
                "example": card.example,
            }
            if card.chinese is not None:
                shown["chinese"] = {
                    "title": f"{self.run_name}：推理",
                    "can": card.chinese.can,
                    "cannot": card.chinese.cannot,
                }
            return shown
        kind = "Python source" if self.is_code else "text like that it was trained on"
        return {
            "title": title,
            "can": f"It continues {kind}.",
            "cannot": "It cannot answer questions or hold a conversation; it was never shown one.",
            "example": "def __init__(self, " if self.is_code else "",
            "chinese": {
                "title": f"{self.run_name}：续写",
                "can": f"它续写{' Python 源代码' if self.is_code else '与训练文本相似的文字'}。",
                "cannot": "它不会回答问题，也不会对话：它从未见过对话。",
            },
        }


def _difference(model: Deepseek, directory: Path) -> float:
    """The largest difference between the logits of a model and of its export, read back."""
    config = model.config
    length = min(COMPARED_TOKENS, config.vocab_size, config.max_position_embeddings)
    tokens = torch.arange(length, device=model.device)
    with torch.no_grad():
        exported = load_pretrained(directory, device=model.device)
        return float((model(tokens[None]).logits - exported(tokens[None]).logits).abs().max())
