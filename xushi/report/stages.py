"""The stages that the page knows: their titles, and the facts that say in one line what each did.

A run may have other stages (`story`): they are shown with their name and time, and their numbers
stand in "Every number".
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from xushi.report.numbers import count, digits, duration, percent, size
from xushi.report.read import Run

Unit = Literal["count", "size", "percent", "digits", "duration", "text"]
_WRITERS: dict[str, Callable[[float], str]] = {
    "count": count,
    "size": size,
    "percent": percent,
    "digits": digits,
    "duration": duration,
}


@dataclass(frozen=True)
class Fact:
    """A value of results.json in words: `key` is its dotted key, `pattern` has one {} for the
    value.
    """

    key: str
    pattern: str
    unit: Unit


@dataclass(frozen=True)
class Stage:
    """A stage: `name` as in the key `seconds.<name>`, `section` the id of the section about it."""

    name: str
    title: str
    section: str
    facts: tuple[Fact, ...]


STAGES = (
    Stage(
        "data",
        "Data",
        "data",
        (
            Fact("data.bytes", "{} of text", "size"),
            Fact("data.documents", "{} documents", "count"),
            Fact("data.heldout_fraction", "{} held out", "percent"),
        ),
    ),
    Stage(
        "tokenizer",
        "Tokenizer",
        "data",
        (
            Fact("tokenizer.vocab_size", "{} tokens in the vocabulary", "count"),
            Fact("tokenizer.bytes_per_token", "{} bytes of text in a token", "digits"),
        ),
    ),
    Stage(
        "pretrain",
        "Pretraining",
        "pretrain",
        (
            Fact("pretrain.tokens", "{} tokens", "count"),
            Fact("pretrain.steps", "{} steps", "count"),
            Fact("pretrain.tokens_per_second", "{} tokens a second", "count"),
            Fact("pretrain.loss", "last loss {} nats a token", "digits"),
        ),
    ),
    Stage(
        "sft",
        "Fine-tuning",
        "sft",
        (
            Fact("sft.examples", "{} demonstrations", "count"),
            Fact("sft.steps", "{} steps", "count"),
            Fact("sft.loss", "last loss {} nats a token", "digits"),
        ),
    ),
    Stage(
        "rl",
        "Reinforcement learning",
        "rl",
        (
            Fact("rl.answers", "{} answers scored", "count"),
            Fact("rl.steps", "{} steps", "count"),
            Fact("rl.reward", "last mean reward {}", "digits"),
        ),
    ),
    Stage(
        "control",
        "Control",
        "rl",
        (
            Fact(
                "control.steps",
                "{} more steps of fine-tuning, for as long as reinforcement learning took",
                "count",
            ),
        ),
    ),
    Stage(
        "evaluate",
        "Evaluation",
        "bits",
        (
            Fact("evaluate.bits_per_byte", "{} bits per byte on held-out text", "digits"),
            Fact("rl.tasks", "{} tasks never trained on", "count"),
        ),
    ),
    Stage(
        "export",
        "Export",
        "numbers",
        (Fact("export.max_logit_difference", "logits read back differ by at most {}", "digits"),),
    ),
)
_KNOWN = {stage.name: stage for stage in STAGES}
_NO_STAGE = {"total", "this_start"}  # of the keys seconds.<name>


def story(run: Run) -> list[str]:
    """The names of the run's stages, known or not, in the order in which they were started."""
    timed = {key.removeprefix("seconds.") for key in run.results if key.startswith("seconds.")}
    known = [name for name in _KNOWN if name in timed or sentence(run, name)]
    names = known + sorted(timed - _NO_STAGE - set(known))
    started = run.started_stages()
    return sorted(names, key=lambda name: started.index(name) if name in started else len(started))


def title(name: str) -> str:
    """A stage's title; for a stage that the page does not know its name."""
    return _KNOWN[name].title if name in _KNOWN else name


def section_of(name: str) -> str:
    """The id of the section that tells more of a stage."""
    return _KNOWN[name].section if name in _KNOWN else "numbers"


def sentence(run: Run, name: str) -> str:
    """What a stage did, in one line of its own numbers; "" if none of them is there."""
    facts = _KNOWN[name].facts if name in _KNOWN else ()
    text = ", ".join(part for part in (_part(run, fact) for fact in facts) if part)
    return text[:1].upper() + text[1:]


def _part(run: Run, fact: Fact) -> str:
    if fact.unit == "text":
        return fact.pattern.format(run.text(fact.key)) if run.text(fact.key) else ""
    value = run.written(fact.key, _WRITERS[fact.unit])
    return fact.pattern.format(value) if value else ""
