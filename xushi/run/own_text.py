"""A recipe for somebody's own text: `xushi train`.

The program chooses the vocabulary and the steps by what the text allows. A run that has begun keeps
what was chosen, so that the same command goes on after the text changed. Not here: the stages, and
what a run does where files that it has read changed (`runner`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from xushi.base.config import override, read_toml
from xushi.base.errors import BadInput
from xushi.base.files import sha256_json
from xushi.base.progress import say
from xushi.base.tracking import Tracking
from xushi.data import first_training_texts, load_summary, reading_corpus, training_texts
from xushi.data.config import text_source
from xushi.run.directory import check_format, kept_recipe
from xushi.run.place import RunPlace
from xushi.run.recipe import Recipe, drop_file_stages, recipe_of
from xushi.run.stages import finished_stages
from xushi.run.stages.data import Data
from xushi.tokenizer import Tokenizer, TooFewMerges
from xushi.tokenizer.config import SMALLEST_VOCABULARY
from xushi.train import PretrainConfig

# How a recipe is fitted to a text that may be a thousandth of the recipe's own.
# With fewer bytes per entry most tokens are too rare to learn; a text allows several times as many.
BYTES_PER_VOCABULARY_ENTRY = 100
BYTES_PER_TOKEN = 2  # about what so small a vocabulary reaches
MOST_EPOCHS = 8  # passes over the text; see docs/run.md
SAMPLE = 2 << 20  # characters of text, to see whether it allows a vocabulary

STAGES = ["data", "tokenizer", "pretrain"]
# What the program chooses, unless --set does.
FITTED = (
    "tokenizer.vocab_size",
    "pretrain.steps",
    "pretrain.evaluate_every",
    "pretrain.warmup_steps",
)


@dataclass(frozen=True)
class OwnText:
    """What `xushi train` was asked for.

    `paths`: files, directories and patterns. `recipe`: where model and training come from.
    """

    paths: list[str]
    recipe: Path
    exclude: list[str]
    assignments: list[str]
    name: str = "text"

    @property
    def hash(self) -> str:
        """SHA-256 of everything that is asked for, but for where the text lies."""
        table = repr(read_toml(self.recipe))
        return sha256_json([table, self.exclude, self.assignments, self.name])

    def recipe_with(self, fitted: dict[str, Any]) -> Recipe:
        """The recipe with these values of `FITTED`, by dotted key."""
        table = self.table()
        for key, value in fitted.items():
            section, _, name = key.partition(".")
            table[section][name] = value
        return recipe_of(table, self.recipe)

    def table(self) -> dict[str, Any]:
        """The recipe's table before anything is fitted."""
        table = read_toml(self.recipe)
        drop_file_stages(table, self.recipe, STAGES)
        for name in ("data", "tokenizer", "pretrain", "evaluate"):
            if not isinstance(table.setdefault(name, {}), dict):
                raise BadInput(
                    f"recipe {self.recipe}: {name} is not a table", f"write it as [{name}]"
                )
        for name in ("environment", "sft", "rl", "without"):
            table.pop(name, None)
        for name in ("environment", "longer"):
            table["evaluate"].pop(name, None)
        table["name"] = self.name
        table["stages"] = list(STAGES)
        source = text_source(self.paths, self.exclude)
        table["data"]["sources"] = [source.model_dump(include={"name", "kind", "glob", "exclude"})]
        for assignment in self.assignments:
            override(table, assignment)
        return table

    def sets(self, key: str) -> bool:
        """Whether --set gives the key, or a whole table that it is in."""
        given = (each.partition("=")[0].strip() for each in self.assignments)
        return any(key == each or key.startswith(f"{each}.") for each in given)


def own_text_recipe(asked: OwnText, directory: Path, update: bool) -> tuple[Recipe, bool]:
    """The recipe for `asked` in a run directory, and whether the run there may be updated to it.

    Where a run of the same command has read its text, that text decides what is chosen, unless the
    run is finished and the text changed since, or `update` is given.
    """
    asked.recipe_with({})  # what is wrong with it is told first
    check_format(directory)
    kept = None if update else kept_recipe(directory, asked.hash)
    if kept is not None:
        again = asked.recipe_with({key: _value(kept, key) for key in FITTED})
        if again.hash == kept.hash:
            if _goes_on(again, directory):
                return again, False
            update = True
    return _fitted_recipe(asked), update


