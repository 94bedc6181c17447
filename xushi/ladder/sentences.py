"""What is said about a question in plain text; whoever puts it into a page escapes it."""

import math

from xushi.ladder.facts import Facts
from xushi.ladder.idea import BASELINE, VARIANT
from xushi.ladder.verdict import ALPHA
from xushi.report.numbers import duration

NO_BOUNDS = "without bounds"
TITLES = {
    "better": "Better",
    "none": "No effect of interest",
    "worse": "Worse",
    "unsettled": "Unsettled",
}


def verdict(facts: Facts) -> str:
    """The verdict and its reason in one sentence."""
    result = facts.result
    return (
        f"{TITLES[result['verdict']]} after {result['pairs']} pairs of runs: the mean gain in "
        f"{facts.entry.idea.metric} is {number(result['difference'])} "
        f"({interval(result['low'], result['high'])}), so that {result['reason']}."
    )


def more(facts: Facts) -> str:
    """What would settle an open question, and its price; "" where it is settled."""
    pairs = facts.result["more_pairs"]
    if pairs is None:
        return ""
    seen = facts.rungs[-1].pairs
    seconds = pairs * sum(pair.seconds for pair in seen) / len(seen)
    return (
        f"At this mean and this spread about {pairs} more pairs would settle it, which is "
        f"{duration(seconds)} of runs."
    )


def promotion(facts: Facts) -> str:
    """Whether the idea is promoted and why; "" where it is not better."""
    result, confirmed = facts.result, facts.confirmation
    if confirmed is None:
        return ""
    p, level = number(result["p"], 2), number(result["level"], 2)
    fresh = f"on {confirmed.pairs} fresh pairs p is {number(confirmed.p_gain, 2)}"
    if result["promoted"]:
        return f"It is promoted: {fresh}, and together p is {p}, not above its level of {level}."
    if confirmed.p_gain > ALPHA:
        return f"It is not promoted: {fresh}, above {ALPHA}, so that they do not confirm it."
    return (
        f"It is not promoted: {fresh}, but together p is {p}, above {level}, the level that it got "
        f"when it was registered as idea {facts.entry.number} of the ledger."
    )


def documents(facts: Facts) -> str:
    """How far the gain may be another one on other text; "" where it is not known."""
    error = facts.result.get("document_error")
    if error is None:
        return ""
    return (
        "These seeds say how sure the gain is on this held-out text; over its documents the gain "
        f"has a standard error of {number(error)}."
    )


def to_paste(facts: Facts, command: str) -> str:
    """A paragraph for a paper or a pull request."""
    idea, result = facts.entry.idea, facts.result
    better = "higher" if idea.higher_is_better else "lower"
    seeds = ", ".join(str(pair.seed) for pair in facts.rungs[-1].pairs)
    keys = ", ".join(f"{name} {value}" for name, value in facts.rungs[-1].keys.items())
    said = [
        f"{idea.question} {verdict(facts)}",
        f"A gain means that {idea.metric} is {better} with the variant ({idea.shown(VARIANT)}) "
        f"than with the baseline ({idea.shown(BASELINE)}); both arms of a pair had the same seed "
        f"(seeds {seeds}{f'; {keys}' if keys else ''}).",
        f"It was stated beforehand that {number(idea.smallest_effect)} is the smallest effect of "
        f"interest and that there would be at most {idea.pairs} pairs; the interval leaves "
        f"{ALPHA:.0%} on either side over all planned looks.",
        f'p = {number(result["p"], 2)} against "no gain", e-value {number(result["e_value"], 3)}.',
        promotion(facts) or more(facts),
        documents(facts),
        f"The runs took {result['seconds']:.0f} s. To repeat it: {command}",
    ]
    return " ".join(sentence for sentence in said if sentence)


def interval(low: float, high: float) -> str:
    """Both ends, or that there are none, as where runs do not differ at all."""
    return f"{number(low)} to {number(high)}" if math.isfinite(high - low) else NO_BOUNDS


def number(value: float, significant: int = 4) -> str:
    """A number in plain characters, so that it can be pasted anywhere."""
    return f"{value:.{significant}g}"
