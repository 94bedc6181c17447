"""Floor 4: what a model is worth: bits per byte beside compressors, and answers to tasks with
intervals.
"""

from xushi.evaluate.answers import Answer, answer_tasks, score_answer
from xushi.evaluate.bits import total_bits
from xushi.evaluate.compressors import bits_per_byte, xz_primed
from xushi.evaluate.statistics import mean_interval, pass_at_k, pass_at_k_interval, wilson

__all__ = [
    "Answer",
    "answer_tasks",
    "bits_per_byte",
    "mean_interval",
    "pass_at_k",
    "pass_at_k_interval",
    "score_answer",
    "total_bits",
    "wilson",
    "xz_primed",
]
