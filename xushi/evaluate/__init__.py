"""What a model is worth: bits per byte beside compressors, and answers to tasks with intervals."""

from xushi.evaluate.bits import DocumentBits, bits_by_document, total_bits
from xushi.evaluate.compressors import bits_per_byte, by_all_methods, xz_primed
from xushi.evaluate.config import EvaluateConfig
from xushi.evaluate.episodes import Branch, Episode, examples_of, play
from xushi.evaluate.measure import (
    Rate,
    Sampled,
    accuracy,
    evaluation_tasks,
    play_greedily,
    play_sampled,
    shown,
    summarise,
)
from xushi.evaluate.statistics import mean_interval, pass_at_k, pass_at_k_interval, wilson
from xushi.evaluate.texts import bits_of_texts, evaluate_texts

__all__ = [
    "Branch",
    "DocumentBits",
    "Episode",
    "EvaluateConfig",
    "Rate",
    "Sampled",
    "accuracy",
    "bits_by_document",
    "bits_of_texts",
    "bits_per_byte",
    "by_all_methods",
    "evaluate_texts",
    "evaluation_tasks",
    "examples_of",
    "mean_interval",
    "pass_at_k",
    "pass_at_k_interval",
    "play",
    "play_greedily",
    "play_sampled",
    "shown",
    "summarise",
    "total_bits",
    "wilson",
    "xz_primed",
]
