"""Evaluation: bits per byte of the base model beside compressors, and answers before and after
RL.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from xushi.base.files import write_json
from xushi.base.progress import StepProgress, say
from xushi.data import HeldoutText, heldout_bytes, training_texts
from xushi.engine import SamplingParams, generate_ids
from xushi.envs import Environment
from xushi.evaluate import (
    DocumentBits,
    Episode,
    Rate,
    Sampled,
    accuracy,
    bits_by_document,
    by_all_methods,
    play_greedily,
    play_sampled,
    shown,
    summarise,
    xz_primed,
)
from xushi.model import Deepseek
from xushi.run.place import RunPlace
from xushi.run.stages.base import Costs, Fact, Results
from xushi.run.stages.control import Control
from xushi.run.stages.lengths import fewest_tokens
from xushi.run.stages.pretrain import Pretrain
from xushi.run.stages.rl import RL
from xushi.run.stages.training import ModelStage, last_main_stage

if TYPE_CHECKING:
    from xushi.run.recipe import Recipe

SAMPLES_SHOWN = 10
ROWS_AT_ONCE = 32
HELDOUT_BITS = "heldout_bits.parquet"  # bits of each held-out document, to compare runs in pairs
CODE_OPENINGS = (
    "import os\nimport ",
    "def __init__(self, ",
    "class ",
    "    for index in range(",
    "try:\n    ",
)


class BitsFigures(Results):
    """Bits per byte of the held-out text, by the model and by compressors."""

    bits_per_byte: float
    bits_per_byte_gzip: float
    bits_per_byte_xz: float
    bits_per_byte_zstd: float
    bits_per_byte_xz_primed: float | None = None
    xz_primed_training_bytes: int | None = None
    ratio_to_xz: float


class AnswerFigures(Results):
    """Answers to the environment's tasks: `rates` and `means` by name, such as "greedy_before"."""

    tasks: int
    tasks_are: str
    longer_tasks_are: str | None
    rates: dict[str, Rate] = Field(default_factory=dict)
    means: dict[str, float] = Field(default_factory=dict)

    def add_sampled(self, sampled: Sampled, k: int, when: str) -> None:
        """Add what k samples of each task gave."""
        self.rates[f"avg{k}_{when}"] = sampled.average
        self.rates[f"pass{k}_{when}"] = sampled.any_right
        self.means[f"length_{when}"] = sampled.tokens
        self.means[f"thinking_{when}"] = sampled.thinking
        self.means[f"verifier_errors_{when}"] = sampled.verifier_errors

    def flat(self) -> dict[str, Any]:
        """A rate has three keys: its own name, and that name with _low and _high."""
        keys: dict[str, Any] = {"tasks": self.tasks, "tasks_are": self.tasks_are}
        if self.longer_tasks_are is not None:
            keys["longer_tasks_are"] = self.longer_tasks_are
        for name, rate in self.rates.items():
            keys |= {name: rate.value, f"{name}_low": rate.low, f"{name}_high": rate.high}
        return keys | self.means


class EvaluateResults(Results):
    """What evaluation returns."""

    evaluate: BitsFigures
    rl: AnswerFigures | None


