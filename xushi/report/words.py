"""Sentences made from a run's numbers. They claim what the numbers show and no more.

Plain text; whoever puts it into a page escapes it. A sentence whose numbers are missing is "".
"""

from xushi.data.overlap import NOTABLE, WINDOW
from xushi.report.numbers import count, digits, duration, percent
from xushi.report.read import Run

XZ = "xz\u00a0-9"  # kept on one line
# Bits per byte. A run has one seed: a smaller difference is treated as noise.
LEVEL = 0.01


def headline(run: Run) -> str:
    """The page's first sentence: how long it took, and how good the model is on unseen text and
    tasks.
    """
    kind = "language" if run.number("rl.greedy_after") is None else "reasoning"
    subject = f"raw text became a {kind} model"
    time = _time(run)
    opening = f"{time}, {subject}" if time else subject[0].upper() + subject[1:]
    clauses = [clause for clause in (_text_clause(run), _task_clause(run)) if clause]
    return opening + (": it " + " and ".join(clauses) if clauses else "") + "."


def _time(run: Run) -> str:
    seconds = run.written("seconds.total", duration)
    threads = run.number("machine.threads")
    device = run.text("machine.device")
    if not seconds:
        return ""
    if device not in ("", "cpu"):
        return f"In {seconds} on {device}"
    if threads is None:
        return f"In {seconds}"
    return f"In {seconds} on " + (
        "one CPU thread" if threads == 1 else f"{count(threads)} CPU threads"
    )


def _text_clause(run: Run) -> str:
    model = run.number("evaluate.bits_per_byte")
    xz = run.number("evaluate.bits_per_byte_xz")
    if model is None:
        return ""
    if xz is None or xz <= 0:
        return f"needs {digits(model)} bits per byte on {_heldout(run)}"
    if abs(model - xz) < LEVEL:
        against = f"{digits(model)} against {digits(xz)} bits per byte"
        return f"is level with {XZ} ({against}) on {_heldout(run)}"
    if model < xz:
        return f"beats {XZ} by {percent(1 - model / xz)} on {_heldout(run)}"
    return f"needs {percent(model / xz - 1)} more bits than {XZ} on {_heldout(run)}"


def _heldout(run: Run) -> str:
    """What the held-out text is to the model, as far as that was measured."""
    shared = run.number("data.heldout_overlap")
    if shared is None:
        return "held-out text"
    if shared < NOTABLE:
        return "text it never saw"
    return f"held-out text ({percent(shared)} of it stands in the training text too)"


def overlap(run: Run) -> str:
    """How much of the held-out text stands in the training text."""
    shared = run.number("data.heldout_overlap")
    if shared is None:
        return ""
    return (
        f"{percent(shared)} of the held-out text stands in the training text too, in stretches of "
        f"at least {WINDOW} characters, whatever their white space."
    )


def _task_clause(run: Run) -> str:
    before = run.number("rl.greedy_before")
    after = run.number("rl.greedy_after")
    right = before if after is None else after
    return "" if right is None else f"answers {percent(right)} of unseen tasks right"


def verdict(run: Run, rate: str) -> str:
    """Whether `rl.<rate>` moved by more than chance: "better" or "worse" if the 95 % intervals
    before and after lie apart, else "unclear".
    """
    before = run.number(f"rl.{rate}_before")
    after = run.number(f"rl.{rate}_after")
    if before is None or after is None or before == after:
        return "unclear"
    higher, lower = ("after", "before") if after > before else ("before", "after")
    low = run.number(f"rl.{rate}_{higher}_low")
    high = run.number(f"rl.{rate}_{lower}_high")
    if low is None or high is None or low <= high:
        return "unclear"
    return "better" if after > before else "worse"


def yardstick(run: Run) -> str:
    """How the model compares with xz -9 that was given the training text first."""
    model = run.number("evaluate.bits_per_byte")
    primed = run.number("evaluate.bits_per_byte_xz_primed")
    if model is None or primed is None or primed <= 0:
        return ""
    fact = (
        f"The fair baseline is {XZ} that was given the training text first: "
        f"{digits(primed)} bits per byte."
    )
    if abs(model - primed) < LEVEL:
        return f"{fact} The model is level with it."
    if model < primed:
        return f"{fact} The model needs {percent(1 - model / primed)} fewer."
    return f"{fact} The model does not reach it; it needs {percent(model / primed - 1)} more."


def reinforcement(run: Run) -> str:
    """One sentence: what reinforcement learning changed, and what the model could do before it."""
    before = run.number("rl.greedy_before")
    after = run.number("rl.greedy_after")
    forced = run.number("rl.forced_before")
    if before is None or after is None:
        return ""
    change = _change(verdict(run, "greedy"), before, after)
    if forced is None:
        return f"{change}."
    could = f"right on {percent(forced)} of them"
    if verdict(run, "greedy") != "better":
        return f"{change}; made to think, the model before it was {could}."
    # Making the earlier model think would have brought at least half of the gain.
    if forced - before >= 0.5 * (after - before):
        return (
            f"{change}; made to think, the model before it was already {could}, so it learnt "
            "mostly to think first, and little that is new."
        )
    return f"{change}; made to think, the model before it was {could}, so most of the gain is new."


def _change(verdict: str, before: float, after: float) -> str:
    if verdict == "unclear":
        return (
            "Reinforcement learning changed nothing that can be told from chance "
            f"({percent(before)} of unseen tasks right before, {percent(after)} after)"
        )
    done = "took the model" if verdict == "better" else "did harm: it took the model"
    return (
        f"Reinforcement learning {done} from {percent(before)} to {percent(after)} of unseen tasks "
        "right"
    )


def equal_flops(run: Run) -> str:
    """The control: fine-tuning continued for as many FLOPs as reinforcement learning took."""
    control = run.number("rl.sft_equal_flops")
    after = run.number("rl.greedy_after")
    if control is None or after is None:
        return ""
    if control >= after:
        return (
            "Fine-tuning for as many FLOPs as reinforcement learning took reaches "
            f"{percent(control)}: on this task the reward gained nothing over more imitation."
        )
    return (
        f"As many FLOPs spent on more fine-tuning end at {percent(control)}, against "
        f"{percent(after)} with the reward."
    )


def longer(run: Run) -> str:
    """How it does on tasks longer than those it was trained on."""
    before = run.number("rl.longer_greedy_before")
    after = run.number("rl.longer_greedy_after")
    if before is None or after is None:
        return ""
    chance = (
        ", a difference that may be chance" if verdict(run, "longer_greedy") == "unclear" else ""
    )
    return (
        f"On tasks longer than those it was trained on, it went from {percent(before)} to "
        f"{percent(after)}{chance}."
    )


def answers(run: Run) -> str:
    """How long the sampled answers are, and how many of them think."""
    when = ("before", "after") if run.number("rl.length_after") is not None else ("before",)
    lengths = [run.written(f"rl.length_{name}", digits) for name in when]
    thinking = [run.written(f"rl.thinking_{name}", percent) for name in when]
    after = " and {} after" if len(when) > 1 else ""
    before = " before" if len(when) > 1 else ""
    sentences = []
    if all(lengths):
        pattern = f"A sampled answer has {{}} tokens on average{before}{after}."
        sentences.append(pattern.format(*lengths))
    if all(thinking):
        pattern = f"The model thinks in {{}} of its answers{before}{after}."
        sentences.append(pattern.format(*thinking))
    return " ".join(sentences)


def control_run(run: Run) -> str:
    """What this run leaves out, if it is a control."""
    without = run.text("run.without")
    return f"This is a control: it leaves out the stage {without}." if without else ""
