"""The learning rate of a step: a function of the step alone, so that a resumed run needs nothing else."""

import math

from lorakit.train.config import TrainConfig


def warmup_steps(config: TrainConfig, total: int) -> int:
    """Steps of warm-up in a run of `total` steps."""
    return math.ceil(config.warmup * total) if config.warmup < 1 else int(config.warmup)


def factor(config: TrainConfig, step: int, total: int) -> float:
    """What step `step` (0-based) of `total` multiplies the peak rate by: up to 1 in warm-up, then down by the schedule."""
    warm = warmup_steps(config, total)
    if step < warm:
        return (step + 1) / warm
    if config.schedule == "constant":
        return 1.0
    progress = (step - warm) / max(1, total - warm)
    if config.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return max(0.0, 1.0 - progress)
