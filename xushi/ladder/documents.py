"""The error that no seed removes: the held-out documents are a sample, too.

Seeds say how sure a gain is on this text. How much it would be on other text of this kind is told
by its spread over documents, which both arms of an idea about a recipe print.
"""

import math
from collections.abc import Sequence
from statistics import fmean

Documents = Sequence[tuple[int, float]]  # bytes and bits of each held-out document


def document_error(baseline: Sequence[Documents], variant: Sequence[Documents]) -> float | None:
    """The standard error over documents of the mean gain in bits per byte; None for fewer than two
    documents, or where the arms have different ones.

    `baseline`, `variant`: the documents of each run. The gain is a ratio of sums, bits over bytes
    (Cochran, Sampling Techniques, 1977, section 2.11).
    """
    sizes = [[size for size, _ in run] for run in (*baseline, *variant)]
    if not sizes or len(sizes[0]) < 2 or any(each != sizes[0] for each in sizes):
        return None
    gains = [
        fmean(run[number][1] for run in baseline) - fmean(run[number][1] for run in variant)
        for number in range(len(sizes[0]))
    ]
    total, count = sum(sizes[0]), len(gains)
    ratio = sum(gains) / total
    rest = sum((gain - ratio * size) ** 2 for gain, size in zip(gains, sizes[0], strict=True))
    return math.sqrt(count / (count - 1) * rest) / total