class Evaluate(ModelStage):
    """Reads all checkpoints; writes samples.json and heldout_bits.parquet."""

    name = "evaluate"
    title = "Evaluation"
    section = "bits"
    in_recipe = False
    facts = (
        Fact("evaluate.bits_per_byte", "{} bits per byte on held-out text", "digits"),
        Fact("rl.tasks", "{} tasks never trained on"),
    )

    def __init__(self, recipe: "Recipe") -> None:
        super().__init__(recipe)
        self.config = recipe.evaluate
        self.environment = recipe.environment
        self.base = Pretrain.name if Pretrain.wanted(recipe) else None
        self.final = last_main_stage(recipe)
        self.reinforced = RL.wanted(recipe)
        self.before = last_main_stage(recipe, before=RL) if self.reinforced else self.final
        self.control = Control.name if Control.wanted(recipe) else None
        self.is_code = any(source.kind == "packages" for source in recipe.data.sources)

    @classmethod
    def wanted(cls, recipe: "Recipe") -> bool:
        """Always."""
        return True

    def seconds(self, costs: Costs) -> float:
        """The held-out text by the model and by compressors, and answers as long as the longest.

        A sampled token costs about as much as one of a training step.
        """
        text = costs.heldout_tokens * costs.forward_token + costs.compressors
        if self.environment is None or self.final in (None, self.base):
            return text
        tokens = fewest_tokens(self.environment.make().longest_transcript())
        return text + self._episodes() * tokens * costs.training_token

    def run(self, place: RunPlace) -> EvaluateResults:
        """Measure the base model on text, and the tuned ones on tasks."""
        samples: dict[str, Any] = {}
        bits = self._bits(place)
        answers = None
        if self.environment is not None and self.final not in (None, self.base):
            played = itertools.count(1)
            with StepProgress(self.name, self._episodes()) as progress:
                answers = self._answers(
                    place, samples, lambda: progress.update(next(played), "answers")
                )
        samples["base"] = self._completions(place)
        write_json(place.path("samples.json"), samples)
        return EvaluateResults(evaluate=bits, rl=answers)

    def documents(self, place: RunPlace) -> DocumentBits:
        """What the base model needs for each held-out document."""
        model = self.trained_model(place, self.base)
        sequences = HeldoutText.open(place.tokens).packed.sequences
        with StepProgress(self.name, sequences) as progress:
            return bits_by_document(
                model,
                place.tokens,
                ROWS_AT_ONCE,
                lambda done: progress.update(done, "sequences of held-out text"),
            )

    def _bits(self, place: RunPlace) -> BitsFigures:
        text = heldout_bytes(place.corpus)
        documents = self.documents(place)
        documents.write(place.path(HELDOUT_BITS))
        own = documents.total / len(text)
        say(f"{self.name}: the same bytes, by compressors")
        others = by_all_methods(text)
        primed = None
        if self.config.xz_primed:
            training = "".join(training_texts(place.corpus)).encode()
            say(f"{self.name}: by xz given {len(training):,} bytes of training text first")
            primed = xz_primed(training, text)
        return BitsFigures(
            bits_per_byte=own,
            bits_per_byte_gzip=others["gzip"],
            bits_per_byte_xz=others["xz"],
            bits_per_byte_zstd=others["zstd"],
            bits_per_byte_xz_primed=primed.bits_per_byte if primed else None,
            xz_primed_training_bytes=primed.training_bytes_used if primed else None,
            ratio_to_xz=own / others["xz"],
        )

    def _episodes(self) -> int:
        """How many episodes `_answers` plays."""
        each = 1 + self.config.samples + (self.config.longer is not None)
        greedy = 1 + (self.control is not None)  # made to think, and the control
        return self.config.tasks * ((1 + self.reinforced) * each + greedy)

    def _answers(
        self, place: RunPlace, samples: dict[str, Any], ended: Callable[[], None]
    ) -> AnswerFigures:
        """Every measurement on the environment; the episodes to show go into `samples`. `ended` is
        called at the end of each episode.
        """
        assert self.environment is not None
        scored = self.environment.make(self.config.environment)
        changes = self.config.longer
        longer = None if changes is None else self.environment.make(changes)
        figures = AnswerFigures(
            tasks=self.config.tasks,
            tasks_are=scored.card().tasks,
            longer_tasks_are=longer.card().tasks if longer else None,
        )
        rates, tokenizer = figures.rates, place.tokenizer()

        def greedy(model: Deepseek, environment: Environment, think: bool = False) -> list[Episode]:
            return play_greedily(
                model, tokenizer, environment, self.config, self.seed, think=think, ended=ended
            )

        def measure(model: Deepseek, when: str) -> None:
            episodes = greedy(model, scored)
            rates[f"greedy_{when}"] = accuracy(episodes)
            samples[when] = [shown(episode) for episode in episodes[:SAMPLES_SHOWN]]
            sampled = play_sampled(model, tokenizer, scored, self.config, self.seed, ended)
            figures.add_sampled(summarise(sampled), self.config.samples, when)
            if longer is not None:
                rates[f"longer_greedy_{when}"] = accuracy(greedy(model, longer))

        before = self.trained_model(place, self.before)
        measure(before, "before")
        rates["forced_before"] = accuracy(greedy(before, scored, think=True))
        if self.reinforced:
            measure(self.trained_model(place, RL.name), "after")
        if self.control is not None:
            control = self.trained_model(place, self.control)
            rates["sft_equal_flops"] = accuracy(greedy(control, scored))
        return figures

    def _completions(self, place: RunPlace) -> list[dict[str, str]]:
        """What the base model writes after a few openings: code's, or the held-out text's own."""
        tokenizer = place.tokenizer()
        model = self.trained_model(place, self.base)
        openings = CODE_OPENINGS if self.is_code else _openings(heldout_bytes(place.corpus))
        room = self.model.max_position_embeddings // 2
        prompts = [[tokenizer.bos_id, *tokenizer.encode(opening)][:room] for opening in openings]
        params = [
            SamplingParams(max_tokens=80, temperature=0.7, seed=number)
            for number in range(len(prompts))
        ]
        requests = generate_ids(model, prompts, params, eos_id=tokenizer.eos_id)
        return [
            {
                "prompt": opening,
                "completion": tokenizer.decode(request.token_ids, skip_special=True),
            }
            for opening, request in zip(openings, requests, strict=True)
        ]


def _openings(text: bytes) -> Sequence[str]:
    """Five places of the held-out text."""
    decoded = text.decode()
    return [decoded[at : at + 40] for at in range(0, len(decoded), len(decoded) // 5 + 1)]
