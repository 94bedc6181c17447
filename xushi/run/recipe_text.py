"""`--text`: a recipe for somebody's own text, fitted to its size."""

from typing import Any

from xushi.base.config import parse
from xushi.base.errors import BadInput
from xushi.base.plugins import is_file_spec
from xushi.base.progress import say
from xushi.data.config import SourceConfig
from xushi.data.sources import read_source
from xushi.run.stages import STAGES
from xushi.tokenizer.config import SMALLEST_VOCABULARY
from xushi.train import PretrainConfig

# How --text fits a recipe to a text that may be a thousandth of the recipe's own.
# With fewer bytes per entry most tokens are too rare to learn; a text allows several times as many.
BYTES_PER_VOCABULARY_ENTRY = 100
BYTES_PER_TOKEN = 2  # about what so small a vocabulary reaches
MOST_EPOCHS = 8  # passes over the text; see docs/run.md


def use_text(table: dict[str, Any], text: str, stages: list[str] | None) -> None:
    if not text.strip():
        raise BadInput(
            "--text is empty", "give a file, a directory or a pattern such as '~/notes/**/*.md'"
        )
    for name in ("data", "tokenizer", "pretrain"):
        if not isinstance(table.setdefault(name, {}), dict):
            raise BadInput(f"{name} is not a table", f"write it as [{name}]")
    source = {"name": "text", "kind": "text", "glob": text}
    table["data"]["sources"] = [source]
    table["name"] = "text"
    # A stage from a file may need the environment, too.
    alone = stages is not None and not any(
        stage.needs_environment for stage in STAGES if stage.name in stages
    )
    alone = alone and not any(map(is_file_spec, stages or []))
    if alone:
        table.pop("environment", None)
    config = parse(SourceConfig, source, "--text", "give the path of a file or directory")
    documents = read_source(config).documents
    fit_to_text(
        table["tokenizer"],
        table["pretrain"],
        sum(len(document.text.encode()) for document in documents),
        alone,
    )


def fit_to_text(
    tokenizer: dict[str, Any], pretrain: dict[str, Any], size: int, alone: bool
) -> None:
    """Lower the vocabulary and, where the text is all that is trained on, the steps to what `size`
    bytes can use.

    Neither is ever raised, and `--set` has the last word. With fewer steps the warm-up and the
    intervals between measurements on held-out text are at most a tenth of them, so that there is a
    curve to look at.
    """
    vocabulary, steps, batch = (
        tokenizer.get("vocab_size"),
        pretrain.get("steps"),
        pretrain.get("batch_tokens"),
    )
    said = []
    fitting = SMALLEST_VOCABULARY + size // BYTES_PER_VOCABULARY_ENTRY
    if isinstance(vocabulary, int) and vocabulary > fitting:
        tokenizer["vocab_size"] = fitting
        said.append(f"tokenizer.vocab_size {vocabulary} -> {fitting}")
    if alone and isinstance(steps, int) and isinstance(batch, int) and batch > 0:
        enough = max(1, MOST_EPOCHS * size // (BYTES_PER_TOKEN * batch))
        if steps > enough:
            pretrain["steps"] = enough
            said.append(f"pretrain.steps {steps} -> {enough}, about {MOST_EPOCHS} passes over it")
            for key, least in (("evaluate_every", 1), ("warmup_steps", 0)):
                most = max(least, enough // 10)
                value = pretrain.get(key, PretrainConfig.model_fields[key].default)
                if isinstance(value, int) and value > most:
                    pretrain[key] = most
                    said.append(f"pretrain.{key} {value} -> {most}")
    if said:
        say(f"text of {size:,} bytes: {'; '.join(said)} (--set overrides)")
