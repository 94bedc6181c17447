"""What changes from step to step: learning rate, batch size, and the settings that training ends
with.
"""

import math


def warmup_stable_decay(
    step: int, steps: int, warmup: int, decay_fraction: float, final: float = 0.0
) -> float:
    """The factor on the peak learning rate at `step` (0-based) of `steps`: linear up, constant,
    linear down to `final`.

    MiniCPM's (Hu et al. 2024, arXiv:2404.06395).
    """
    decay = round(steps * decay_fraction)
    up = min(1.0, (step + 1) / (warmup + 1))
    down = final + (1 - final) * min(1.0, (steps - step) / (decay + 1))
    return min(up, down)


def cosine(step: int, steps: int, warmup: int, final: float = 0.0) -> float:
    """The same factor: linear up, then half a cosine down to `final` (Loshchilov and Hutter 2017,
    arXiv:1608.03983).
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / (steps - warmup)
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2


def ramp(step: int, steps: int, first: int, last: int) -> int:
    """A whole number that goes from `first` to `last` over `steps` equal steps, and stays there."""
    return last if step >= steps else first + round((last - first) * step / steps)


def is_late(step: int, steps: int, fraction: float) -> bool:
    """Whether `step` is in the last `fraction` of `steps`."""
    return step >= steps - round(steps * fraction)
