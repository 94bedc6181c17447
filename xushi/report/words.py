"""Sentences made from a run's numbers, honest in both directions: they claim what the numbers show
and no more.

Plain text, escaped by whoever puts it into a page. A sentence whose numbers are missing is "".
"""

from collections.abc import Callable

from xushi.report.numbers import count, digits, duration, percent, size
from xushi.report.read import Run

XZ = "xz\u00a0-9"  # kept on one line
# Differences below this share are called equal: the last digit shown would not show them.
_EQUAL = 0.0005


def headline(run: Run) -> str:
    """The page's first sentence: how long, how good on unseen text, what reinforcement learning
    did.
    """
    reasoning = run.number("rl.greedy_after") is not None
    seconds = run.number("seconds.total")
    time = f"In {duration(seconds)}" if seconds is not None else ""
    threads = run.number("machine.threads") or run.number("machine.cores")
    if time and threads:
        time += " on one CPU thread" if threads == 1 else f" on {count(threads)} CPU threads"
    subject = "raw text became a " + ("reasoning model" if reasoning else "language model")
    opening = f"{time}, {subject}" if time else subject[0].upper() + subject[1:]
    clauses = [clause for clause in (_text_clause(run), _reward_clause(run)) if clause]
    return opening + (": " + ", and ".join(clauses) if clauses else "") + "."


def _text_clause(run: Run) -> str:
    model, xz = run.number("evaluate.bits_per_byte"), run.number("evaluate.bits_per_byte_xz")
    if model is None:
        return ""
    if xz is None or xz <= 0:
        return f"it needs {digits(model)} bits per byte on text it never saw"
    difference = model / xz - 1
    if abs(difference) < _EQUAL:
        return f"it is level with {XZ} on text it never saw"
    if difference < 0:
        return f"it beats {XZ} by {percent(-difference)} on text it never saw"
    return f"it does not beat {XZ} on text it never saw, needing {percent(difference)} more bits"


def _reward_clause(run: Run) -> str:
    before, after = run.number("rl.greedy_before"), run.number("rl.greedy_after")
    if before is None or after is None:
        return ""
    change = f"from {percent(before)} to {percent(after)}"
    match reward_verdict(run):
        case "better":
            return f"reinforcement learning took it {change} right on unseen tasks"
        case "worse":
            return f"reinforcement learning did harm, taking it {change} right on unseen tasks"
    return (
        f"reinforcement learning changed nothing that can be told from chance ({change} right "
        "on unseen tasks)"
    )


def reward_verdict(run: Run) -> str:
    """ "better", "worse" or "unclear": whether greedy accuracy moved by more than both 95 %
    intervals.
    """
    before, after = run.number("rl.greedy_before"), run.number("rl.greedy_after")
    if before is None or after is None or before == after:
        return "unclear"
    higher, lower = ("after", "before") if after > before else ("before", "after")
    low, high = run.number(f"rl.greedy_{higher}_low"), run.number(f"rl.greedy_{lower}_high")
    if low is not None and high is not None and low <= high:
        return "unclear"
    return "better" if after > before else "worse"


def yardstick(run: Run) -> str:
    """How the model stands against xz -9 that was given the training text first."""
    model, primed = (
        run.number("evaluate.bits_per_byte"),
        run.number("evaluate.bits_per_byte_xz_primed"),
    )
    if model is None or primed is None or primed <= 0:
        return ""
    difference = model / primed - 1
    fact = (
        f"The honest yardstick is {XZ} that was given the training text first: "
        f"{digits(primed)} bits per byte."
    )
    if abs(difference) < _EQUAL:
        return f"{fact} The model is level with it."
    if difference < 0:
        return f"{fact} The model needs {percent(-difference)} fewer."
    return f"{fact} The model does not reach it; it needs {percent(difference)} more."