def _value(recipe: Recipe, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(recipe, section), name)


def _goes_on(recipe: Recipe, directory: Path) -> bool:
    """Whether the run has read its text and does not read it again."""
    place = RunPlace(directory, Tracking(None))
    stages = recipe.run_stages()
    done = finished_stages(stages, place)
    if Data.name not in done:
        return False
    if done != {stage.name for stage in stages}:
        return True
    try:
        return not Data(recipe).files_changed(place)
    except BadInput:  # it is not there any more, which the runner tells
        return True


def _fitted_recipe(asked: OwnText) -> Recipe:
    """The recipe fitted to the text as it is now; what was lowered is told.

    The corpus is made here and lies in the cache when the data stage asks for it.
    """
    recipe = asked.recipe_with({})
    with reading_corpus(recipe.data, {}) as corpus:
        size = load_summary(corpus).bytes
        fitted = fit_to_text(asked.table(), size)
        if asked.sets("pretrain.steps"):  # the other keys of pretraining follow from the steps
            fitted = {key: n for key, n in fitted.items() if not key.startswith("pretrain.")}
        fitted = {key: value for key, value in fitted.items() if not asked.sets(key)}
        wanted = fitted.get("tokenizer.vocab_size", recipe.tokenizer.vocab_size)
        if (allowed := allowed_vocabulary(corpus, wanted)) < wanted:
            if asked.sets("tokenizer.vocab_size"):
                raise TooFewMerges(wanted, allowed)
            fitted["tokenizer.vocab_size"] = allowed
    if fitted:
        changes = "; ".join(f"{key} {_value(recipe, key)} -> {fitted[key]}" for key in fitted)
        say(f"text of {size:,} bytes: {changes} (--set overrides)")
    return asked.recipe_with(fitted)


def fit_to_text(table: dict[str, Any], size: int) -> dict[str, int]:
    """Lower values of `FITTED`, by dotted key, for a text of `size` bytes.

    The vocabulary is at most one entry per 100 bytes, the steps are at most about 8 passes. With
    fewer steps the warm-up and the intervals between measurements on held-out text are at most a
    tenth of them, so that there is a curve to look at. Nothing is ever raised.
    """
    pretrain = table["pretrain"]
    vocabulary = table["tokenizer"].get("vocab_size")
    steps, batch = pretrain.get("steps"), pretrain.get("batch_tokens")
    fitted = {}
    fitting = SMALLEST_VOCABULARY + size // BYTES_PER_VOCABULARY_ENTRY
    if isinstance(vocabulary, int) and vocabulary > fitting:
        fitted["tokenizer.vocab_size"] = fitting
    if not (isinstance(steps, int) and isinstance(batch, int) and batch > 0):
        return fitted
    enough = max(1, MOST_EPOCHS * size // (BYTES_PER_TOKEN * batch))
    if steps > enough:
        fitted["pretrain.steps"] = enough
        for key, least in (("evaluate_every", 1), ("warmup_steps", 0)):
            most = max(least, enough // 10)
            value = pretrain.get(key, PretrainConfig.model_fields[key].default)
            if isinstance(value, int) and value > most:
                fitted[f"pretrain.{key}"] = most
    return fitted


def allowed_vocabulary(corpus: Path, wanted: int) -> int:
    """The largest vocabulary up to `wanted` for which the training text has merges.

    A part of the text is tried first: more text allows no fewer.
    """
    allowed = _allowed(first_training_texts(corpus, SAMPLE), wanted)
    if allowed < wanted and _is_longer(corpus, SAMPLE):
        allowed = _allowed(training_texts(corpus), wanted)
    return allowed


def _allowed(texts: Iterator[str], wanted: int) -> int:
    try:
        Tokenizer.train(texts, wanted)
    except TooFewMerges as error:
        return error.reached
    return wanted


def _is_longer(corpus: Path, size: int) -> bool:
    lengths = accumulate(len(text) for text in training_texts(corpus))
    return any(length > size for length in lengths)
