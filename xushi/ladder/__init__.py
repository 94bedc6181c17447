"""The ladder: an idea about anybody's training is proven small, and then paid for."""

from xushi.ladder.idea import Idea, read_idea
from xushi.ladder.judge import Judged, judge, read_logs
from xushi.ladder.ledger import Ledger
from xushi.ladder.trial import Result, try_idea
from xushi.ladder.verdict import Decision, Look, RunVariance, decide, look_at_pairs

__all__ = [
    "Decision",
    "Idea",
    "Judged",
    "Ledger",
    "Look",
    "Result",
    "RunVariance",
    "decide",
    "judge",
    "look_at_pairs",
    "read_idea",
    "read_logs",
    "try_idea",
]
