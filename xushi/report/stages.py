"""What the page says of each stage, from the title and the facts that the stage declares.

A run may have stages from somebody's own file, which `xushi.run.stages` does not list: they are
shown with their name and time, and their numbers are in "Every number".
"""

from collections.abc import Callable

from xushi.report.numbers import count, digits, percent, size
from xushi.report.read import Run
from xushi.run.stages import STAGES, Fact

_WRITERS: dict[str, Callable[[float], str]] = {
    "count": count,
    "size": size,
    "percent": percent,
    "digits": digits,
}


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
    """What a stage did, in one line of its own numbers; "" if it recorded none of them."""
    facts = _KNOWN[name].facts if name in _KNOWN else ()
    text = ", ".join(part for part in (_part(run, fact) for fact in facts) if part)
    return text[:1].upper() + text[1:]


def _part(run: Run, fact: Fact) -> str:
    value = run.written(fact.key, _WRITERS[fact.unit])
    return fact.pattern.format(value) if value else ""