def elicitation(run: Run) -> str:
    """What reinforcement learning shows here and what it does not, from the controls that were
    measured.
    """
    after, forced = run.number("rl.greedy_after"), run.number("rl.forced_before")
    if after is None or forced is None:
        return ""
    fact = (
        "Made to think, the model before any reinforcement learning was already right "
        f"{percent(forced)} of the time"
    )
    if reward_verdict(run) != "better":
        return f"{fact}."
    before = run.number("rl.greedy_before") or 0.0
    # The larger part of the gain was there to be had by the choice of mode alone.
    if forced - before >= 0.5 * (after - before):
        return (
            f"{fact}. What the reward changed is mostly whether it thinks: it elicited a habit "
            "that the model "
            "already had and taught it little that is new."
        )
    return (
        f"{fact}, so more than the choice to think has changed: most of the gain came with the "
        "reward."
    )


def equal_time(run: Run) -> str:
    """The control: supervised fine-tuning continued for as long as reinforcement learning took."""
    control, after = run.number("rl.sft_equal_time"), run.number("rl.greedy_after")
    if control is None or after is None:
        return ""
    if control >= after:
        return (
            f"Fine-tuning for as long as reinforcement learning took reaches {percent(control)}: "
            "on this task the reward earned nothing over more imitation."
        )
    return (
        f"The same time spent on more supervised fine-tuning ends at {percent(control)}, "
        f"against {percent(after)} with the reward."
    )


def longer(run: Run) -> str:
    """Instances longer than any demonstration."""
    before, after = run.number("rl.longer_greedy_before"), run.number("rl.longer_greedy_after")
    if before is None or after is None:
        return ""
    return (
        f"On instances longer than any demonstration, greedy accuracy went from {percent(before)} "
        f"to {percent(after)}."
    )


def stage_sentence(run: Run, stage: str) -> str:
    """What a stage did, in one line of its own numbers."""
    pieces = {
        "data": _data,
        "tokenizer": _tokenizer,
        "pretrain": _pretrain,
        "sft": _sft,
        "rl": _rl,
        "evaluate": _evaluate,
        "export": _export,
    }[stage](run)
    return ", ".join(piece for piece in pieces if piece)


def _piece(run: Run, key: str, pattern: str, write: Callable[[float], str] = count) -> str:
    value = run.number(key)
    return "" if value is None else pattern.format(write(value))


def _data(run: Run) -> list[str]:
    return [
        _piece(run, "data.bytes", "{} of text", size),
        _piece(run, "data.documents", "{} documents"),
        _piece(run, "data.heldout_fraction", "{} held out", percent),
        _piece(run, "data.heldout_groups", "{} whole groups set aside"),
    ]


def _tokenizer(run: Run) -> list[str]:
    return [
        _piece(run, "tokenizer.vocab_size", "{} tokens in the vocabulary"),
        _piece(run, "tokenizer.bytes_per_token", "{} bytes of text in one token", digits),
    ]


def _pretrain(run: Run) -> list[str]:
    return [
        _piece(run, "pretrain.tokens", "{} tokens"),
        _piece(run, "pretrain.steps", "{} steps"),
        _piece(run, "pretrain.tokens_per_second", "{} tokens a second"),
        _piece(run, "pretrain.loss", "last loss {} nats a token", digits),
    ]


def _sft(run: Run) -> list[str]:
    return [
        _piece(run, "sft.steps", "{} steps on demonstrations"),
        _piece(run, "sft.loss", "last loss {}", digits),
    ]


def _rl(run: Run) -> list[str]:
    return [_piece(run, "rl.steps", "{} steps of answers and rewards")]


def _evaluate(run: Run) -> list[str]:
    return [
        _piece(run, "evaluate.bits_per_byte", "{} bits per byte on held-out text", digits),
        _piece(run, "rl.tasks", "{} tasks never trained on"),
    ]


def _export(run: Run) -> list[str]:
    return [
        _piece(run, "export.max_logit_difference", "logits read back differ by at most {}", digits)
    ]
