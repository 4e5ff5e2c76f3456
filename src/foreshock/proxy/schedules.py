"""The schedule s_t in [0, 1] that multiplies the peak learning rate."""

import math

from foreshock.core.run_config import ScheduleConfig


def schedule_factor(step: int, steps: int, lr: float, config: ScheduleConfig) -> float:
    """s_t at step 1 … steps: linear warm-up to 1, then the named shape down to min_lr / lr.

    The floor is an *absolute* learning rate (2309.14322 sec. 2.1), so it weighs more at low peak rates.

    >>> config = ScheduleConfig(warmup=0.1, min_lr=1e-5)
    >>> [round(schedule_factor(t, 100, 1e-2, config), 4) for t in (1, 10, 55, 100)]
    [0.1, 1.0, 0.5005, 0.001]
    """
    warmup = round(config.warmup * steps)
    if step <= warmup:
        return step / warmup
    floor = min(1.0, config.min_lr / lr)
    start = max(warmup, round((1 - config.decay_fraction) * steps)) if config.name == "wsd" else warmup
    progress = max(0.0, (step - start) / max(1, steps - start))
    if config.name == "constant":
        return 1.0
    if config.name == "cosine":
        return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2
    return 1 - (1 - floor) * progress
