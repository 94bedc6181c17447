"""The warm-up, stable, decay schedule (MiniCPM, Hu et al. 2024, arXiv:2404.06395), in steps."""


def warmup_stable_decay(step: int, steps: int, warmup: int, decay_fraction: float) -> float:
    """The factor on the peak learning rate at `step` (0-based) of `steps`: linear up, constant, linear down to 0."""
    decay = round(steps * decay_fraction)
    up = min(1.0, (step + 1) / (warmup + 1))
    down = min(1.0, (steps - step) / (decay + 1))
    return min(up, down)
